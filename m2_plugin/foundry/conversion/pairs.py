"""Convert pairs of query and passage to MDS for llm-foundry's dataloader `contrastive_pairs`.

One process is enough: there are few pairs compared with a pretraining corpus, and this step does
not tokenise them.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2_plugin.data.formats import ENDINGS, file_format
from m2_plugin.data.rows import read_rows, text_bytes, text_of
from m2_plugin.executor import open_workers
from m2_plugin.files import whole
from m2_plugin.foundry.conversion.cli import Parser, log_to_stderr, places
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.folder import finished_samples, write_index
from m2_plugin.foundry.conversion.job import FORMAT_VERSION, named
from m2_plugin.foundry.conversion.remote import begin_split, send_split
from m2_plugin.foundry.conversion.shards import check_compression, write_shards
from m2_plugin.foundry.conversion.sources import InputFile, input_files

log = logging.getLogger(__name__)

# The columns of llm-foundry's own converter (for Delta tables); the negatives are a JSON list.
COLUMNS = {"query_text": "str", "positive_passage": "str", "negative_passages": "str"}

FILES_HELP = f"""files, folders or patterns, on disk or as URLs: {ENDINGS}; SPLIT is train, val or
any name, and may be given more than once"""
NEGATIVES_HELP = """column with a list of texts that do not answer it, the same number in every row;
optional"""


@dataclass(frozen=True)
class Keys:
    """The names of the input columns; `negatives` contains lists, and is optional."""

    query: str = "query"
    passage: str = "passage"
    negatives: str = "negatives"

    def sample(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's query, passage and list of negatives.

        Raises:
            ValueError: If the row is not a pair; the message gives the reason.
        """
        query = text_of(row, self.query, "--query_column")
        passage = text_of(row, self.passage, "--passage_column")
        negatives = row.get(self.negatives) or []
        if not isinstance(negatives, list):
            raise ValueError(f"{self.negatives!r} is {type(negatives).__name__}, not a list")
        for negative in negatives:
            text_bytes(negative, self.negatives)
        for text in (query, passage, *negatives):
            if not text.strip():
                raise ValueError(f"{text!r} is an empty text")
        return {"query": query, "passage": passage, "negatives": negatives}


def read_pairs(path: str, keys: Keys) -> Iterator[dict[str, str]]:
    """Yield the samples of a file.

    Raises:
        BadDocumentError: If a row is not a pair, or if the number of its negatives differs from
            the first row's, since llm-foundry makes one tensor of a batch.
    """
    first = None
    for row in read_rows(path):
        try:
            if row.problem:
                raise ValueError(row.problem)
            sample = keys.sample(row.values)
            count = len(sample["negatives"])
            first = count if first is None else first
            if count != first:
                raise ValueError(f"{count} negatives, but the rows before it have {first}")
        except ValueError as error:
            raise BadDocumentError(f"{row.place}: {error}") from error
        texts = (sample["query"], sample["passage"], json.dumps(sample["negatives"]))
        yield dict(zip(COLUMNS, texts, strict=True))


@dataclass(frozen=True)
class PairsJob:
    """The conversion of one split.

    Args:
        out: The split's folder on a disk.
        url: Where the split goes when it is finished.
        files: The input files in order.
        keys: The names of their columns.
        compression: The `compression` of `MDSWriter`.
    """

    out: Path
    url: str | None
    files: tuple[InputFile, ...]
    keys: Keys
    compression: str | None

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output."""
        settings = {"format_version": FORMAT_VERSION, "files": named(self.files)}
        return settings | {"pairs": asdict(self.keys), "compression": self.compression}


def write_split(job: PairsJob) -> int:
    """Write one split, under its name only if it is complete; return the number of pairs."""
    check_compression(job.compression)
    counts = set()
    paths = [file.path for file in job.files]

    def samples() -> Iterator[list[bytes]]:
        for path in paths:
            for sample in tqdm(read_pairs(path, job.keys), desc=path, unit=" pairs"):
                counts.add(len(json.loads(sample["negative_passages"])))
                yield [sample[column].encode() for column in sorted(COLUMNS)]

    with whole(job.out) as folder:
        folder.mkdir()
        entries = write_shards(samples(), COLUMNS, job.compression, folder)
        pairs = sum(entry["samples"] for entry in entries)
        if not pairs:
            raise ConversionError(f"no pairs for {str(job.out)!r} in {', '.join(paths)}")
        if len(counts) > 1:
            raise ConversionError(
                f"{', '.join(paths)} have {sorted(counts)} negatives per row: all rows of a split "
                "need the same number"
            )
        write_index(folder, entries, {"settings": job.settings(), "samples": pairs})
    return int(pairs)


def convert_split(job: PairsJob, overwrite: bool) -> int:
    """Write one split, and send it to its URL if it has one; return the number of pairs."""
    pairs = begin_split(job.url, job.settings(), overwrite) if job.url else None
    if pairs is not None:
        return pairs
    if overwrite:
        shutil.rmtree(job.out, ignore_errors=True)
    pairs = finished_samples(job.out, job.settings())
    if pairs is None:
        pairs = write_split(job)
    if job.url:
        with open_workers() as workers:
            send_split(job.out, job.url, workers)
    return pairs


def _parser() -> Parser:
    names = Keys()
    parser = Parser(
        description="Convert pairs of query and passage to MDS, for fine-tuning for retrieval. Run "
        "the same command again to continue an interrupted run."
    )
    parser.option("local_files", FILES_HELP, nargs="+", required=True, metavar="SPLIT=PATH")
    parser.add_output()
    parser.option("query_column", "column with the query", default=names.query, metavar="KEY")
    passage = "column with the text that answers the query"
    parser.option("passage_column", passage, default=names.passage, metavar="KEY")
    parser.option("negatives_column", NEGATIVES_HELP, default=names.negatives, metavar="KEY")
    return parser


def _jobs(arguments: argparse.Namespace) -> list[PairsJob]:
    splits: dict[str, list[InputFile]] = {}
    for item in arguments.local_files:
        name, found, path = item.partition("=")
        if not found or not name:
            raise ConversionError(f"--local_files {item!r} names no split: give train={item}")
        files = input_files([path])
        for file in files:
            if file_format(file.path) == "text":
                raise ConversionError(f"{file.path}: a text file has no columns for pairs")
        splits.setdefault(name, []).extend(files)
    keys = Keys(arguments.query_column, arguments.passage_column, arguments.negatives_column)
    jobs = [
        PairsJob(*places(arguments, name), tuple(files), keys, arguments.compression)
        for name, files in splits.items()
    ]
    for job in jobs:  # before anything is written
        if not arguments.overwrite:
            finished_samples(job.out, job.settings())
    return jobs


def main_pairs(argv: list[str] | None = None) -> int:
    """Run convert_pairs.py.

    Raises:
        ValueError: If the arguments, the input or the output are wrong.
        OSError: If a disk or the storage of a URL fails.
    """
    log_to_stderr()
    arguments = _parser().parse_args(argv)
    for job in _jobs(arguments):
        pairs = convert_split(job, arguments.overwrite)
        log.info("%s: %d pairs", job.url or job.out, pairs)
    return 0
