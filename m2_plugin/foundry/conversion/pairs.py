"""Convert pairs of query and passage to MDS for llm-foundry's dataloader `contrastive_pairs`.

One process is enough: there are few pairs compared with a pretraining corpus, and this step does
not tokenise them.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2_plugin.data.formats import ENDINGS, DataError, file_format
from m2_plugin.data.rows import read_rows, text_bytes, text_of
from m2_plugin.files import whole, write_json
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.shards import check_compression, write_shards
from m2_plugin.foundry.conversion.sources import input_files
from m2_plugin.foundry.mds_index import INDEX

log = logging.getLogger(__name__)

# The columns of llm-foundry's own converter (for Delta tables); the negatives are a JSON list.
COLUMNS = {"query_text": "str", "positive_passage": "str", "negative_passages": "str"}


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


def write_split(out: Path, paths: Iterable[str], keys: Keys, compression: str | None) -> int:
    """Write one split, under its name only if it is complete; return the number of pairs."""
    check_compression(compression)
    counts = set()

    def samples() -> Iterator[list[bytes]]:
        for path in paths:
            for sample in tqdm(read_pairs(path, keys), desc=path, unit=" pairs"):
                counts.add(len(json.loads(sample["negative_passages"])))
                yield [sample[column].encode() for column in sorted(COLUMNS)]

    with whole(out) as folder:
        folder.mkdir()
        entries = write_shards(samples(), COLUMNS, compression, folder)
        pairs = sum(entry["samples"] for entry in entries)
        if not pairs:
            raise ConversionError(f"no pairs for {str(out)!r} in {', '.join(paths)}")
        if len(counts) > 1:
            raise ConversionError(
                f"{', '.join(paths)} have {sorted(counts)} negatives per row: all rows of a split "
                "need the same number"
            )
        write_json(folder / INDEX, {"version": 2, "shards": entries}, indent=None)
    return int(pairs)


def _parser() -> argparse.ArgumentParser:
    names = Keys()
    parser = argparse.ArgumentParser(
        description="Convert pairs of query and passage to MDS, for fine-tuning for retrieval."
    )
    parser.add_argument("--out_root", "--out-root", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--local_files", "--local-files", nargs="+", required=True, metavar="SPLIT=PATH",
        help=f"files, folders or patterns: {ENDINGS}; SPLIT is train, val or any name, and may be "
        "given more than once",
    )  # fmt: skip
    parser.add_argument("--query_column", "--query-column", default=names.query, metavar="KEY")
    parser.add_argument(
        "--passage_column", "--passage-column", default=names.passage, metavar="KEY",
        help="the text that answers the query",
    )  # fmt: skip
    parser.add_argument(
        "--negatives_column", "--negatives-column", default=names.negatives, metavar="KEY",
        help="a list of texts that do not answer it, the same number in every row; optional",
    )  # fmt: skip
    parser.add_argument("--compression", metavar="ALGO[:LEVEL]", help="of the shards, such as zstd")
    return parser


def _splits(arguments: argparse.Namespace) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for item in arguments.local_files:
        name, found, path = item.partition("=")
        if not found or not name:
            raise ConversionError(f"--local_files {item!r} names no split: give train={item}")
        files = input_files([path])
        for file in files:
            if file_format(file.path) == "text":
                raise ConversionError(f"{file.path}: a text file has no columns for pairs")
        splits.setdefault(name, []).extend(file.path for file in files)
    for name in splits:
        if (arguments.out_root / name).exists():
            raise ConversionError(f"{arguments.out_root / name} exists already: remove it first")
    return splits


def main_pairs(argv: list[str] | None = None) -> int:
    """Run convert_pairs.py."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    keys = Keys(arguments.query_column, arguments.passage_column, arguments.negatives_column)
    try:
        for name, paths in _splits(arguments).items():
            out = arguments.out_root / name
            log.info("%s: %d pairs", out, write_split(out, paths, keys, arguments.compression))
    except (ConversionError, DataError, OSError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the unfinished split is removed")
        return 130
    return 0
