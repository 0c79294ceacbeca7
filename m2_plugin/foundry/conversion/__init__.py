"""Conversion of text corpora to MDS shards for llm-foundry's `text` dataloader.

    sources   → input files and data sets of the hub: streams, cut into blocks
    samples   → a block into samples: parse, tokenise, cut to length
    folder    → the partial folder: settings, records of finished blocks, the final rename
    engine    → the main process, which gives blocks to worker processes and keeps their order
    verify    → compares a finished folder with its hashes and its manifest
    cli       → the arguments of data_prep/*.py

A *stream* is a part of the input that is read in order, a *block* a piece of a stream that one
worker converts, and a *shard* a file of the output; each block has shards of its own. The blocks
depend on the input alone. So the output does not depend on the number of workers, and a run that
was killed continues with the blocks that have no record yet.
"""

from m2_plugin.foundry.conversion.engine import Job, convert
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.verify import verify

__all__ = ["BadDocumentError", "ConversionError", "Job", "convert", "verify"]
