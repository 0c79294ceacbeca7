"""The mixer's input projection, transposed, with one addition for the gradient of its input.

Dimension key: B batch, L sequence, D channels.
"""

from typing import Any

import torch
from torch import Tensor

from m2_plugin.ops.gradients import once_differentiable


class InputProjection(torch.autograd.Function):
    """Map u (B, L, D) and a weight (3D, D) of its dtype to p (B, L, 3D), and u once more.

    Positions are contiguous in p. Whoever else reads u takes the second output: then the
    gradient that comes from there is added to within the product of this gradient, instead of by
    a pass over three tensors.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and u."""
        ctx.save_for_backward(u, weight)
        ctx.set_materialize_grads(False)
        return _project(u, weight), u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_p: Tensor | None, grad_u: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of u, with positions contiguous, and of the weight."""
        u, weight = ctx.saved_tensors
        if grad_p is None:
            return grad_u, None
        columns = grad_p.flatten(0, 1).t()  # (3D, B·L)
        grad = grad_weight = None
        if ctx.needs_input_grad[0]:
            if grad_u is None:
                grad = weight.t() @ columns
            else:  # nobody else has this gradient: it may be overwritten
                grad = grad_u.flatten(0, 1).t().addmm_(weight.t(), columns)
            grad = grad.view(-1, *u.shape[:2]).permute(1, 2, 0)
        if ctx.needs_input_grad[1]:
            grad_weight = columns @ u.flatten(0, 1)
        return grad, grad_weight


def input_projection(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute p = u · Wᵀ with positions contiguous in memory.

    The gradient of the second output is overwritten: nothing but the op that reads it may hold it.

    Args:
        u: (B, L, D).
        weight: (3D, D), of u's dtype.

    Returns:
        p (B, L, 3D), and u for its other reader.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _project(u, weight), u
    return InputProjection.apply(u, weight)


def _project(u: Tensor, weight: Tensor) -> Tensor:
    batch, length, _ = u.shape
    p = weight @ u.flatten(0, 1).t()  # (3D, B·L)
    return p.view(-1, batch, length).permute(1, 2, 0)
