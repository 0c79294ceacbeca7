"""The command convert-pairs: pairs of query and passage for the dataloader `contrastive_pairs`."""

import argparse
import json
from collections.abc import Iterable

from m2_plugin.data.formats import ENDINGS, file_format
from m2_plugin.data.pairs import Keys
from m2_plugin.foundry.conversion.cli import Parser, log_to_stderr, places, run_jobs
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import finished_samples
from m2_plugin.foundry.conversion.job import Job, Recipe
from m2_plugin.foundry.conversion.sources import (
    InputFile,
    choose_block_bytes,
    input_files,
    read_pairs,
    text_bytes_estimate,
)

FILES_HELP = f"""files, folders or patterns, on disk or as URLs: {ENDINGS}; SPLIT is train, val or
any name, and may be given more than once"""
NEGATIVES_HELP = """column with a list of texts that do not answer it, the same number in every row;
optional"""


def _parser() -> Parser:
    names = Keys()
    parser = Parser(
        description="Convert pairs of query and passage to MDS, for fine-tuning for retrieval. Run "
        "the same command again to continue an interrupted run."
    )
    parser.option("local_files", FILES_HELP, nargs="+", required=True, metavar="SPLIT=PATH")
    parser.option("query_column", "column with the query", default=names.query, metavar="KEY")
    passage = "column with the text that answers the query"
    parser.option("passage_column", passage, default=names.passage, metavar="KEY")
    parser.option("negatives_column", NEGATIVES_HELP, default=names.negatives, metavar="KEY")
    parser.add_run()
    return parser


def _check_counts(files: Iterable[InputFile], keys: Keys) -> None:
    """Check that the first pairs of all files have the same number of negatives.

    The other pairs of a file are compared with its first one when they are read.
    """
    counts = set()
    for file in files:
        first = next(read_pairs(file.path, keys), None)
        if isinstance(first, str):
            counts.add(len(json.loads(first)["negatives"]))
        elif first is not None:
            raise first
    if len(counts) > 1:
        raise ConversionError(
            f"{', '.join(file.path for file in files)} have {sorted(counts)} negatives per row: "
            "all rows of a split need the same number"
        )


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    splits: dict[str, list[InputFile]] = {}
    for item in arguments.local_files:
        name, found, path = item.partition("=")
        if not found or not name:
            raise ConversionError(f"--local_files {item!r} names no split: give train={item}")
        splits.setdefault(name, []).extend(input_files([path]))
    keys = Keys(arguments.query_column, arguments.passage_column, arguments.negatives_column)
    jobs = []
    for name, files in splits.items():
        if text := next((f.path for f in files if file_format(f.path) == "text"), None):
            raise ConversionError(f"{text}: a text file has no columns for pairs")
        block_bytes = choose_block_bytes(text_bytes_estimate(files))
        recipe = Recipe(pairs=keys, compression=arguments.compression, block_bytes=block_bytes)
        out, url = places(arguments, name)
        jobs.append(Job(out=out, url=url, files=tuple(files), recipe=recipe))
    # All before anything is written.
    for job in jobs:
        if not arguments.overwrite:
            finished_samples(job.out, job.settings())
    for job in jobs:
        _check_counts(job.files, keys)
    return jobs


def main_pairs(argv: list[str] | None = None) -> int:
    """Run convert_pairs.py; errors as those of `main_c4`."""
    log_to_stderr()
    arguments = _parser().parse_args(argv)
    run_jobs(arguments, _jobs(arguments))
    return 0
