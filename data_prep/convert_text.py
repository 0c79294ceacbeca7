"""Convert Wikipedia, BookCorpus or your own text to MDS shards; see --help."""

import sys

from m2_plugin.foundry.conversion.cli import main_text

if __name__ == "__main__":
    sys.exit(main_text())
