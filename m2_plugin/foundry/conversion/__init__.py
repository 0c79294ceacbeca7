"""Conversion of text corpora to MDS shards for llm-foundry's `text` dataloader.

    sources   → cuts input files and data sets of the hub into streams and blocks
    samples   → turns a block into samples: parse, tokenise, cut to length
    folder    → the partial folder: settings, records of finished blocks, the final rename
    engine    → the main process, which gives blocks to worker processes and keeps their order
    verify    → compares a finished folder with its hashes and its manifest
    cli       → the arguments of data_prep/*.py

A *stream* is a part of the input that is read in order. A *block* is a section of a stream; one
worker converts it. A *shard* is a file of the output; each block has its own shards. Only the input
determines the blocks. Therefore the output does not depend on the number of workers, and a killed
run continues with the blocks that have no record yet.
"""

from m2_plugin.foundry.conversion.engine import Job, convert
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.verify import verify

__all__ = ["BadDocumentError", "ConversionError", "Job", "convert", "verify"]
