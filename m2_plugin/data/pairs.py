"""Pairs of query and passage, as rows of a file have them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m2_plugin.data.rows import text_bytes, text_of

__all__ = ["Keys"]


@dataclass(frozen=True)
class Keys:
    """The names of the columns of pairs; `negatives` contains lists, and is optional."""

    query: str = "query"
    passage: str = "passage"
    negatives: str = "negatives"

    def pair(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's `query`, `passage` and list of `negatives`.

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
