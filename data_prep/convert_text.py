"""Convert Wikipedia, BookCorpus or your own text to MDS shards; see --help."""

import sys

from m2_plugin.cli import run

if __name__ == "__main__":
    sys.exit(run("convert-text"))
