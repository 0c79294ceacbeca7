"""Convert C4 to MDS shards.

python data_prep/convert_c4.py --out_root ./my-copy-c4 --splits train_small val
"""

import sys

from m2_plugin.foundry.conversion.cli import main_c4

if __name__ == "__main__":
    sys.exit(main_c4())
