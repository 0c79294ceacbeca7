"""The sequence mixer of M2-BERT: gated long convolutions in place of attention.

Dimension key: B batch, L sequence, D hidden.
"""

import math

import torch
from torch import Tensor, nn

from m2_plugin.layers.long_conv import LongConv
from m2_plugin.layers.plain import is_plain
from m2_plugin.ops.backend import check_backend, use_long_conv_kernel
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.reference.gated_long_conv import gate_and_convolve
from m2_plugin.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """Causal depthwise convolution, initialised like PyTorch's Conv1d.

    Args:
        channels: Size of the last dimension of the input, (B, L, channels).
        width: Number of taps.
    """

    def __init__(self, channels: int, width: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(±1/√width), Conv1d's default for depthwise kernels."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:  # llm-foundry can remove it
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C)."""
        return short_conv(x, self.weight, self.bias)


class MonarchMixer(nn.Module):
    """Mixes the sequence with gated long convolutions (arXiv 2310.12109, section 4.1).

    With u normed if `pre_norm`, and all products elementwise:

        x1, x2, v = short_conv(W_in · u)             thirds of a causal convolution, width 3
        w = mask · dropout(v · x1)
        y = x2 · (k ∗ w + skip · w)                  LongConv, gated on both sides
            + (k' ∗ (mask · u) + skip' · mask · u)   the residual LongConv, if there is one
        output = W_out · dropout(y)

    The mixer has no residual connection: the second convolution takes its place.

    Args:
        hidden_size: D.
        max_length: The longest sequence.
        bidirectional: Whether the long convolutions see later positions. The short one never does.
        residual_long_conv: Whether to add the second long convolution.
        pre_norm: Whether to apply a LayerNorm to u first (`hyena_training_additions` in
            HazyResearch/m2). The residual convolution then also sees the normed u.
        dropout: Probability of dropping a value, after the first gate and before `out_proj`.
        filter_order: Width of the filters' MLPs.
        filter_emb_dim: Number of positional features of the filters; odd.
        filter_w: Initial frequency of the filters' sines.
        filter_w_mod: Constant factor on these frequencies.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`. While hooks
            wait for a call of a convolution (as offloading installs them), PyTorch computes.

    Raises:
        ValueError: If `backend` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        max_length: int,
        bidirectional: bool = True,
        residual_long_conv: bool = True,
        pre_norm: bool = False,
        dropout: float = 0.0,
        filter_order: int = 128,
        filter_emb_dim: int = 5,
        filter_w: float = 10.0,
        filter_w_mod: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        check_backend(backend)

        def long_conv() -> LongConv:
            return LongConv(
                hidden_size,
                max_length,
                emb_dim=filter_emb_dim,
                order=filter_order,
                w=filter_w,
                w_mod=filter_w_mod,
                bidirectional=bidirectional,
            )

        self.bidirectional = bidirectional
        self.backend = backend
        self.norm = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.short_conv = ShortConv(3 * hidden_size)
        self.long_conv = long_conv()
        self.residual_conv = long_conv() if residual_long_conv else None
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def project(self, u: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, 3D), with positions contiguous in memory.

        The product is computed transposed, so that FFTs and kernels get contiguous sequences
        without a copy. If a call of the projection may do more than its product (quantised, with
        adapters, with hooks), the projection is called.
        """
        if not is_plain(self.in_proj, nn.Linear):
            return self.in_proj(u)
        weight, bias = self.in_proj.weight, self.in_proj.bias
        columns = u.flatten(0, 1).t()
        p = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return p.unflatten(1, u.shape[:2]).permute(1, 2, 0)  # from (3D, B·L)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            u: (B, L, D).
            mask: (B, L, 1) of u's dtype, 1 at tokens and 0 at padding. It keeps padding out of the
                long convolutions, so that outputs do not depend on the amount of padding.

        Raises:
            ValueError: If the sequence is longer than the filters.
            RuntimeError: If `backend` is `triton` and no kernel can run.
        """
        u = self.norm(u)
        use_kernel = self._use_kernel(u)
        p = self.project(u)
        if use_kernel:
            return self.out_proj(self._fused(p, u, mask))
        y = gate_and_convolve(
            self.short_conv(p), self.long_conv, u, self.residual_conv, mask, self.dropout
        )
        return self.out_proj(self.dropout(y))

    def _fused(self, p: Tensor, u: Tensor, mask: Tensor | None) -> Tensor:
        """Compute everything between the two projections with kernels."""
        length, residual = u.shape[1], self.residual_conv
        weight, bias = self.short_conv.weight, self.short_conv.bias
        return gated_long_conv(
            p,
            weight,
            weight.new_zeros(len(weight)) if bias is None else bias,
            self.long_conv.taps(length),
            None if residual is None else u,
            None if residual is None else residual.taps(length),
            None if mask is None else mask.squeeze(-1),
            causal=not self.bidirectional,
            backend=self.backend,
        )

    def _use_kernel(self, u: Tensor) -> bool:
        if self.training and self.dropout.p > 0:
            if self.backend == "triton":
                raise RuntimeError(
                    "backend 'triton' cannot train with dropout in the mixer: set "
                    "mixer_dropout_prob to 0, or backend to 'auto', which then trains in PyTorch"
                )
            return False
        return use_long_conv_kernel(self.backend, u) and self._kernel_may_read()

    def _kernel_may_read(self) -> bool:
        """Return whether the modules whose weights the kernels take need not be called."""
        convs = self.long_conv, self.residual_conv
        return is_plain(self.short_conv, ShortConv) and all(
            conv is None or is_plain(conv, LongConv) for conv in convs
        )
