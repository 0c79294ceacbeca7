"""Self-attention with linear biases (ALiBi): HazyResearch/m2's baseline without Monarch mixers.

Dimension key: B batch, L sequence, D hidden, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head (ALiBi, arXiv 2108.12409).

    For a power of two they are a geometric sequence. For other numbers they are the slopes of the
    next smaller power of two, followed by every second slope of the next larger one.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[::2][: num_heads - power]
    return slopes


class AlibiAttention(nn.Module):
    """Bidirectional multi-head attention with the bias −slope·|i − j|, post-norm (MosaicBERT).

    `LayerNorm(dropout(W_o · attention(u)) + u)`

    Args:
        hidden_size: D.
        num_heads: H; it must divide D.
        dropout: Probability of dropping an output feature.
        attention_dropout: Probability of dropping an attention weight.
        layer_norm_eps: Epsilon of the LayerNorm.

    Raises:
        ValueError: If `num_heads` does not divide `hidden_size`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size = {hidden_size}, not {num_heads}"
            )
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def bias(self, length: int, mask: Tensor | None, like: Tensor) -> Tensor:
        """Return the bias (1 or B, H, L, L): −slope·|i − j|, and the lowest number at padding."""
        position = torch.arange(length, device=like.device)
        distance = (position.unsqueeze(0) - position.unsqueeze(1)).abs().to(like.dtype)
        slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=like.dtype, device=like.device)
        bias = (-slopes[:, None, None] * distance)[None]
        if mask is not None:
            padding = mask.squeeze(-1).unflatten(0, (-1, 1, 1)) == 0  # (B, 1, 1, L)
            bias = bias.masked_fill(padding, torch.finfo(like.dtype).min)
        return bias

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D); mask (B, L, 1) is 1 at tokens and 0 at padding."""
        length = u.shape[1]
        qkv = self.qkv_proj(u).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.bias(length, mask, q),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.norm(self.dropout(self.out_proj(attention.transpose(1, 2).flatten(2))) + u)
