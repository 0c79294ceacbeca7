"""Convert pairs of query and passage to MDS shards; see --help."""

import sys

from m2_plugin.foundry.conversion.pairs import main_pairs

if __name__ == "__main__":
    sys.exit(main_pairs())
