"""Conversion of text corpora to MDS shards that the host's `text` dataloader reads.

    sources   → input files and hub shards, cut into blocks: the same blocks on every run
    samples   → a block into samples: parse, tokenise, cut to length
    folder    → the partial folder: settings, records of finished blocks, the final rename
    engine    → worker processes, and the one process that hands them blocks in order
    verify    → re-reads a finished folder against its hashes and its manifest
    cli       → the arguments of data_prep/*.py

A block becomes one *part*: its own shard or shards, written by one worker. Which blocks there are
depends on the input alone, so the output is the same whatever the number of workers, and a run that
was killed goes on with the blocks that have no record yet.
"""

from m2_plugin.foundry.conversion.engine import Job, convert
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.verify import verify

__all__ = ["BadDocumentError", "ConversionError", "Job", "convert", "verify"]
