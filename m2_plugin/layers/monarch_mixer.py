"""The sequence mixer of M2-BERT: gated long convolutions in place of attention.

Dimension key: B batch, L sequence, D hidden.
"""

import math

import torch
from torch import Tensor, nn

from m2_plugin.layers.long_conv import LongConv
from m2_plugin.ops.backend import check_backend, use_long_conv_kernel
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.reference.gated_long_conv import gate_and_convolve
from m2_plugin.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """Causal depthwise convolution, initialised as torch's Conv1d.

    Args:
        channels: size of the last dimension of the input, (B, L, channels).
        width: number of taps.
    """

    def __init__(self, channels: int, width: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias from U(±1/√width), Conv1d's default for depthwise kernels."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:  # the host can take it away
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, C) to (B, L, C)."""
        return short_conv(x, self.weight, self.bias)


class MonarchMixer(nn.Module):
    """Mixes along the sequence by gated long convolutions (arXiv 2310.12109, section 4.1).

    ``x1, x2, v = short_conv(W_in·u)``; ``y = W_out · (x2 ⊙ conv(v ⊙ x1) + conv'(u))``.

    There is no residual connection round the mixer: the second convolution is the residual path.

    Args:
        hidden_size: D.
        max_length: the longest sequence.
        bidirectional: let the long convolutions see what follows. The short one is causal always.
        residual_long_conv: add the second convolution, conv'(u).
        pre_norm: apply a LayerNorm to u first (the reference's ``hyena_training_additions``); the
            residual convolution then sees the normed u.
        dropout: probability after the first gate and before the output projection.
        filter_order: width of the filters' MLPs.
        filter_emb_dim: positional features of the filters, odd.
        filter_w: initial frequency of the filters' sines.
        filter_w_mod: constant factor on these frequencies.
        backend: ``auto`` (a Triton kernel on CUDA, else PyTorch), ``torch`` or ``triton``.

    Raises:
        ValueError: if ``backend`` is unknown.
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
        """Maps (B, L, D) to (B, L, 3D), with the sequence last in memory.

        The product can come out transposed, and everything up to the output projection then runs
        along contiguous sequences, as FFT and kernel want them. What has replaced the projection,
        a quantised or an adapted layer, is called as it is.
        """
        if type(self.in_proj) is not nn.Linear:
            return self.in_proj(u)
        weight, bias = self.in_proj.weight, self.in_proj.bias
        columns = u.flatten(0, 1).t()
        p = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return p.unflatten(1, u.shape[:2]).permute(1, 2, 0)  # from (3D, B·L)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D).

        Args:
            u: (B, L, D).
            mask: (B, L, 1) of u's dtype, 1 at tokens and 0 at padding: keeps padding out of the
                long convolutions, so that an output does not depend on how much of it follows.
        """
        u = self.norm(u)
        if self._use_kernel(u):
            length = u.shape[1]
            residual = self.residual_conv
            weight, bias = self.short_conv.weight, self.short_conv.bias
            y = gated_long_conv(
                self.project(u),
                weight,
                weight.new_zeros(len(weight)) if bias is None else bias,
                self.long_conv.taps(length),
                None if residual is None else u,
                None if residual is None else residual.taps(length),
                None if mask is None else mask.squeeze(-1),
                causal=not self.bidirectional,
                backend=self.backend,
            )
            return self.out_proj(y)
        p = self.short_conv(self.project(u))
        y = gate_and_convolve(p, self.long_conv, u, self.residual_conv, mask, self.dropout)
        return self.out_proj(self.dropout(y))

    def _use_kernel(self, u: Tensor) -> bool:
        if self.training and self.dropout.p > 0:
            if self.backend == "triton":
                raise RuntimeError(
                    "backend 'triton' has no dropout in the mixer: set mixer_dropout_prob to 0, or "
                    "backend to 'auto', which trains in PyTorch then"
                )
            return False
        return use_long_conv_kernel(self.backend, u)
