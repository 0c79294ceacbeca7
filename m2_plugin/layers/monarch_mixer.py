"""The sequence mixer of M2-BERT: gated long convolutions in place of attention.

Dimension key: B batch, L sequence, D hidden.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2_plugin.layers.add_norm import add_norm
from m2_plugin.layers.long_conv import LongConv, batched_taps, taps_of
from m2_plugin.layers.plain import is_plain
from m2_plugin.ops.backend import autocast_dtype, check_backend, use_long_conv_kernel
from m2_plugin.ops.cast import cast_together
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.hyena_filters import TapsKeeper
from m2_plugin.ops.input_projection import input_projection
from m2_plugin.ops.reference.gated_long_conv import Map, gate_and_convolve
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
                backend=backend,
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

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        taps: Tensor | None = None,
        res_taps: Tensor | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            u: (B, L, D).
            mask: (B, L, 1) of u's dtype, 1 at tokens and 0 at padding. It keeps padding out of the
                long convolutions, so that outputs do not depend on the amount of padding.
            taps: (D, 2L − 1), what `long_conv.taps(L)` returns, from a caller that computed it
                together with others (`taps_of_mixers`).
            res_taps: The same of `residual_conv`.

        Raises:
            ValueError: If the sequence is longer than the filters.
            RuntimeError: If `backend` is `triton` and no kernel can run.
        """
        use_kernel = self._use_kernel(u)
        if isinstance(self.norm, nn.Identity):
            u = self.norm(u)
        else:
            u = add_norm(self.norm, u, None, sequence_last=use_kernel, backend=self.backend)
        if use_kernel:
            return self._fused(u, mask, taps, res_taps)
        y = gate_and_convolve(
            self.short_conv(self.project(u)),
            self.long_conv,
            u,
            self.residual_conv,
            mask,
            self.dropout,
        )
        return self.out_proj(self.dropout(y))

    def resume(
        self, u: Tensor, mask: Tensor | None = None, past: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the next S positions of texts whose first L − S positions are known.

        The result is that of `forward` at the last S of L positions, up to rounding. A filter has
        no finite state, so the state is the convolutions' inputs so far. One new position costs
        O(L·D) for each text, beside the projections; more of them cost a whole convolution.

        Args:
            u: (B, S, D).
            mask: (B, S, 1) of u's dtype, 1 at tokens and 0 at padding, or None.
            past: The state that the last call returned, or nothing if these positions are the
                first.

        Returns:
            The output (B, S, D), and the state: the inputs of the long convolution (B, D, L), the
            last two of the short one (B, 2, 3D), and those of the residual one (B, D, L), if there
            is one.

        Raises:
            ValueError: If the mixer is bidirectional, or L exceeds the length of the filters.
        """
        if self.bidirectional:
            raise ValueError(
                "a bidirectional mixer cannot resume: later positions change earlier ones"
            )
        u = self.norm(u)
        p = self.project(u)
        length = p.shape[1]
        w, before, *residual = past or (None, None, None)
        if before is not None:
            p = torch.cat([before, p], dim=1)
        state: list[Tensor] = []

        def continued(conv: LongConv, seen: Tensor | None) -> Map:
            def convolve(x: Tensor) -> Tensor:
                x = x.transpose(1, 2)
                state.append(x if seen is None else torch.cat([seen, x], dim=2))
                if length == 1 and is_plain(conv, LongConv):
                    return conv.last(state[-1])[:, None]
                y: Tensor = conv(state[-1].transpose(1, 2))
                return y[:, -length:]

            return convolve

        y = gate_and_convolve(
            self.short_conv(p)[:, -length:],
            continued(self.long_conv, w),
            u,
            None if self.residual_conv is None else continued(self.residual_conv, *residual),
            mask,
            self.dropout,
        )
        state.insert(1, p[:, 1 - self.short_conv.weight.shape[1] :].clone())  # not a view of all
        return self.out_proj(self.dropout(y)), tuple(state)

    @property
    def long_convs(self) -> list[LongConv]:
        """The long convolutions: one, or two with the residual one."""
        residual = self.residual_conv
        return [self.long_conv] if residual is None else [self.long_conv, residual]

    def _fused(
        self, u: Tensor, mask: Tensor | None, taps: Tensor | None, res_taps: Tensor | None
    ) -> Tensor:
        """Compute all with kernels: the projections are matrix products without copies or sums."""
        residual = self.residual_conv
        if taps is None:
            taps, *rest = taps_of(self.long_convs, u.shape[1])
            res_taps = rest[0] if rest else None
        weight, bias = self.short_conv.weight, self.short_conv.bias
        u = u.to(autocast_dtype(u))  # once, for both readers
        reads_in, reads_out = (is_plain(m, nn.Linear) for m in (self.in_proj, self.out_proj))
        weights = [
            self.in_proj.weight if reads_in else None,
            self.out_proj.weight if reads_out else None,
            self.out_proj.bias if reads_out else None,
        ]
        if torch.is_autocast_enabled(u.device.type):  # it would cast each by itself
            weights = cast_together(weights, u.dtype)
        in_weight, out_weight, out_bias = weights
        if in_weight is not None:
            p, u = input_projection(u, in_weight.to(u.dtype))
            p_bias = self.in_proj.bias
        else:
            p, p_bias = self.in_proj(u), None
        y = gated_long_conv(
            p,
            weight,
            weight.new_zeros(len(weight)) if bias is None else bias,
            taps,
            None if residual is None else u,
            res_taps,
            None if mask is None else mask.squeeze(-1),
            causal=not self.bidirectional,
            backend=self.backend,
            p_bias=p_bias,
        )
        if out_weight is None:
            return self.out_proj(y)
        # As a matrix, so that the product adds the bias: for three dimensions that are not
        # contiguous PyTorch adds it in a pass of its own.
        rows = F.linear(y.flatten(0, 1), out_weight, out_bias)
        return rows.view(*y.shape[:2], -1)

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
        residual = self.residual_conv
        return (
            is_plain(self.short_conv, ShortConv)
            and is_plain(self.long_conv, LongConv)
            and (residual is None or is_plain(residual, LongConv))
        )


def taps_of_mixers(
    mixers: Sequence[nn.Module], x: Tensor, keeper: TapsKeeper | None = None, group: int = 0
) -> list[list[Tensor]] | None:
    """Compute the taps of several mixers by one launch of a kernel.

    Args:
        mixers: Modules that will be called with inputs like `x`.
        x: (B, L, D), which says where and how the mixers will compute.
        keeper: Where to keep the taps in evaluation without gradients; see `hyena_filters`.
        group: Tells these mixers from others of `keeper`.

    Returns:
        For each mixer the arguments `taps` and, if it has a residual convolution, `res_taps`. None
        if one of the modules is something else than a plain mixer of equal settings, computes
        without kernels, or has filters that must be called.

    Raises:
        ValueError: If the sequence is longer than the filters.
    """
    convs: list[LongConv] = []
    for mixer in mixers:
        if not (isinstance(mixer, MonarchMixer) and is_plain(mixer, MonarchMixer)):
            return None
        if not mixer._use_kernel(x):
            return None
        convs += mixer.long_convs
    taps = batched_taps(convs, x.shape[1], keeper, group)
    if taps is None:
        return None
    number = len(convs) // len(mixers)
    return [taps[i : i + number] for i in range(0, len(taps), number)]
