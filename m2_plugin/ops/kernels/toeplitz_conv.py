"""Triton kernels of the mixer's core for short sequences: long convolutions as Toeplitz products.

Dimension key: B batch, L sequence, D channels, T = 2L − 1 taps of a two-sided filter.

`ops/README.md` explains the method. One program computes one channel: it builds tiles of the
Toeplitz matrices from the taps and keeps everything between p, u and y in registers. Positions are
contiguous in memory, as the input projection can write them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.gates import Inputs, gated, short_conv, short_conv_grad, unmasked
from m2_plugin.ops.kernels.launch import (
    dot_precision,
    empty_sequence_last,
    sequence_last,
    strides,
    tile,
)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one launch."""

    batch: int
    positions: int
    num_warps: int
    num_stages: int


# By bytes per element, and by whether 16 divides the length; if not, addresses take more registers.
# These are the largest tiles that spill no registers (`tests/ops/aot.py`).
CONFIGS = {
    (2, True): Config(batch=32, positions=64, num_warps=8, num_stages=1),
    (2, False): Config(batch=32, positions=32, num_warps=8, num_stages=1),
    (4, True): Config(batch=16, positions=32, num_warps=4, num_stages=1),
    (4, False): Config(batch=16, positions=16, num_warps=4, num_stages=1),
}
# Batch rows for which one program of the forward pass uses the same Toeplitz tiles.
BATCH_PER_PROGRAM = 256
# Scratch memory for the diagonals of tiles (gradient of the taps); channels use it in turn.
SCRATCH_BYTES = 64 << 20


@triton.jit
def _toeplitz(taps_ptr, lags, length, mask):
    """Load the taps at a tile of lags, from −(L − 1) to L − 1."""
    inside = mask & (lags < length) & (lags > -length)
    return tl.load(taps_ptr + length - 1 + lags, mask=inside, other=0.0)


