"""Exact search: the highest scores of queries against many vectors, read in blocks.

Q queries, N vectors, D their width, k hits of a query. Memory does not grow with N.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["nearest"]

ROWS = 16384  # vectors of a block: 48 MiB at width 768
QUERIES = 256  # of a block of scores: 16 MiB
LOW = 0xFFFFFFFF  # the 32 bits of a key that hold the row

Hits = tuple[NDArray[np.int64], NDArray[np.float32]]


def nearest(
    queries: NDArray[np.float32],
    vectors: Path,
    k: int,
    similarity: str = "cosine",
    rows: NDArray[np.int64] | None = None,
) -> Hits:
    """Find the vectors with the highest scores. Of equal scores, that in the earlier row wins.

    Args:
        queries: (Q, D), float32.
        vectors: A `.npy` file with N vectors, float32 (N, D), N < 2³².
        k: The number of hits; all N if it is larger.
        similarity: `cosine` or `dot`. The cosine with a vector of zeros is 0.
        rows: Search these rows only, in ascending order; None searches all.

    Returns:
        The rows of the hits, int64 (Q, k), and their scores, float32 (Q, k), highest first.

    Raises:
        ValueError: If the file is damaged, its vectors have another width, or a score is not
            finite. The message names the file.
    """
    wanted, found = torch.from_numpy(queries), None
    if similarity == "cosine":
        wanted = wanted / _lengths(wanted)[:, None]
    for numbers, block in _blocks(vectors, rows):
        if block.shape[1] != wanted.shape[1]:
            raise ValueError(
                f"{str(vectors)!r} has vectors of width {block.shape[1]}, and those of the "
                f"queries have {wanted.shape[1]}: they are of another model"
            )
        lengths = _lengths(block) if similarity == "cosine" else 1
        parts = [
            _top(_keys(part @ block.T / lengths, numbers, str(vectors)), k)
            for part in wanted.split(QUERIES)
        ]
        found = _top(torch.cat(parts), k, found)
    return _unpack(found) if found is not None else _none(len(queries))


def _none(count: int) -> Hits:
    return np.empty((count, 0), np.int64), np.empty((count, 0), np.float32)


def _blocks(file: Path, rows: NDArray[np.int64] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of some rows, and the rows."""
    count = len(_opened(file) if rows is None else rows)
    for start in range(0, count, ROWS):
        chosen = slice(start, start + ROWS) if rows is None else rows[start : start + ROWS]
        # It is opened for each block: an open map keeps in memory what was read of it.
        block = np.array(_opened(file)[chosen])
        numbers = torch.arange(start, start + len(block)) if rows is None else chosen
        yield torch.as_tensor(numbers), torch.from_numpy(block)


def _opened(file: Path) -> NDArray[np.float32]:
    try:
        vectors = np.load(file, mmap_mode="r")
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise ValueError(f"{vectors.dtype} {vectors.shape} instead of float32 (N, D)")
    except (EOFError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no file of vectors: {error}") from error
    return vectors


def _lengths(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1).clamp_min(torch.finfo(vectors.dtype).tiny)  # 0 / 0 would be NaN


# A key is an int64 that orders hits: above, the bits of the score; below, the row, reversed. So no
# two keys are equal, and which of two equal scores is kept depends on nothing else.


def _keys(scores: Tensor, rows: Tensor, name: str = "") -> Tensor:
    if not scores.isfinite().all():
        raise ValueError(f"{name}: a score is NaN or infinite, as the vectors are not all finite")
    bits = (scores + 0.0).view(torch.int32)  # of -0.0 and 0.0 the same
    return _ordered(bits).long() << 32 | (LOW - rows)


def _unpack(keys: Tensor) -> Hits:
    scores = _ordered((keys >> 32).int()).view(torch.float32)
    return (LOW - (keys & LOW)).numpy(), scores.numpy()


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of floats to integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _top(keys: Tensor, k: int, others: Tensor | None = None) -> Tensor:
    if others is not None:
        keys = torch.cat([others, keys], dim=1)
    return keys.topk(min(k, keys.shape[1]), dim=1).values
