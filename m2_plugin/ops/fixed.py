"""Tensors that nobody writes to any more, and what is computed from them.

Results live as long as the tensors do. A tensor is one Python object here: a view of it is another.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Fixed:
    """What is known of a fixed tensor."""

    reused: bool
    results: dict[Hashable, Any] = field(default_factory=dict)  # one key, and the result for it


_fixed = WeakTensorKeyDictionary()


def declare_fixed(x: Tensor, reused: bool = True) -> None:
    """Declare that x has its final values: `derived` keeps what is computed from it.

    Args:
        x: The tensor.
        reused: Whether many passes read x; if not, only a forward pass and its backward pass do.
    """
    _fixed[x] = _Fixed(reused)


def is_fixed(x: Tensor) -> bool:
    """Return whether x was declared fixed."""
    return x in _fixed


def is_reused(x: Tensor) -> bool:
    """Return whether x was declared fixed for many passes."""
    found = _fixed.get(x)
    return found is not None and found.reused


def derived(
    tensors: Sequence[Tensor], key: Hashable, compute: Callable[[], Sequence[Any]]
) -> Sequence[Any]:
    """Return what `compute` returns; if all tensors are fixed, what it returned before.

    Args:
        tensors: What the results are computed from.
        key: All else that the results depend on. A fixed tensor keeps the result of one key.
        compute: Returns one result for each tensor, of that tensor alone.
    """
    found = [_fixed.get(x) for x in tensors]
    kept: list[dict[Hashable, Any]] = [x.results for x in found if x is not None]
    if len(kept) < len(found):
        return compute()
    if not all(key in results for results in kept):
        for results, new in zip(kept, compute(), strict=True):
            results.clear()
            results[key] = new
    return [results[key] for results in kept]
