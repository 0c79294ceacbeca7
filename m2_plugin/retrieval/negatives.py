"""Mine negatives by BM25: passages that share words with a query, and do not answer it.

The command `m2-plugin mine-negatives`; its output is an input of `convert_pairs.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m2_plugin.data.bm25 import BM25, highest
from m2_plugin.data.formats import DataError
from m2_plugin.data.pairs import Keys
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.files import whole

__all__ = ["Miner", "main_mine", "mine"]


class Miner:
    """The passages that can be negatives, with their BM25 index.

    Passages that differ in case or white space only are one. The passages of a query, in all of its
    rows, are never negatives of it, and neither is the query itself.

    Args:
        pairs: The pairs, with `query` and `passage`.
        corpus: More passages.

    Raises:
        ValueError: If there are no pairs, or bm25s is not installed.
    """

    def __init__(self, pairs: Iterable[Mapping[str, Any]], corpus: Iterable[str] = ()):
        self.passages: list[str] = []
        self.numbers: dict[str, int] = {}  # by `_same`
        self.answers: dict[str, set[int]] = {}
        self.pairs = 0
        for pair in pairs:
            self.pairs += 1
            answers = self.answers.setdefault(_same(pair["query"]), set())
            answers.add(self._add(pair["passage"]))
        if not self.pairs:
            raise DataError("the files of --pairs hold no pairs")
        for passage in corpus:
            self._add(passage)
        self.words = BM25(self.passages)

    def _add(self, passage: str) -> int:
        number = self.numbers.setdefault(_same(passage), len(self.passages))
        if number == len(self.passages):
            self.passages.append(passage)
        return number

    def negatives(
        self,
        pair: Mapping[str, Any],
        count: int,
        ranks: tuple[int, int],
        generator: np.random.Generator,
    ) -> list[str]:
        """Choose negatives of a query, the best first.

        Args:
            pair: A pair, with `query`, `passage` and the negatives that it has already.
            count: How many.
            ranks: The first rank in BM25's order to take, from 0, and the rank after the last one.
                What cannot be a negative has no rank, nor has what shares no word with the query.
                If there are more of these ranks than `count`, some are drawn; if there are fewer,
                passages outside the order are drawn to fill up.
            generator: Draws.

        Raises:
            ValueError: If there are not so many passages.
        """
        excluded = [*self.answers[_same(pair["query"])]]
        for text in (pair["query"], *pair["negatives"]):
            excluded += [self.numbers[_same(text)]] if _same(text) in self.numbers else []
        scores = self.words.scores(pair["query"])
        scores[excluded] = 0
        order = highest(scores, ranks[1])
        found = order[ranks[0] :]
        if len(found) > count:
            found = found[np.sort(generator.choice(len(found), count, replace=False))]
        elif len(found) < count:
            free = np.ones(len(scores), dtype=bool)
            free[excluded] = free[order] = False
            others = np.flatnonzero(free)
            missing = count - len(found)
            if missing > len(others):
                raise ValueError(
                    f"{len(found) + len(others)} passages can be negatives, {count} are needed: "
                    f"lower --num_negatives or --range_min, or give more passages by --corpus"
                )
            found = np.append(found, generator.choice(others, missing, replace=False))
        return [self.passages[number] for number in found]


def _same(text: str) -> str:
    return " ".join(text.lower().split())


def _pairs(paths: Iterable[str], keys: Keys) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each pair with its place."""
    for path in paths:
        for row in read_rows(path):
            try:
                if row.problem:
                    raise ValueError(row.problem)
                yield row.place, keys.pair(row.values)
            except ValueError as error:
                raise DataError(f"{row.place}: {error}") from error


def _texts(paths: Iterable[str], column: str) -> Iterator[str]:
    for path in paths:
        for row in read_rows(path, text_column=column):
            try:
                if row.problem:
                    raise ValueError(row.problem)
                text = text_of(row.values, column, "--corpus_column")
            except ValueError as error:
                raise DataError(f"{row.place}: {error}") from error
            if text.strip():
                yield text


