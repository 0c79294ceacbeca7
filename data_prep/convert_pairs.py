"""Convert pairs of query and passage to MDS shards; see --help."""

import sys

from m2_plugin.cli import run

if __name__ == "__main__":
    sys.exit(run("convert-pairs"))
