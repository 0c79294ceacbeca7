"""Block-diagonal matrix product: one factor of a Monarch matrix (arXiv 2310.12109, section 3).

Dimension key: K blocks, I inputs per block, O outputs per block.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_kernel


def block_shape(in_features: int, out_features: int, nblocks: int) -> tuple[int, int, int]:
    """Returns (K, O, I) of a block-diagonal weight, sizes rounded up to whole blocks."""
    return nblocks, math.ceil(out_features / nblocks), math.ceil(in_features / nblocks)


def block_diagonal_to_dense(weight: Tensor, in_features: int, out_features: int) -> Tensor:
    """Expands blocks (K, O, I) to the dense matrix (out_features, in_features) they stand for."""
    return torch.block_diag(*weight)[:out_features, :in_features]


def block_diagonal_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``y = x · diag(W_1, …, W_K)ᵀ + b``.

    Args:
        x: (..., in_features), any floating dtype. Where ``in_features`` falls short of K·I by less
            than K, the missing features count as zeros.
        weight: (K, O, I), the diagonal blocks.
        bias: (out_features,) or None.
        out_features: how many of the K·O outputs to keep; all of them by default.
        backend: ``auto`` (a Triton kernel on CUDA, else PyTorch), ``torch`` or ``triton``.

    Returns:
        (..., out_features) in the dtype that torch gives a linear map of ``x``.

    Raises:
        ValueError: if the sizes of ``x``, ``weight`` and ``out_features`` do not fit.
        RuntimeError: if ``backend`` is ``triton`` and it cannot run on ``x``.
    """
    nblocks, block_out, block_in = weight.shape
    out_features = nblocks * block_out if out_features is None else out_features
    padding = nblocks * block_in - x.shape[-1]
    if not 0 <= padding < nblocks:
        raise ValueError(
            f"x has {x.shape[-1]} features, but a weight of shape {tuple(weight.shape)} takes "
            f"{nblocks * (block_in - 1) + 1} to {nblocks * block_in}"
        )
    if not 0 < out_features <= nblocks * block_out:
        raise ValueError(
            f"out_features must be in 1..{nblocks * block_out} for a weight of shape "
            f"{tuple(weight.shape)}, not {out_features}"
        )
    if use_kernel(backend, "block_diagonal_linear", x) and x.numel():
        from m2_plugin.ops.kernels.block_diagonal_linear import block_diagonal_linear_op

        dtype = autocast_dtype(x)
        y = block_diagonal_linear_op(
            x.reshape(-1, x.shape[-1]).to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            out_features,
            backend == "triton",
        )
        return y.unflatten(0, x.shape[:-1])
    if padding:
        x = F.pad(x, (0, padding))
    # A GEMM per block on views of x: a batched GEMM needs the blocks side by side in memory, and
    # the copies there and back make it 1.3 to 2 times as slow (768 → 6144, one core).
    blocks = [F.linear(b, w) for b, w in zip(x.split(block_in, -1), weight.unbind(), strict=True)]
    y = torch.cat(blocks, dim=-1)[..., :out_features]
    return y if bias is None else y + bias
