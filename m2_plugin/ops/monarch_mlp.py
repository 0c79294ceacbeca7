"""The MLP of a Monarch Mixer layer: two block-diagonal maps with a (gated) GELU between.

Dimension key: D hidden, F intermediate, K blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_kernel
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear


def monarch_mlp_reference(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    intermediate_size: int,
    glu: bool = True,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Composes ``monarch_mlp`` of whole block-diagonal maps; takes any sizes."""
    up_size = intermediate_size * (2 if glu else 1)
    h = block_diagonal_linear(x, up_weight, out_features=up_size, backend=backend)
    if glu:
        gate, up = h.split(intermediate_size, dim=-1)
        h = F.gelu(gate) * up
    else:
        h = F.gelu(h)
    h = F.dropout(h, dropout_p) if dropout_p else h
    return block_diagonal_linear(h, down_weight, down_bias, x.shape[-1], backend)


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
    """Computes ``W_down · dropout(GELU(gate) ⊙ up) + b``, (gate, up) the halves of ``W_up · x``.

    Both maps are block-diagonal, so the gate comes from the first half of the input blocks and the
    up branch from the second: the halves of x mix (arXiv 2310.12109, appendix on M2-BERT).

    Args:
        x: (..., D).
        up_weight: (K, ⌈2F/K⌉, ⌈D/K⌉), or (K, ⌈F/K⌉, ⌈D/K⌉) without GLU.
        down_weight: (K, ⌈D/K⌉, ⌈F/K⌉).
        down_bias: (D,) or None.
        intermediate_size: F.
        glu: gate the activation; else ``W_down · dropout(GELU(W_up · x)) + b``.
        dropout_p: probability of dropping an activation (pass 0 in evaluation).
        backend: ``auto`` (a Triton kernel on CUDA, else PyTorch), ``torch`` or ``triton``.

    Returns:
        (..., D) in the dtype that torch gives a linear map of ``x``.

    Raises:
        RuntimeError: if ``backend`` is ``triton`` and it cannot run on ``x``.
    """
    nblocks, block_out, block_in = up_weight.shape
    down_in = down_weight.shape[2]
    blocks_fit = (
        x.shape[-1] == nblocks * block_in == nblocks * down_weight.shape[1]
        and intermediate_size == nblocks * down_in
        and nblocks * block_out == intermediate_size * (2 if glu else 1)
    )
    if blocks_fit and use_kernel(backend, "monarch_mlp", x) and x.numel():
        from m2_plugin.ops.kernels.monarch_mlp import max_block_width, monarch_mlp_op

        dtype = autocast_dtype(x)
        if block_in <= max_block_width(x.device, dtype):
            y = monarch_mlp_op(
                x.reshape(-1, x.shape[-1]).to(dtype),
                up_weight.to(dtype),
                down_weight.to(dtype),
                None if down_bias is None else down_bias.to(dtype),
                torch.randint(2**31 - 1, (1,), device=x.device) if dropout_p else None,
                glu,
                dropout_p,
                backend == "triton",
            )
            return y.view(x.shape)
    if not blocks_fit or (glu and nblocks % 2) or use_kernel(backend, "block_diagonal_linear", x):
        return monarch_mlp_reference(
            x, up_weight, down_weight, down_bias, intermediate_size, glu, dropout_p, backend
        )
    # Block by block, so that neither the up-projection nor the activation is ever put together.
    h = [F.linear(b, w) for b, w in zip(x.split(block_in, -1), up_weight.unbind(), strict=True)]
    if glu:
        gates, ups = h[: nblocks // 2], h[nblocks // 2 :]
        h = [F.gelu(gate) * up for gate, up in zip(gates, ups, strict=True)]
    else:
        h = [F.gelu(block) for block in h]
    if dropout_p:
        h = [F.dropout(block, dropout_p) for block in h]
    h = [part for block in h for part in block.split(down_in, -1)]
    blocks = [F.linear(b, w) for b, w in zip(h, down_weight.unbind(), strict=True)]
    y = torch.cat(blocks, dim=-1)
    return y if down_bias is None else y + down_bias
