"""Block-diagonal matrix product: one factor of a Monarch matrix (arXiv 2310.12109, section 3).

Dimension key: K blocks, I inputs per block, O outputs per block.
"""

import math

import torch
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_kernel
from m2_plugin.ops.cast import cast_together
from m2_plugin.ops.reference.block_diagonal_linear import (
    block_diagonal_linear_torch,
    check_sizes,
)


def block_shape(in_features: int, out_features: int, nblocks: int) -> tuple[int, int, int]:
    """Return the shape (K, O, I) of a block-diagonal weight, sizes rounded up to whole blocks."""
    return nblocks, math.ceil(out_features / nblocks), math.ceil(in_features / nblocks)


def block_diagonal_to_dense(weight: Tensor, in_features: int, out_features: int) -> Tensor:
    """Return the dense matrix (out_features, in_features) that has these blocks (K, O, I)."""
    return torch.block_diag(*weight)[:out_features, :in_features]


def block_diagonal_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `y = x · diag(W_1, …, W_K)ᵀ + b`.

    Args:
        x: (..., in_features), any floating dtype. If `in_features` is less than K·I, by at most
            K − 1, the missing features count as zeros.
        weight: (K, O, I), the diagonal blocks.
        bias: (out_features,) or None.
        out_features: How many of the K·O outputs to keep; by default all.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.

    Returns:
        (..., out_features) in the dtype that torch gives a linear map of `x`.

    Raises:
        ValueError: If the sizes of `x`, `weight` and `out_features` do not fit.
        RuntimeError: If `backend` is `triton` and it cannot run on `x`.
    """
    if use_kernel(backend, "block_diagonal_linear", x) and x.numel():
        from m2_plugin.ops.kernels.block_diagonal_linear import block_diagonal_linear_op

        out_features = check_sizes(x, weight, out_features)
        dtype = autocast_dtype(x)
        y = block_diagonal_linear_op(
            x.reshape(-1, x.shape[-1]).to(dtype),
            *cast_together([weight, bias], dtype),
            out_features,
            backend == "triton",
        )
        return y.unflatten(0, x.shape[:-1])
    return block_diagonal_linear_torch(x, weight, bias, out_features)
