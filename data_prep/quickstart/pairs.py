"""Make pairs of neighbouring passages from the sample of C4 and the novels here, for retrieval.

    python data_prep/quickstart/pairs.py --out quickstart/pairs

writes train.jsonl, val.jsonl and test.jsonl, with one object per line: `query`, `passage` and
`source`. A query is a piece of text of at least 300 characters that ends where a sentence ends. Its
passage is the next piece of the same web page or novel, `source`. Each page is in one of the three
files; the novels are in train.jsonl.
"""

import argparse
import gzip
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from m2_plugin.cli import guarded
from m2_plugin.files import write_atomically

log = logging.getLogger("pairs")

SAMPLE = Path(__file__).parent / "c4-sample.json.gz"
NOVELS = Path(__file__).parent / "novels.jsonl.gz"
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # tenths of the pages, by a hash of the URL
CHARACTERS = 300  # about 80 tokens, so most pieces fit into the recipe's 96
SENTENCE_END = re.compile(r"""(?<=[.!?"'])\s+(?=\W?[A-Z])""")


def pieces(text: str, size: int = CHARACTERS) -> Iterator[str]:
    """Cut a text where sentences end, into pieces of at least `size` characters; drop the rest."""
    piece = ""
    for sentence in SENTENCE_END.split(text):
        piece = f"{piece} {sentence}".strip()
        if len(piece) >= size:
            yield piece
            piece = ""


def read(path: Path) -> Iterator[dict[str, str]]:
    """Read JSON lines with `text`, and the `url` of a web page or the `source` of a novel."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def split_of(url: str) -> str:
    """Return the split of a page: train, val or test."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return SPLITS[int(digest, 16) % len(SPLITS)]


def pairs() -> dict[str, list[dict[str, str]]]:
    """Return the pairs of each split.

    The training split has all pairs of a text, the evaluation splits only the first one of a page:
    so there is no other passage from the query's page.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    texts = [(split_of(page["url"]), page["url"], page["text"]) for page in read(SAMPLE)]
    texts += [("train", part["source"], part["text"]) for part in read(NOVELS)]
    for split, source, text in texts:
        neighbours = pairwise(pieces(text))
        for query, passage in neighbours if split == "train" else islice(neighbours, 1):
            splits[split].append({"query": query, "passage": passage, "source": source})
    return splits


def main() -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Pairs of neighbouring passages of texts.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in pairs().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(out / f"{split}.jsonl", "".join(lines))
        log.info("%s: %d pairs", out / f"{split}.jsonl", len(rows))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
