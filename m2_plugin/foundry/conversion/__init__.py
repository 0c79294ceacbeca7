"""Conversion of text corpora to MDS shards for llm-foundry's `text` dataloader.

    sources   → cuts input files and data sets of the hub into streams and blocks
    job       → the input and the settings of a split
    samples   → turns a block into samples: read, tokenise, cut to length
    shards    → writes shards
    folder    → the partial folder: settings, records of finished blocks, the final rename
    remote    → sends a finished split to a URL, and reads it from there
    worker    → a task: convert some blocks, each to its shards and its record
    engine    → the main process: gives tasks to workers, and puts the shards together
    verify    → compares a finished folder with its hashes and its manifest
    cli       → the arguments of convert_c4.py and convert_text.py
    pairs     → the arguments of convert_pairs.py

A *stream* is a part of the input that is read in order. A *block* is a section of a stream, and is
converted by itself to one shard or a few. Only the input and the settings determine the blocks.
Therefore the output does not depend on the workers, and a killed run continues with the blocks that
have no record yet.
"""

from m2_plugin.foundry.conversion.engine import convert
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.job import Job, Recipe
from m2_plugin.foundry.conversion.verify import verify

__all__ = ["BadDocumentError", "ConversionError", "Job", "Recipe", "convert", "verify"]
