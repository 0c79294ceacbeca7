"""The mixer's core: a short convolution, gates and long convolutions.

`layers/monarch_mixer.py` has the equation.

Dimension key: B batch, L sequence, D channels.
"""

import torch
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_long_conv_kernel
from m2_plugin.ops.reference.gated_long_conv import gated_long_conv_torch


def two_sided_taps(k_fwd: Tensor, k_rev: Tensor | None, skip: Tensor) -> Tensor:
    """Order a filter's taps by lag, −(L − 1) … L − 1, and add the skip at lag 0.

    Args:
        k_fwd: (L, D), lags 0 … L − 1, as in `fft_conv`.
        k_rev: (L, D), lags −1 … −L, or None for a causal filter.
        skip: (D,).

    Returns:
        (D, 2L − 1), contiguous.
    """
    length = k_fwd.shape[0]
    before = torch.zeros_like(k_fwd) if k_rev is None else k_rev.flip(0)
    taps = torch.cat([before, k_fwd])  # lags −L … L − 1
    taps[length] += skip
    return taps.t().narrow(1, 1, 2 * length - 1).contiguous()


def gated_long_conv(
    p: Tensor,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    u: Tensor | None = None,
    res_taps: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    backend: str = "auto",
    p_bias: Tensor | None = None,
) -> Tensor:
    """Compute what `MonarchMixer` does between its two projections, without dropout.

    Args:
        p: (B, L, 3D), the output of the input projection; fastest if positions are contiguous in
            memory.
        weight: (3D, 3), of the short convolution; the last tap is for the present position.
        bias: (3D,), of the short convolution.
        taps: (D, 2L − 1), the gated filter from lag −(L − 1) to L − 1, its skip in the middle.
        u: (B, L, D), the input of the residual convolution, or None for no such convolution.
        res_taps: (D, 2L − 1), the residual filter; None if u is None.
        mask: (B, L), 1 at tokens and 0 at padding, or None.
        causal: Whether all taps at negative lags are zero. This halves the kernel's work.
        backend: `auto` (Triton kernels on CUDA except for long fp32 sequences, else PyTorch),
            `torch` or `triton`.
        p_bias: (3D,), a bias of the input projection that is not in `p` yet, or None. The kernels
            add it where they read `p`, which saves a pass over memory.

    Returns:
        (B, L, D) in the dtype of `p`.

    Raises:
        ValueError: If shapes do not fit, or one of `u` and `res_taps` is missing.
        RuntimeError: If `backend` is `triton` and it cannot run on `p`.
    """
    length, channels = p.shape[1], p.shape[2] // 3
    if (u is None) != (res_taps is None):
        raise ValueError("u and res_taps belong together: give both or neither")
    for name, k in (("taps", taps), ("res_taps", res_taps)):
        if k is not None and k.shape != (channels, 2 * length - 1):
            raise ValueError(
                f"{name} has shape {tuple(k.shape)}, but p of shape {tuple(p.shape)} needs "
                f"{(channels, 2 * length - 1)}"
            )
    if use_long_conv_kernel(backend, p) and p.numel():
        from m2_plugin.ops.kernels.gated_long_conv import gated_long_conv_op

        dtype = autocast_dtype(p)
        return gated_long_conv_op(
            p.to(dtype),
            None if u is None else u.to(dtype),
            weight.float(),
            bias.float(),
            None if p_bias is None else p_bias.float(),
            taps.float(),
            None if res_taps is None else res_taps.float(),
            None if mask is None else mask.to(dtype).contiguous(),
            causal,
            backend == "triton",
        )
    return gated_long_conv_torch(p, u, weight, bias, taps, res_taps, mask, p_bias)