def mine(
    out: Path,
    pairs: list[str],
    corpus: list[str],
    corpus_column: str,
    keys: Keys,
    count: int,
    ranks: tuple[int, int],
    triplets: bool,
    seed: int,
) -> tuple[int, int]:
    """Write pairs with negatives, as JSON lines with `query`, `passage` and `negatives`.

    The same input and settings give the same file. Mined negatives follow those that a pair has.

    Args:
        out: The file to write.
        pairs: Files of pairs.
        corpus: Files of more passages.
        corpus_column: The column of these.
        keys: The columns of the pairs.
        count: Negatives to mine for each pair.
        ranks: See `Miner.negatives`.
        triplets: Whether to write a row for each negative, and not one for each pair.
        seed: Of what is drawn.

    Returns:
        The numbers of pairs and of rows.

    Raises:
        ValueError: If a file cannot be read, a row is no pair, there are too few passages, or `out`
            exists.
    """
    with whole(out) as temporary:
        miner = Miner((pair for _, pair in _pairs(pairs, keys)), _texts(corpus, corpus_column))
        read = rows = 0
        with open(temporary, "w", encoding="utf-8") as file:
            for place, pair in tqdm(_pairs(pairs, keys), total=miner.pairs, unit=" pairs"):
                generator = np.random.default_rng([seed, read])
                try:
                    negatives = miner.negatives(pair, count, ranks, generator)
                except ValueError as error:
                    raise DataError(f"{place}: {error}") from error
                every = [*pair["negatives"], *negatives]
                for group in [[text] for text in every] if triplets else [every]:
                    file.write(json.dumps(pair | {"negatives": group}, ensure_ascii=False) + "\n")
                    rows += 1
                read += 1
    return read, rows


def _parser() -> argparse.ArgumentParser:
    names = Keys()
    parser = argparse.ArgumentParser(
        description="Add negatives to pairs of query and passage: passages of other pairs, or of "
        "a corpus, that BM25 finds for the query."
    )
    parser.add_argument("--pairs", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--num_negatives", "--num-negatives", type=int, default=1, metavar="N",
        help="for each pair (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--range_min", "--range-min", type=int, default=0, metavar="RANK",
        help="leave out this many of the best, which may answer the query (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--range_max", "--range-max", type=int, metavar="RANK",
        help="draw the negatives from the best up to this rank; by default there are no more than "
        "are needed",
    )  # fmt: skip
    parser.add_argument(
        "--triplets", action="store_true",
        help="write a row for each negative, with the query and the passage",
    )  # fmt: skip
    parser.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="more passages")
    parser.add_argument("--corpus_column", "--corpus-column", default="text", metavar="KEY")
    parser.add_argument("--query_column", "--query-column", default=names.query, metavar="KEY")
    parser.add_argument(
        "--passage_column", "--passage-column", default=names.passage, metavar="KEY"
    )
    parser.add_argument(
        "--negatives_column", "--negatives-column", default=names.negatives, metavar="KEY",
        help="negatives that a pair has already, which are kept; optional",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=17, help="of what is drawn (%(default)s)")
    return parser


def main_mine(argv: list[str] | None = None) -> int:
    """Run mine_negatives.py."""
    arguments = _parser().parse_args(argv)
    count, first = arguments.num_negatives, arguments.range_min
    last = first + count if arguments.range_max is None else arguments.range_max
    if count < 1:
        raise ValueError(f"--num_negatives must be 1 or more, got {count}")
    if first < 0:
        raise ValueError(f"--range_min must be 0 or more, got {first}")
    if last < first + count:
        raise ValueError(
            f"--range_max must be {first + count} (--range_min + --num_negatives) or more, got "
            f"{last}"
        )
    if arguments.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {arguments.seed}")
    keys = Keys(arguments.query_column, arguments.passage_column, arguments.negatives_column)
    pairs, rows = mine(
        arguments.out, arguments.pairs, arguments.corpus, arguments.corpus_column, keys, count,
        (first, last), arguments.triplets, arguments.seed,
    )  # fmt: skip
    sys.stdout.write(f"{pairs} pairs in {rows} rows\n{arguments.out}\n")
    return 0
