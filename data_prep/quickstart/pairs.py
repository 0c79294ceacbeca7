"""Make pairs of neighbouring paragraphs from the novels that lie here, to fine-tune for retrieval.

    python data_prep/quickstart/pairs.py --out quickstart/pairs

writes train.jsonl, val.jsonl and test.jsonl, one object per line with `query`, `passage` and
`source`. A query is a piece of text of 300 characters and more, cut where a sentence ends; its
passage is the piece after it. Each novel is in one of the three files.
"""

import argparse
import gzip
import json
import logging
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from m2_plugin.files import write_atomically

log = logging.getLogger("pairs")

NOVELS = Path(__file__).parent / "novels.jsonl.gz"
HELD_OUT = {"The Secret Garden": "val", "Treasure Island": "test", "The Lost World": "test"}
CHARACTERS = 300  # some 80 tokens, so that most are whole within the quickstart's 128
SENTENCE_END = re.compile(r"""(?<=[.!?"'])\s+(?=\W?[A-Z])""")


def pieces(text: str, size: int = CHARACTERS) -> Iterator[str]:
    """Cut a text where sentences end, into pieces of at least `size` characters; drop the rest."""
    piece = ""
    for sentence in SENTENCE_END.split(text):
        piece = f"{piece} {sentence}".strip()
        if len(piece) >= size:
            yield piece
            piece = ""


def pairs() -> dict[str, list[dict[str, str]]]:
    """Return the pairs of each split.

    While training every piece is a query once and a passage once; in evaluation it is one of the
    two only, so that no query is among the passages that it is looked for in.
    """
    novels: dict[str, list[str]] = {}
    with gzip.open(NOVELS, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            novels.setdefault(row["source"], []).append(row["text"])
    splits: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    for source, texts in novels.items():
        split = next((s for title, s in HELD_OUT.items() if title in source), "train")
        neighbours = list(pairwise(pieces(" ".join(texts))))
        for query, passage in neighbours if split == "train" else neighbours[::2]:
            splits[split].append({"query": query, "passage": passage, "source": source})
    return splits


def main() -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Pairs of neighbouring paragraphs of novels.")
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
    sys.exit(main())
