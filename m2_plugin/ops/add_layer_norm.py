"""The sum of two tensors and its LayerNorm, in one pass over the memory.

Dimension key: B batch, L sequence, D channels.
"""

import torch
from torch import Tensor

from m2_plugin.ops.backend import KERNEL_DTYPES, autocast_dtype, use_kernel
from m2_plugin.ops.reference.add_layer_norm import add_layer_norm_torch


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    sequence_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute `LayerNorm(x + residual)`; mean, variance and sum in fp32 (arXiv 1607.06450).

    Args:
        x: (B, L, D).
        residual: (B, L, D), or (L, D) or (1, L, D) to add the same to every row, or None.
        weight: (D,).
        bias: (D,) or None.
        eps: What is added to the variance.
        sequence_last: Whether only a mixer reads the result. A kernel then writes it as the mixer's
            kernels read it: positions contiguous in memory, in the dtype of linear maps under
            autocast. PyTorch does not need this hint.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.

    Returns:
        (B, L, D) in the dtype that `F.layer_norm` returns: under autocast on CUDA fp32, unless
        `sequence_last`.

    Raises:
        RuntimeError: If `backend` is `triton` and it cannot run on `x`.
    """
    if _fits(x, residual) and use_kernel(backend, "add_layer_norm", x) and x.numel():
        from m2_plugin.ops.kernels.add_layer_norm import add_layer_norm_op

        if torch.is_autocast_enabled(x.device.type):
            dtype = autocast_dtype(x) if sequence_last else torch.float32
        else:
            dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        y, _, _ = add_layer_norm_op(
            x.flatten(0, -2),
            None if residual is None else residual.flatten(0, -2),
            weight,
            bias,
            eps,
            dtype,
            sequence_last,
            backend == "triton",
        )
        return y.view(x.shape)
    return add_layer_norm_torch(x, residual, weight, bias, eps)


def _fits(x: Tensor, residual: Tensor | None) -> bool:
    """Return whether the residual has a row for each of x, or rows that repeat."""
    if residual is None:
        return True
    same = residual.shape == x.shape
    if not same:
        shape = list(residual.shape)
        while len(shape) > 1 and shape[0] == 1:
            shape.pop(0)
        same = len(shape) <= x.ndim and shape == list(x.shape[x.ndim - len(shape) :])
    return same and residual.ndim > 1 and residual.dtype in KERNEL_DTYPES
