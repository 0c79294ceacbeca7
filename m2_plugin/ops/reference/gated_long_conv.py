"""The mixer's core in PyTorch. `layers/monarch_mixer.py` has the equation.

Dimension key: B batch, L sequence, D channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from m2_plugin.ops.reference.fft_conv import fft_conv
from m2_plugin.ops.reference.short_conv import short_conv

Map = Callable[[Tensor], Tensor]


def gate_and_convolve(
    projections: Tensor,
    conv: Map,
    u: Tensor,
    residual_conv: Map | None,
    mask: Tensor | None,
    dropout: Map | None = None,
) -> Tensor:
    """Compute the mixer's core from the output of its short convolution.

    Args:
        projections: (B, L, 3D), x1, x2 and v side by side.
        conv: The long convolution between the gates, (B, L, D) to (B, L, D).
        u: (B, L, D), the input of the residual convolution.
        residual_conv: The residual convolution, or None.
        mask: (B, L, 1), 1 at tokens and 0 at padding, or None.
        dropout: A map to apply after the first gate, or None.

    Returns:
        (B, L, D).
    """
    x1, x2, v = projections.chunk(3, dim=-1)
    w = v * x1
    if dropout is not None:
        w = dropout(w)
    if mask is not None:
        w = w * mask
    y = x2 * conv(w)
    if residual_conv is None:
        return y
    return y + residual_conv(u if mask is None else u * mask)


def conv_of_taps(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve x (B, L, D) with taps (D, 2L − 1), lags −(L − 1) … L − 1."""
    length = x.shape[1]
    k_rev = F.pad(taps[:, : length - 1].flip(1), (0, 1))
    return fft_conv(x, taps[:, length - 1 :].t(), k_rev.t())


def gated_long_conv_torch(
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    res_taps: Tensor | None,
    mask: Tensor | None,
    p_bias: Tensor | None = None,
) -> Tensor:
    """Compute `gated_long_conv`; arguments as there. A causal filter has zeros at negative lags."""
    if p_bias is not None:
        p = p + p_bias.to(p.dtype)
    return gate_and_convolve(
        short_conv(p, weight, bias),
        lambda w: conv_of_taps(w, taps),
        p if u is None else u,
        None if res_taps is None else lambda u: conv_of_taps(u, res_taps),
        None if mask is None else mask[..., None],
    )