@triton.jit
def toeplitz_forward_kernel(
    p_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    taps_ptr,
    res_taps_ptr,
    mask_ptr,
    y_ptr,
    batch_size,
    length,
    channels,
    stride_pb,
    stride_pc,
    stride_ub,
    stride_uc,
    stride_yb,
    stride_yc,
    RESIDUAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    BATCH_TILES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute y for one channel and a tile of positions t."""
    d = tl.program_id(0).to(tl.int64)
    first_t = tl.program_id(1) * POSITIONS
    t = first_t + tl.arange(0, POSITIONS)[None, :]
    offsets = tl.arange(0, POSITIONS)
    dtype = p_ptr.dtype.element_ty
    taps = taps_ptr + d * (2 * length - 1)
    res_taps = res_taps_ptr + d * (2 * length - 1)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_t + POSITIONS)
    for i in range(BATCH_TILES):
        first = (tl.program_id(2) * BATCH_TILES + i) * BATCH
        batch = (first + tl.arange(0, BATCH)[:, None]).to(tl.int64)
        in_batch = batch < batch_size
        acc = tl.zeros((BATCH, POSITIONS), tl.float32)
        res = tl.zeros((BATCH, POSITIONS), tl.float32)
        for start in range(0, end, POSITIONS):
            s = start + offsets
            cols = s[None, :]
            mask = in_batch & (cols < length)
            w = gated(
                p_ptr, weight_ptr, bias_ptr, mask_ptr, d, channels, stride_pc,
                batch * stride_pb, batch, cols, length, mask, HAS_MASK,
            )  # fmt: skip
            lags = t - s[:, None]
            inside = (s[:, None] < length) & (t < length)
            matrix = _toeplitz(taps, lags, length, inside)
            acc = tl.dot(w.to(dtype), matrix, acc, input_precision=PRECISION)
            if RESIDUAL:
                u = unmasked(
                    u_ptr + d * stride_uc, mask_ptr, batch * stride_ub, batch, cols, length, mask,
                    HAS_MASK,
                )  # fmt: skip
                matrix = _toeplitz(res_taps, lags, length, inside)
                res = tl.dot(u, matrix, res, input_precision=PRECISION)
        mask = in_batch & (t < length)
        x2 = channels + d
        acc *= short_conv(
            p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, x2, batch * stride_pb, t, length, mask
        )
        tl.store(y_ptr + d * stride_yc + batch * stride_yb + t, (acc + res).to(dtype), mask=mask)


@triton.jit
def toeplitz_backward_kernel(
    grad_ptr,
    p_ptr,
    weight_ptr,
    bias_ptr,
    taps_ptr,
    res_taps_ptr,
    mask_ptr,
    grad_short_ptr,
    grad_u_ptr,
    batch_size,
    length,
    channels,
    stride_gb,
    stride_gc,
    stride_pb,
    stride_pc,
    stride_ub,
    stride_uc,
    RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the gradients of u and of x1, x2 and v for a tile of positions r.

    With g = grad · x2: dx2 = grad · (taps ∗ w), dw[r] = Σ_t taps[t − r] · g[t], dx1 = dw · v and
    dv = dw · x1. du is computed like dw, from grad and the residual taps.
    """
    d = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    offsets = tl.arange(0, POSITIONS)
    batch = (tl.program_id(2) * BATCH + tl.arange(0, BATCH)[:, None]).to(tl.int64)
    in_batch = batch < batch_size
    dtype = p_ptr.dtype.element_ty
    taps = taps_ptr + d * (2 * length - 1)
    res_taps = res_taps_ptr + d * (2 * length - 1)
    p_rows = batch * stride_pb
    x2 = channels + d
    v = 2 * channels + d
    conv = tl.zeros((BATCH, POSITIONS), tl.float32)
    grad_w = tl.zeros((BATCH, POSITIONS), tl.float32)
    grad_u = tl.zeros((BATCH, POSITIONS), tl.float32)
    for start in range(0, length, POSITIONS):
        q = start + offsets
        cols = q[None, :]
        mask = in_batch & (cols < length)
        inside = (q[:, None] < length) & (r < length)
        lags = r - q[:, None]
        w = gated(
            p_ptr, weight_ptr, bias_ptr, mask_ptr, d, channels, stride_pc,
            p_rows, batch, cols, length, mask, HAS_MASK,
        )  # fmt: skip
        matrix = _toeplitz(taps, lags, length, inside)
        conv = tl.dot(w.to(dtype), matrix, conv, input_precision=PRECISION)
        grad = tl.load(grad_ptr + d * stride_gc + batch * stride_gb + cols, mask=mask, other=0.0)
        g = grad * short_conv(
            p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, x2, p_rows, cols, length, mask
        )
        matrix = _toeplitz(taps, -lags, length, inside)
        grad_w = tl.dot(g.to(dtype), matrix, grad_w, input_precision=PRECISION)
        if RESIDUAL:
            matrix = _toeplitz(res_taps, -lags, length, inside)
            grad_u = tl.dot(grad, matrix, grad_u, input_precision=PRECISION)
    mask = in_batch & (r < length)
    if HAS_MASK:
        kept = tl.load(mask_ptr + batch * length + r, mask=mask, other=0.0).to(tl.float32)
        grad_w *= kept
        grad_u *= kept
    grad = tl.load(grad_ptr + d * stride_gc + batch * stride_gb + r, mask=mask, other=0.0)
    # The gradient of the short convolution's output is (3D, B, L).
    out = grad_short_ptr + batch * length + r
    size = batch_size.to(tl.int64) * length
    x1 = short_conv(p_ptr + d * stride_pc, weight_ptr, bias_ptr, d, p_rows, r, length, mask)
    tl.store(out + v * size, (grad_w * x1).to(dtype), mask=mask)
    gate = short_conv(p_ptr + v * stride_pc, weight_ptr, bias_ptr, v, p_rows, r, length, mask)
    tl.store(out + d * size, (grad_w * gate).to(dtype), mask=mask)
    tl.store(out + x2 * size, (grad * conv).to(dtype), mask=mask)
    if RESIDUAL:
        to = grad_u_ptr + d * stride_uc + batch * stride_ub + r
        tl.store(to, grad_u.to(dtype), mask=mask)


@triton.jit
def taps_grad_kernel(
    grad_ptr,
    p_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    scratch_ptr,
    out_ptr,
    first_channel,
    batch_size,
    length,
    channels,
    stride_gb,
    stride_gc,
    stride_pb,
    stride_pc,
    stride_ub,
    stride_uc,
    GATED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute Σ_b Σ_s g[b, s + lag] · w[b, s] for the lags between two diagonals of tiles.

    Pairs of tiles of t and s with the same distance have the same lags, so they share one sum of
    outer products. The sum is written to scratch memory and read back along its diagonals.
    Output row j of a channel holds this program's share of the lags (j − tiles) · P + 1 …
    (j − tiles + 2) · P, where P is the width of a tile.
    """
    d = first_channel + tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(length, POSITIONS)
    apart = tl.program_id(1) - (tiles - 1)  # tile of t minus tile of s
    offsets = tl.arange(0, POSITIONS)
    dtype = p_ptr.dtype.element_ty
    x2 = channels + d
    acc = tl.zeros((POSITIONS, POSITIONS), tl.float32)
    for i in range(tl.maximum(0, -apart), tl.minimum(tiles, tiles - apart)):
        s = (i * POSITIONS + offsets)[None, :]
        t = ((i + apart) * POSITIONS + offsets)[None, :]
        for first in range(0, batch_size, BATCH):
            batch = (first + tl.arange(0, BATCH)[:, None]).to(tl.int64)
            in_batch = batch < batch_size
            mask_s = in_batch & (s < length)
            mask_t = in_batch & (t < length)
            grad = tl.load(grad_ptr + d * stride_gc + batch * stride_gb + t, mask=mask_t, other=0.0)
            if GATED:
                grad *= short_conv(
                    p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, x2, batch * stride_pb, t, length,
                    mask_t,
                )  # fmt: skip
                w = gated(
                    p_ptr, weight_ptr, bias_ptr, mask_ptr, d, channels, stride_pc,
                    batch * stride_pb, batch, s, length, mask_s, HAS_MASK,
                )  # fmt: skip
            else:
                w = unmasked(
                    u_ptr + d * stride_uc, mask_ptr, batch * stride_ub, batch, s, length, mask_s,
                    HAS_MASK,
                )  # fmt: skip
            acc = tl.dot(tl.trans(grad.to(dtype)), w.to(dtype), acc, input_precision=PRECISION)
    program = tl.program_id(0).to(tl.int64) * (2 * tiles - 1) + tl.program_id(1)
    scratch = scratch_ptr + program * POSITIONS * POSITIONS
    out_ptr += (d * (2 * tiles - 1) + tl.program_id(1)) * 2 * POSITIONS
    tl.store(scratch + offsets[:, None] * POSITIONS + offsets[None, :], acc)
    tl.debug_barrier()  # other threads of this program wrote what is read now
    for half in range(2):
        lag = half * POSITIONS + offsets - (POSITIONS - 1)
        row = offsets[None, :] + lag[:, None]
        inside = (row >= 0) & (row < POSITIONS)
        diagonal = tl.load(scratch + row * POSITIONS + offsets[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + half * POSITIONS + offsets, tl.sum(diagonal, 1))


def _config(p: Tensor) -> Config:
    return CONFIGS[p.element_size(), p.shape[1] % 16 == 0]


def _constants(p: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Return the compile-time arguments that all three kernels have, but for tile sizes."""
    return {
        "HAS_MASK": mask is not None,
        "PRECISION": dot_precision(p.dtype),
        "num_warps": _config(p).num_warps,
        "num_stages": _config(p).num_stages,
    }


def _pointers(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return p, u, weight, bias, taps, res_taps and mask for a launch; any tensor for a None."""
    p, u, weight, bias, taps, res_taps, mask = inputs
    p = sequence_last(p)
    u = p if u is None else sequence_last(u)
    taps = taps.to(p.dtype)  # both operands of a product have one dtype
    res_taps = taps if res_taps is None else res_taps.to(p.dtype)
    return p, u, weight, bias, taps, res_taps, p if mask is None else mask


def forward(inputs: Inputs, causal: bool) -> Tensor:
    """Compute `gated_long_conv_op`."""
    pointers = p, u, *_ = _pointers(inputs)
    batch_size, length, channels = p.shape[0], p.shape[1], p.shape[2] // 3
    y = empty_sequence_last(p, channels)
    batch, positions = tile(batch_size, _config(p).batch), tile(length, _config(p).positions)
    batch_tiles = min(triton.cdiv(batch_size, batch), max(1, BATCH_PER_PROGRAM // batch))
    grid = (
        channels,
        triton.cdiv(length, positions),
        triton.cdiv(batch_size, batch * batch_tiles),
    )
    toeplitz_forward_kernel[grid](
        *pointers,
        y,
        batch_size,
        length,
        channels,
        *strides(p),
        *strides(u),
        *strides(y),
        RESIDUAL=inputs.res_taps is not None,
        CAUSAL=causal,
        BATCH=batch,
        BATCH_TILES=batch_tiles,
        POSITIONS=positions,
        **_constants(p, inputs.mask),
    )
    return y


def _taps_grad(grad: Tensor, inputs: Inputs, is_gated: bool) -> Tensor:
    """Return the gradient (D, 2L − 1) of one filter's taps, fp32, bitwise reproducible."""
    p, u, weight, bias, _, _, mask = _pointers(inputs)
    batch_size, length, channels = grad.shape
    positions = tile(length, _config(p).positions)
    tiles = triton.cdiv(length, positions)
    together = SCRATCH_BYTES // (4 * (2 * tiles - 1) * positions**2)
    together = min(max(together, 1), channels)
    scratch = p.new_empty(together, 2 * tiles - 1, positions, positions, dtype=torch.float32)
    out = p.new_empty(channels, 2 * tiles - 1, 2, positions, dtype=torch.float32)
    for first_channel in range(0, channels, together):
        taps_grad_kernel[min(together, channels - first_channel), 2 * tiles - 1](
            grad,
            p,
            u,
            weight,
            bias,
            mask,
            scratch,
            out,
            first_channel,
            batch_size,
            length,
            channels,
            *strides(grad),
            *strides(p),
            *strides(u),
            GATED=is_gated,
            BATCH=tile(batch_size, _config(p).batch),
            POSITIONS=positions,
            **_constants(p, inputs.mask),
        )
    # The upper half of one program's lags is the lower half of the next program's.
    lags = torch.zeros(channels, 2 * tiles, positions, dtype=torch.float32, device=p.device)
    lags[:, :-1] += out[:, :, 0]
    lags[:, 1:] += out[:, :, 1]
    first = tiles * positions - 1 - (length - 1)  # the lags begin at −(tiles · positions − 1)
    return lags.flatten(1)[:, first : first + 2 * length - 1]


def backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `backward_op`, bitwise reproducibly."""
    grad, inputs = sequence_last(grad), inputs._replace(p=sequence_last(inputs.p))
    batch_size, length, channels = grad.shape
    residual = inputs.res_taps is not None
    p, _, *pointers = _pointers(inputs)
    grad_u = empty_sequence_last(p, channels) if residual else p.new_empty(0, 0, 0)  # unused
    grad_short = p.new_empty(3 * channels, batch_size, length)
    batch, positions = tile(batch_size, _config(p).batch), tile(length, _config(p).positions)
    grid = (channels, triton.cdiv(length, positions), triton.cdiv(batch_size, batch))
    toeplitz_backward_kernel[grid](
        grad,
        p,
        *pointers,
        grad_short,
        grad_u,
        batch_size,
        length,
        channels,
        *strides(grad),
        *strides(p),
        *strides(grad_u),
        RESIDUAL=residual,
        BATCH=batch,
        POSITIONS=positions,
        **_constants(p, inputs.mask),
    )
    grad_p, grad_weight, grad_bias = short_conv_grad(grad_short, p, inputs.weight)
    grad_taps = _taps_grad(grad, inputs, is_gated=True)
    grad_res_taps = grad_taps.new_empty(0)
    if residual:
        grad_res_taps = _taps_grad(grad, inputs, is_gated=False)
    return grad_p, grad_u, grad_weight, grad_bias, grad_taps, grad_res_taps
