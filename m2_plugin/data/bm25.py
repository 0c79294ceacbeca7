"""BM25, the ranking by words; computed by `bm25s`."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BM25", "bm25s_library", "highest"]

# Lucene's, and the formula too. A word is two or more letters or digits, in lower case. No word is
# left out and none is stemmed: so all languages that separate words are treated alike.
K1, B = 1.2, 0.75


class BM25:
    """The words of N texts, held in memory.

    Args:
        texts: The texts, read once.

    Raises:
        ValueError: If `bm25s` is not installed.
    """

    def __init__(self, texts: Iterable[str]):
        bm25s = bm25s_library()
        words = bm25s.tokenize(texts, stopwords=None, show_progress=False)
        self._count = len(words.ids)
        self._index: Any = None  # if there are no words
        if words.vocab:
            self._index = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return the scores (N,) of all texts; that of a text without a word of the query is 0."""
        (words,) = bm25s_library().tokenize(
            [query], stopwords=None, show_progress=False, return_ids=False
        )
        known = self._index.get_tokens_ids(words) if self._index else []
        if not known:
            return np.zeros(self._count, np.float32)
        return np.asarray(self._index.get_scores_from_ids(known), np.float32)

    def nearest(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows (≤ k,) and scores (≤ k,) of the texts that share a word with the query.

        The highest score comes first; of equal ones, the earlier row.
        """
        scores = self.scores(query)
        rows = highest(scores, k)
        return rows, scores[rows]


def highest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the rows (≤ k,) of the highest of scores (N,) above 0; of equal ones, the earlier."""
    k = min(k, int(np.count_nonzero(scores > 0)))
    if k == 0:
        return np.zeros(0, np.int64)
    least = np.partition(scores, -k)[-k]
    found = np.flatnonzero(scores >= least)
    return found[np.lexsort((found, -scores[found]))][:k]


def bm25s_library(instead: str = "") -> Any:
    """Import `bm25s`.

    Args:
        instead: What else a user can do than to install it.

    Raises:
        ValueError: If it is not installed; says how to go on.
    """
    try:
        import bm25s
    except ImportError as error:
        message = f"BM25 needs bm25s: pip install 'm2-plugin[retrieval]'{instead} ({error})"
        raise ValueError(message) from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it would log each step
    return bm25s
