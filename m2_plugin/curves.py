"""What pictures of curves share; matplotlib is imported by those who draw."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["End", "annotate_ends", "default_span", "running_mean"]

End = tuple[float, float, str]  # last x of a curve, its value there, its colour


def default_span(points: int) -> int:
    """Points that a running mean takes together: 1/50 of them."""
    return min(points // 50 + 4, points)


def running_mean(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Centred mean over `span` values; the window shrinks at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - span // 2, 0)
    high = np.minimum(index + span // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def annotate_ends(axes: Any, ends: Iterable[End]) -> None:
    """Write final values right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    below = -math.inf
    for x, value, color in sorted(ends, key=lambda end: end[1]):
        height = max(value, below + 0.035 * (high - low))  # a line of text is 3.5 % of the axis
        below = height
        axes.annotate(
            f"{value:.3f}",
            (x, value),
            xytext=(1.01, height),
            textcoords=("axes fraction", "data"),
            va="center",
            color=color,
            fontsize=9,
        )
