"""The MLP of a Monarch Mixer layer in PyTorch.

Dimension key: D hidden, F intermediate, K blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m2_plugin.ops.reference.block_diagonal_linear import block_diagonal_linear_torch


def blocks_fit(
    x: Tensor, up_weight: Tensor, down_weight: Tensor, intermediate_size: int, glu: bool
) -> bool:
    """Return whether all features fill whole blocks, so that no map pads or cuts off."""
    nblocks, block_out, block_in = up_weight.shape
    return (
        x.shape[-1] == nblocks * block_in == nblocks * down_weight.shape[1]
        and intermediate_size == nblocks * down_weight.shape[2]
        and nblocks * block_out == intermediate_size * (2 if glu else 1)
    )


def monarch_mlp_reference(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    intermediate_size: int,
    glu: bool = True,
    dropout_p: float = 0.0,
    linear: Callable[..., Tensor] = block_diagonal_linear_torch,
) -> Tensor:
    """Compute `monarch_mlp` of any sizes; `linear` computes each whole block-diagonal map."""
    up_size = intermediate_size * (2 if glu else 1)
    h = linear(x, up_weight, None, up_size)
    if glu:
        gate, up = h.split(intermediate_size, dim=-1)
        h = F.gelu(gate) * up
    else:
        h = F.gelu(h)
    h = F.dropout(h, dropout_p) if dropout_p else h
    return linear(h, down_weight, down_bias, x.shape[-1])


def monarch_mlp_torch(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    intermediate_size: int,
    glu: bool = True,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute `monarch_mlp`; arguments as there.

    If the sizes allow it, it works block by block and never joins the blocks of an activation.
    """
    nblocks, _, block_in = up_weight.shape
    fit = blocks_fit(x, up_weight, down_weight, intermediate_size, glu)
    if not fit or (glu and nblocks % 2):
        return monarch_mlp_reference(
            x, up_weight, down_weight, down_bias, intermediate_size, glu, dropout_p
        )
    h = [F.linear(b, w) for b, w in zip(x.split(block_in, -1), up_weight.unbind(), strict=True)]
    if glu:
        gates, ups = h[: nblocks // 2], h[nblocks // 2 :]
        h = [F.gelu(gate) * up for gate, up in zip(gates, ups, strict=True)]
    else:
        h = [F.gelu(block) for block in h]
    if dropout_p:
        h = [F.dropout(block, dropout_p) for block in h]
    h = [part for block in h for part in block.split(down_weight.shape[2], -1)]
    blocks = [F.linear(b, w) for b, w in zip(h, down_weight.unbind(), strict=True)]
    y = torch.cat(blocks, dim=-1)
    return y if down_bias is None else y + down_bias
