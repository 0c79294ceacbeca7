"""Convert C4 to MDS shards.

python data_prep/convert_c4.py --out_root ./my-copy-c4 --splits train_small val
"""

import sys

from m2_plugin.cli import run

if __name__ == "__main__":
    sys.exit(run("convert-c4"))
