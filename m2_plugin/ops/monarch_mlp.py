"""The MLP of a Monarch Mixer layer: two block-diagonal maps with a (gated) GELU between.

Dimension key: D hidden, F intermediate, K blocks.
"""

from functools import partial

import torch
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_kernel
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear
from m2_plugin.ops.cast import cast_together
from m2_plugin.ops.reference.monarch_mlp import (
    blocks_fit,
    monarch_mlp_reference,
    monarch_mlp_torch,
)


def monarch_mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    intermediate_size: int,
    glu: bool = True,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute `W_down · dropout(GELU(gate) ⊙ up) + b`, (gate, up) the halves of `W_up · x`.

    Both maps are block-diagonal. The gate comes from the first half of the input blocks and the up
    branch from the second, so that the halves of x mix (arXiv 2310.12109, appendix on M2-BERT).

    Args:
        x: (..., D).
        up_weight: (K, ⌈2F/K⌉, ⌈D/K⌉), or (K, ⌈F/K⌉, ⌈D/K⌉) without GLU.
        down_weight: (K, ⌈D/K⌉, ⌈F/K⌉).
        down_bias: (D,) or None.
        intermediate_size: F.
        glu: Whether to gate the activation; if not, `W_down · dropout(GELU(W_up · x)) + b`.
        dropout_p: Probability of dropping an activation (pass 0 in evaluation).
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.

    Returns:
        (..., D) in the dtype that torch gives a linear map of `x`.

    Raises:
        RuntimeError: If `backend` is `triton` and it cannot run on `x`.
    """
    fit = blocks_fit(x, up_weight, down_weight, intermediate_size, glu)
    if fit and use_kernel(backend, "monarch_mlp", x) and x.numel():
        from m2_plugin.ops.kernels.monarch_mlp import monarch_mlp_op, takes_blocks

        dtype = autocast_dtype(x)
        if takes_blocks(*down_weight.shape[1:], x.device, dtype):
            y = monarch_mlp_op(
                x.reshape(-1, x.shape[-1]).to(dtype),
                *cast_together([up_weight, down_weight, down_bias], dtype),
                torch.randint(2**31 - 1, (1,), device=x.device) if dropout_p else None,
                glu,
                dropout_p,
                backend == "triton",
            )
            return y.view(x.shape)
    args = x, up_weight, down_weight, down_bias, intermediate_size, glu, dropout_p
    if use_kernel(backend, "block_diagonal_linear", x):
        return monarch_mlp_reference(*args, partial(block_diagonal_linear, backend=backend))
    return monarch_mlp_torch(*args)
