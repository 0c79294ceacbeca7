"""Long convolution by FFT: per-channel filters as long as the sequence, causal or bidirectional.

Dimension key: B batch, L sequence, D channels, N circular length (N ≥ 2L − 1).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fft_conv_reference(u: Tensor, k_fwd: Tensor, k_rev: Tensor | None = None) -> Tensor:
    """Convolve by a sum over the lags: the definition that `fft_conv` is tested against.

    `y[t] = Σ_{s≤t} k_fwd[t−s]·u[s] + Σ_{s>t} k_rev[s−t−1]·u[s]`; shapes as in `fft_conv`.
    """
    length = u.shape[1]
    y = torch.zeros_like(u)
    for lag in range(length):
        y[:, lag:] += k_fwd[lag] * u[:, : length - lag]
        if k_rev is not None and lag:
            y[:, : length - lag] += k_rev[lag - 1] * u[:, lag:]
    return y


def circular_filter(k_fwd: Tensor, k_rev: Tensor | None) -> Tensor:
    """Put both directions on one circle: lag t at index t, lag −t at index N − t.

    Args:
        k_fwd: (L, D), lags 0 … L−1.
        k_rev: (L, D), lags −1 … −L, or None. The last lag is longer than any distance: unused.

    Returns:
        (N, D) with N = 2L: if `torch.fft` is fast at L, it is at 2L.
    """
    length = k_fwd.shape[0]
    if k_rev is None:
        return F.pad(k_fwd, (0, 0, 0, length))
    k = torch.cat([k_fwd, k_rev.flip(0)])
    k[length].zero_()
    return k


def _rfft(x: Tensor, n: int) -> Tensor:
    """Transform (B, L, D) to (D, B, n/2 + 1). Padding makes sequences contiguous by a copy."""
    return torch.fft.rfft(x.permute(2, 0, 1), n=n)


def _irfft(x: Tensor, n: int, length: int) -> Tensor:
    """Transform (D, B, n/2 + 1) to (B, length, D); the sequence stays contiguous in memory."""
    return torch.fft.irfft(x, n=n).narrow(-1, 0, length).permute(1, 2, 0)


def spectral_conv(u: Tensor, spectrum: Tensor) -> Tensor:
    """Convolve u (B, L, D), fp32 or fp64, with the result of `filter_spectrum`.

    For inference, where the same filters serve many inputs. The filters get no gradient.
    """
    n = 2 * (spectrum.shape[-1] - 1)
    return _irfft(_rfft(u, n).mul_(spectrum), n, u.shape[1])


def _conv(u: Tensor, k: Tensor) -> Tensor:
    return spectral_conv(u, _rfft(k[None], k.shape[0]))


def _correlate(
    grad: Tensor, u: Tensor, k: Tensor, for_u: bool, for_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of u and k, or None for one that is not asked for."""
    n = k.shape[0]
    grad_f = _rfft(grad, n)
    grad_u = grad_k = None
    if for_k:
        cross = _rfft(u, n).conj_physical_().mul_(grad_f)
        grad_k = _irfft(cross.sum(1, keepdim=True), n, n)[0]
    if for_u:
        grad_u = _irfft(grad_f.mul_(_rfft(k[None], n).conj()), n, u.shape[1])
    return grad_u, grad_k


class FFTConvFunction(torch.autograd.Function):
    """Circular convolution with one-sided spectra in both directions.

    The backward pass of `torch.fft.rfft` makes a full complex FFT and would keep both spectra. This
    one keeps only the inputs, which the layer holds anyway, and transforms them again.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor) -> Tensor:
        """Convolve u (B, L, D) with k (N, D)."""
        ctx.save_for_backward(u, k)
        return _conv(u, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the correlations of the gradient with k (for u) and with u (for k)."""
        return _correlate(grads[0], *ctx.saved_tensors, *ctx.needs_input_grad)


# For torch.compile the convolution is one opaque op: Inductor has no complex numbers, and expects
# other strides of an FFT's output than it has. In eager mode the Function is quicker to call.


def _dense(x: Tensor) -> Tensor:
    """Copy (B, L, D) so that its strides are known in advance: contiguous as (B, D, L)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("m2_plugin::fft_conv", mutates_args=())
def fft_conv_op(u: Tensor, k: Tensor) -> Tensor:
    """Convolve u (B, L, D) with k (N, D), both fp32 or fp64."""
    return _dense(_conv(u, k))


@fft_conv_op.register_fake
def _(u: Tensor, k: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[2], u.shape[1]).transpose(1, 2)


@torch.library.custom_op("m2_plugin::fft_conv_backward", mutates_args=())
def fft_conv_backward_op(grad: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and k."""
    grad_u, grad_k = _correlate(grad, u, k, True, True)
    assert grad_u is not None and grad_k is not None
    return _dense(grad_u), grad_k.contiguous()


@fft_conv_backward_op.register_fake
def _(grad: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape[0], u.shape[2], u.shape[1]).transpose(1, 2), k.new_empty(k.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _fft_conv_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = fft_conv_backward_op(grad, *ctx.saved_tensors)
    return grads


fft_conv_op.register_autograd(_fft_conv_autograd, setup_context=_save_inputs)


def filter_spectrum(k_fwd: Tensor, k_rev: Tensor | None, skip: Tensor | None) -> Tensor:
    """Transform filters once for many calls of `spectral_conv`.

    Args:
        k_fwd: (L, D), fp32 or fp64, as in `fft_conv`.
        k_rev: (L, D) or None.
        skip: (D,) or None.

    Returns:
        (D, 1, L + 1), complex.
    """
    k = _circular_filter_with_skip(k_fwd, k_rev, skip)
    return _rfft(k[None], k.shape[0])


def _circular_filter_with_skip(k_fwd: Tensor, k_rev: Tensor | None, skip: Tensor | None) -> Tensor:
    k = circular_filter(k_fwd, k_rev)
    if skip is not None:
        k[0] += skip  # the tap at lag 0
    return k


def fft_conv(
    u: Tensor, k_fwd: Tensor, k_rev: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """Convolve every channel with its own filter (arXiv 2310.12109, section 4.1).

    `y[t] = Σ_{s≤t} k_fwd[t−s]·u[s] + Σ_{s>t} k_rev[s−t−1]·u[s] + skip·u[t]`

    Args:
        u: (B, L, D), fp16, bf16, fp32 or fp64; computed in at least fp32.
        k_fwd: (L, D), the taps at lags 0 … L−1.
        k_rev: (L, D), the taps at lags −1 … −L, or None for a causal convolution.
        skip: (D,), or None.

    Returns:
        (B, L, D) in the dtype of `u`.

    Raises:
        ValueError: If a filter's shape is not (L, D).
    """
    for name, k in (("k_fwd", k_fwd), ("k_rev", k_rev)):
        if k is not None and k.shape != u.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(k.shape)}, but u needs {tuple(u.shape[1:])}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    k_rev = None if k_rev is None else k_rev.to(dtype)
    k = _circular_filter_with_skip(k_fwd.to(dtype), k_rev, skip)
    if torch.jit.is_tracing():
        conv: Any = _conv  # a trace cannot be saved with a Function in it
    else:
        conv = fft_conv_op if torch.compiler.is_compiling() else FFTConvFunction.apply
    return conv(u.to(dtype), k).to(u.dtype)
