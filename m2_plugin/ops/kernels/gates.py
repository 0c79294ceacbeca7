"""The parts of the mixer around its long convolutions, for both kinds of kernels.

Dimension key: B batch, L sequence, D channels. Positions are contiguous in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.launch import empty_sequence_last, strides, tile


class Inputs(NamedTuple):
    """The tensors of `gated_long_conv_op`."""

    p: Tensor
    u: Tensor | None
    weight: Tensor
    bias: Tensor
    taps: Tensor
    res_taps: Tensor | None
    mask: Tensor | None


@triton.jit
def short_conv(ptr, weight_ptr, bias_ptr, channel, rows, cols, length, mask):
    """Convolve one channel causally at (rows, cols), fp32. `ptr` points to its first sequence."""
    w = weight_ptr + channel * 3
    at = ptr + rows + cols
    y = tl.load(w + 2).to(tl.float32) * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(w + 1).to(tl.float32) * tl.load(at - 1, mask=mask & (cols > 0), other=0.0)
    y += tl.load(w).to(tl.float32) * tl.load(at - 2, mask=mask & (cols > 1), other=0.0)
    return y + tl.load(bias_ptr + channel).to(tl.float32)


@triton.jit
def gated(
    p_ptr, weight_ptr, bias_ptr, mask_ptr, d, channels, stride_pc,
    rows, batch, cols, length, mask, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Compute the input w of the gated convolution in fp32; 0 where `mask` is false."""
    x1 = short_conv(p_ptr + d * stride_pc, weight_ptr, bias_ptr, d, rows, cols, length, mask)
    v = 2 * channels + d
    w = x1 * short_conv(p_ptr + v * stride_pc, weight_ptr, bias_ptr, v, rows, cols, length, mask)
    if HAS_MASK:
        w *= tl.load(mask_ptr + batch * length + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, w, 0.0)


@triton.jit
def unmasked(ptr, mask_ptr, rows, batch, cols, length, mask, HAS_MASK: tl.constexpr):
    """Load a tile of a sequence, 0 at padding."""
    x = tl.load(ptr + rows + cols, mask=mask, other=0.0)
    if HAS_MASK:
        x *= tl.load(mask_ptr + batch * length + cols, mask=mask, other=0.0)
    return x


@triton.jit
def short_conv_grad_kernel(
    grad_ptr,
    p_ptr,
    weight_ptr,
    grad_p_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    batch_size,
    length,
    stride_pb,
    stride_pc,
    stride_ob,
    stride_oc,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute one channel's gradients of the short convolution; grad is (3D, B, L)."""
    c = tl.program_id(0).to(tl.int64)
    w0 = tl.load(weight_ptr + c * 3).to(tl.float32)
    w1 = tl.load(weight_ptr + c * 3 + 1).to(tl.float32)
    w2 = tl.load(weight_ptr + c * 3 + 2).to(tl.float32)
    sum_b = tl.zeros((BATCH, POSITIONS), tl.float32)
    sum_0 = tl.zeros((BATCH, POSITIONS), tl.float32)
    sum_1 = tl.zeros((BATCH, POSITIONS), tl.float32)
    sum_2 = tl.zeros((BATCH, POSITIONS), tl.float32)
    for first in range(0, batch_size, BATCH):
        batch = (first + tl.arange(0, BATCH)[:, None]).to(tl.int64)
        for start in range(0, length, POSITIONS):
            t = start + tl.arange(0, POSITIONS)[None, :]
            mask = (batch < batch_size) & (t < length)
            at = grad_ptr + (c * batch_size + batch) * length + t
            grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            grad_p = w2 * grad
            grad_p += w1 * tl.load(at + 1, mask=mask & (t + 1 < length), other=0.0)
            grad_p += w0 * tl.load(at + 2, mask=mask & (t + 2 < length), other=0.0)
            out = grad_p_ptr + c * stride_oc + batch * stride_ob + t
            tl.store(out, grad_p.to(grad_p_ptr.dtype.element_ty), mask=mask)
            p = p_ptr + c * stride_pc + batch * stride_pb + t
            sum_b += grad
            sum_2 += grad * tl.load(p, mask=mask, other=0.0)
            sum_1 += grad * tl.load(p - 1, mask=mask & (t > 0), other=0.0)
            sum_0 += grad * tl.load(p - 2, mask=mask & (t > 1), other=0.0)
    tl.store(grad_bias_ptr + c, tl.sum(sum_b))
    tl.store(grad_weight_ptr + c * 3, tl.sum(sum_0))
    tl.store(grad_weight_ptr + c * 3 + 1, tl.sum(sum_1))
    tl.store(grad_weight_ptr + c * 3 + 2, tl.sum(sum_2))


def short_conv_grad(grad: Tensor, p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of p, weight and bias of the short convolution.

    Args:
        grad: (3D, B, L), contiguous.
        p: (B, L, 3D), positions contiguous in memory.
        weight: (3D, 3).
    """
    batch_size, length, channels = p.shape
    grad_p = empty_sequence_last(p, channels)
    grad_weight = torch.empty(channels, 3, dtype=torch.float32, device=p.device)
    grad_bias = torch.empty(channels, dtype=torch.float32, device=p.device)
    short_conv_grad_kernel[(channels,)](
        grad,
        p,
        weight,
        grad_p,
        grad_weight,
        grad_bias,
        batch_size,
        length,
        *strides(p),
        *strides(grad_p),
        BATCH=tile(batch_size, 16),
        POSITIONS=tile(length, 128),
        num_warps=4,
    )
    return grad_p, grad_weight, grad_bias
