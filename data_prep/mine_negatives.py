"""Add negatives that BM25 finds to pairs of query and passage; see --help."""

import sys

from m2_plugin.cli import run

if __name__ == "__main__":
    sys.exit(run("mine-negatives"))
