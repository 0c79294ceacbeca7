"""Marks the backward passes of our functions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as torch_once_differentiable

__all__ = ["once_differentiable"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a `backward` that cannot be differentiated, as PyTorch's function of this name does.

    PyTorch's turns the recording of gradients off in each call. In a usual backward pass it is off
    already, and a hundred such calls take the host two milliseconds of a training step.
    """
    marked = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        return (marked if torch.is_grad_enabled() else backward)(ctx, *grads)

    return wrapper
