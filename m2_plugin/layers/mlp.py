"""The MLP of an encoder layer, dense or block-diagonal, gated or plain, post-norm.

Dimension key: D hidden, F intermediate, K blocks.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from m2_plugin.layers.add_norm import add_norm
from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.plain import is_plain
from m2_plugin.ops.monarch_mlp import monarch_mlp


class DenseMLP(nn.Module):
    """`LayerNorm(W_down · dropout(GELU(gate) ⊙ up) + b + x)`; W_up · x consists of gate and up.

    Args:
        hidden_size: D.
        intermediate_size: F.
        glu: Whether to gate the activation; if not, it is GELU(W_up · x).
        dropout: Probability of dropping an activation.
        layer_norm_eps: Epsilon of the LayerNorm.
        backend: `auto`, `torch` or `triton`, as in `add_layer_norm`.
    """

    sequence_last = False  # whether only a mixer reads the output; see `add_layer_norm`

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        glu: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
        backend: str = "auto",
    ):
        super().__init__()
        self.glu = glu
        self.backend = backend
        self.dropout = nn.Dropout(dropout)
        self.up_proj = nn.Linear(hidden_size, intermediate_size * (2 if glu else 1), bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        h = self.dropout(_activate(self.up_proj(x), self.glu))
        return add_norm(self.norm, self.down_proj(h), x, self.sequence_last, self.backend)


def _activate(h: Tensor, glu: bool) -> Tensor:
    """Map (..., 2F), a gate beside what it gates, or (..., F) without GLU, to (..., F)."""
    if not glu:
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


class MonarchMLP(nn.Module):
    """`DenseMLP` with block-diagonal maps (arXiv 2310.12109, section 4.1).

    Args:
        hidden_size: D.
        intermediate_size: F.
        nblocks: K, the number of blocks of each map.
        glu: Whether to gate the activation.
        dropout: Probability of dropping an activation.
        layer_norm_eps: Epsilon of the LayerNorm.
        backend: `auto`, `torch` or `triton`, as in `monarch_mlp`.
    """

    sequence_last = False  # as in `DenseMLP`

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        nblocks: int = 4,
        glu: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
        backend: str = "auto",
    ):
        super().__init__()
        self.intermediate_size = intermediate_size
        self.glu = glu
        self.dropout = dropout
        self.backend = backend
        up_size = intermediate_size * (2 if glu else 1)
        self.up_proj = BlockDiagonalLinear(
            hidden_size, up_size, nblocks, bias=False, backend=backend
        )
        self.down_proj = BlockDiagonalLinear(
            intermediate_size, hidden_size, nblocks, backend=backend
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        dropout_p = self.dropout if self.training else 0.0
        y = call_monarch_mlp(
            self.up_proj, self.down_proj, x, self.glu, dropout_p, backend=self.backend
        )
        return add_norm(self.norm, y, x, self.sequence_last, self.backend)


def call_monarch_mlp(
    up_proj: BlockDiagonalLinear,
    down_proj: BlockDiagonalLinear,
    x: Tensor,
    glu: bool,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Compute `m2_plugin.ops.monarch_mlp` with the weights of two modules.

    If a call of the modules may do more than their products (`is_plain`), both are called.
    """
    if is_plain(up_proj, BlockDiagonalLinear) and is_plain(down_proj, BlockDiagonalLinear):
        return monarch_mlp(
            x,
            up_proj.weight,
            down_proj.weight,
            down_proj.bias,
            down_proj.in_features,
            glu=glu,
            dropout_p=dropout_p,
            backend=backend,
        )
    return down_proj(F.dropout(_activate(up_proj(x), glu), dropout_p))
