"""Tensors that nobody writes to any more, and what is computed from them.

Results live as long as one of the tensors does. A tensor is one Python object here: a view of it is
another.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Fixed:
    """What is known of tensors that were declared fixed together."""

    tensors: list[Tensor]  # other objects with their values: these here must be free to go
    reused: bool
    results: dict[Hashable, Sequence[Any]] = field(default_factory=dict)  # of one key


_fixed = WeakTensorKeyDictionary()  # of a tensor, its `_Fixed` and its number there


def declare_fixed(*tensors: Tensor, reused: bool = True) -> None:
    """Declare that tensors have their final values: `derived` keeps what is computed from them.

    Args:
        *tensors: The tensors. What is computed from one of them is then computed from all at once.
        reused: Whether many passes read them; if not, only a forward pass and its backward pass do.
    """
    together = _Fixed([x.detach() for x in tensors], reused)
    for i, x in enumerate(tensors):
        _fixed[x] = together, i


def is_fixed(x: Tensor) -> bool:
    """Return whether x was declared fixed."""
    return x in _fixed


def is_reused(x: Tensor) -> bool:
    """Return whether x was declared fixed for many passes."""
    found = _fixed.get(x)
    return found is not None and found[0].reused


def derived(
    tensors: Sequence[Tensor],
    key: Hashable,
    compute: Callable[[Sequence[Tensor]], Sequence[Any]],
) -> Sequence[Any]:
    """Return what `compute` returns; if all tensors are fixed, what it returned before.

    Args:
        tensors: What the results are computed from.
        key: All else that the results depend on. Fixed tensors keep the results of one key.
        compute: Returns one result for each tensor, of that tensor alone.
    """
    known: list[tuple[_Fixed, int]] = []
    for x in tensors:
        found = _fixed.get(x)
        if found is None:
            return compute(tensors)
        known.append(found)
    results = []
    for together, number in known:
        kept = together.results.get(key)
        if kept is None:
            together.results = {}  # they give way before there are new ones
            kept = compute(together.tensors)
            together.results = {key: kept}
        results.append(kept[number])
    return results
