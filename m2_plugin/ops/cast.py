"""Casts of several tensors by one launch of a kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2_plugin.ops.gradients import once_differentiable


class Casts(torch.autograd.Function):
    """Cast tensors of one dtype to another; in the backward pass, cast their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in `dtype`."""
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        casts = _cast(tensors, dtype)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(x for x, need in zip(casts, needed, strict=True) if not need))
        return casts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        there = [grad for grad in grads if grad is not None]
        casts = iter(_cast(there, ctx.dtype))
        return None, *(None if grad is None else next(casts) for grad in grads)


def cast_together(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast tensors, as `x.to(dtype)` does one by one.

    Under autocast a layer casts each of its weights in each pass. These launches take longer than
    the copies, and as much of the host's time as those of the layer's products.

    Args:
        tensors: Of any shapes, on one device; those of `dtype` and None are returned as they are.
        dtype: The floating dtype of the results.

    Returns:
        The tensors in `dtype`, in their order.
    """
    others = [x for x in tensors if x is not None and x.dtype != dtype]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or len({x.dtype for x in others}) != 1:
        return [None if x is None else x.to(dtype) for x in tensors]
    grad = torch.is_grad_enabled()
    casts = iter(Casts.apply(dtype, *others) if grad else _cast(others, dtype))
    return [x if x is None or x.dtype == dtype else next(casts) for x in tensors]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    casts = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    if casts:
        torch._foreach_copy_(casts, tuple(tensors))
    return casts
