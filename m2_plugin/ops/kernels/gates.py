"""The parts of the mixer around its long convolutions, for both kinds of kernels.

Dimension key: B batch, L sequence, D channels. Positions are contiguous in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.launch import (
    cdiv,
    empty_sequence_last,
    launch_kernel,
    next_power_of_2,
    strides,
    tile,
)

# Numbers of a tile of `short_conv_grad_kernel`.
TILE = 8192


class Inputs(NamedTuple):
    """The tensors of `gated_long_conv_op`."""

    p: Tensor
    u: Tensor | None
    weight: Tensor
    bias: Tensor
    taps: Tensor
    res_taps: Tensor | None
    mask: Tensor | None
    p_bias: Tensor | None = None


class Gradients(NamedTuple):
    """What `backward_op` returns; empty tensors for what was not given."""

    p: Tensor
    u: Tensor
    weight: Tensor
    bias: Tensor
    p_bias: Tensor
    taps: Tensor
    res_taps: Tensor


@triton.jit
def unmasked(
    ptr, mask_ptr, rows, batch, cols, length, mask, HAS_MASK: tl.constexpr, FULL: tl.constexpr
):
    """Load a tile of a sequence, 0 at padding."""
    x = load(ptr + rows + cols, mask, FULL)
    if HAS_MASK:
        x *= load(mask_ptr + batch * length + cols, mask, FULL)
    return x


@triton.jit
def split_octets(x, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """Split x (ROWS, POSITIONS) into 8 tensors (ROWS, POSITIONS / 8): positions 8g + 0 … 8g + 7.

    A thread that loaded 16 bytes holds 8 neighbours, so this and `join_octets` move nothing.
    """
    x = tl.reshape(x, (ROWS, POSITIONS // 8, 2, 2, 2))
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join_octets(
    x0, x1, x2, x3, x4, x5, x6, x7, ROWS: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """Undo `split_octets`."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), (ROWS, POSITIONS))


@triton.jit
def multiply_octets(a, b):
    """Multiply two tuples of 8 tensors."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    b0, b1, b2, b3, b4, b5, b6, b7 = b
    return a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7


@triton.jit
def conv_parameters(weight_ptr, bias_ptr, p_bias_ptr, channel, HAS_P_BIAS: tl.constexpr):
    """Return the three taps of a channel, what to add, and what stands before a sequence's start.

    The bias b of the projection, if it is not yet in p, adds b times the sum of the taps, but for
    the first positions: before the start there is 0, not b. Reading −b there makes up for it.
    """
    w0 = tl.load(weight_ptr + channel * 3).to(tl.float32)
    w1 = tl.load(weight_ptr + channel * 3 + 1).to(tl.float32)
    w2 = tl.load(weight_ptr + channel * 3 + 2).to(tl.float32)
    add = tl.load(bias_ptr + channel).to(tl.float32)
    before = 0.0
    if HAS_P_BIAS:
        b = tl.load(p_bias_ptr + channel).to(tl.float32)
        add += b * (w0 + w1 + w2)
        before = -b
    return w0, w1, w2, add, before


@triton.jit
def load(at, mask, FULL: tl.constexpr):
    """Load, 0 where `mask` is false; `FULL` says that it is true everywhere."""
    return tl.load(at) if FULL else tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_octets(
    ptr, rows, in_rows, first, length, before, FULL: tl.constexpr, ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Load (ROWS, POSITIONS) from position `first` on, as octets in fp32, and two halos.

    Returns positions 8g − 2, 8g − 1, 8g … 8g + 7, each (ROWS, POSITIONS / 8).
    """
    # The offset of a tile goes to the rows' addresses, so that those of a row differ by constants.
    at = ptr + first + rows
    left = length - first
    cols = tl.arange(0, POSITIONS)[None, :]
    x = load(at + cols, in_rows & (cols < left), FULL)
    x0, x1, x2, x3, x4, x5, x6, x7 = split_octets(x.to(tl.float32), ROWS, POSITIONS)
    # Two positions before each octet; as a matrix, so that a thread gets those of its own octets.
    i = tl.arange(0, POSITIONS // 4)[None, :]
    pairs = i // 2 * 8 + i % 2 - 2
    inside = pairs + first >= 0
    there = inside if FULL else in_rows & inside & (pairs < left)
    halo = tl.load(at + pairs, mask=there, other=0.0).to(tl.float32)
    halo = tl.where(inside, halo, before)
    halo = tl.reshape(halo, (ROWS, POSITIONS // 8, 2))
    h6, h7 = tl.split(halo)
    return h6, h7, x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def conv_octets(
    ptr, weight_ptr, bias_ptr, p_bias_ptr, channel, rows, in_rows, first, length,
    HAS_P_BIAS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Convolve one channel causally; the result, fp32, is in octets.

    Args:
        ptr: The channel's first sequence.
        rows, in_rows: (ROWS, 1), offsets of sequences, and which exist.
        first: The first position, a multiple of 8.
    """
    w0, w1, w2, add, before = conv_parameters(weight_ptr, bias_ptr, p_bias_ptr, channel, HAS_P_BIAS)
    h6, h7, x0, x1, x2, x3, x4, x5, x6, x7 = load_octets(
        ptr, rows, in_rows, first, length, before, FULL, ROWS, POSITIONS
    )
    y0 = add + w2 * x0 + w1 * h7 + w0 * h6
    y1 = add + w2 * x1 + w1 * x0 + w0 * h7
    y2 = add + w2 * x2 + w1 * x1 + w0 * x0
    y3 = add + w2 * x3 + w1 * x2 + w0 * x1
    y4 = add + w2 * x4 + w1 * x3 + w0 * x2
    y5 = add + w2 * x5 + w1 * x4 + w0 * x3
    y6 = add + w2 * x6 + w1 * x5 + w0 * x4
    y7 = add + w2 * x7 + w1 * x6 + w0 * x5
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def conv_tile(
    ptr, weight_ptr, bias_ptr, p_bias_ptr, channel, rows, in_rows, first, length,
    HAS_P_BIAS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Like `conv_octets`, but return (ROWS, POSITIONS)."""
    x0, x1, x2, x3, x4, x5, x6, x7 = conv_octets(
        ptr, weight_ptr, bias_ptr, p_bias_ptr, channel, rows, in_rows, first, length,
        HAS_P_BIAS, FULL, ROWS, POSITIONS,
    )  # fmt: skip
    return join_octets(x0, x1, x2, x3, x4, x5, x6, x7, ROWS, POSITIONS)


@triton.jit
def gated_tile(
    p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc, rows, batch,
    in_rows, first, length, HAS_MASK: tl.constexpr, HAS_P_BIAS: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Compute the input w of the gated convolution, (ROWS, POSITIONS) in fp32; 0 past the end."""
    v = 2 * channels + d
    w = conv_tile(
        p_ptr + d * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, d, rows, in_rows, first, length,
        HAS_P_BIAS, FULL, ROWS, POSITIONS,
    )  # fmt: skip
    w *= conv_tile(
        p_ptr + v * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, v, rows, in_rows, first, length,
        HAS_P_BIAS, FULL, ROWS, POSITIONS,
    )  # fmt: skip
    cols = tl.arange(0, POSITIONS)[None, :]
    inside = in_rows & (cols < length - first)
    if HAS_MASK:
        at = mask_ptr + first + batch * length
        w *= load(at + cols, inside, FULL).to(tl.float32)
    return w if FULL else tl.where(inside, w, 0.0)


@triton.jit
def adjoint_octets(
    octets, next0, next1, ptr, weight_ptr, bias_ptr, p_bias_ptr, channel, rows, in_rows, first,
    length, HAS_P_BIAS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a short convolution from the gradient of its output.

    Args:
        octets: That gradient in octets, fp32, 0 where there is no position.
        next0, next1: (ROWS, POSITIONS / 8), it at the first two positions after each octet.
        ptr: The channel's first sequence, input of the convolution; other arguments as there.

    Returns:
        The gradient of the input, (ROWS, POSITIONS), and sums over rows and positions: the
        gradients of the bias and of the three taps, (4,), and of p_bias, a number.
    """
    w0, w1, w2, _, before = conv_parameters(weight_ptr, bias_ptr, p_bias_ptr, channel, HAS_P_BIAS)
    g0, g1, g2, g3, g4, g5, g6, g7 = octets
    dx = join_octets(
        w2 * g0 + w1 * g1 + w0 * g2,
        w2 * g1 + w1 * g2 + w0 * g3,
        w2 * g2 + w1 * g3 + w0 * g4,
        w2 * g3 + w1 * g4 + w0 * g5,
        w2 * g4 + w1 * g5 + w0 * g6,
        w2 * g5 + w1 * g6 + w0 * g7,
        w2 * g6 + w1 * g7 + w0 * next0,
        w2 * g7 + w1 * next0 + w0 * next1,
        ROWS,
        POSITIONS,
    )
    h6, h7, x0, x1, x2, x3, x4, x5, x6, x7 = load_octets(
        ptr, rows, in_rows, first, length, before, FULL, ROWS, POSITIONS
    )
    sum_b = (g0 + g1) + (g2 + g3) + (g4 + g5) + (g6 + g7)
    sum_2 = g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3 + g4 * x4 + g5 * x5 + g6 * x6 + g7 * x7
    sum_1 = g0 * h7 + g1 * x0 + g2 * x1 + g3 * x2 + g4 * x3 + g5 * x4 + g6 * x5 + g7 * x6
    sum_0 = g0 * h6 + g1 * h7 + g2 * x0 + g3 * x1 + g4 * x2 + g5 * x3 + g6 * x4 + g7 * x5
    sum_p = 0.0
    if HAS_P_BIAS:  # the input is x − before, and the first two positions lack some of it
        start = first + 8 * tl.arange(0, POSITIONS // 8)[None, :] == 0
        sum_p = (w0 + w1 + w2) * sum_b - tl.where(start, (w0 + w1) * g0 + w0 * g1, 0.0)
        sum_p = tl.sum(tl.reshape(sum_p, (ROWS * (POSITIONS // 8),)), 0)
        sum_2 -= before * sum_b
        sum_1 -= before * sum_b
        sum_0 -= before * sum_b
    sums = tl.join(tl.join(sum_b, sum_1), tl.join(sum_0, sum_2))  # in memory: b, 0, 1, 2
    sums = tl.sum(tl.reshape(sums, (ROWS * (POSITIONS // 8), 4)), 0)
    return dx, sums, sum_p


@triton.jit
def next_octets(g0, g1, after0, after1, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Return a sequence at the first two positions after each octet.

    Args:
        g0, g1: (ROWS, GROUPS), the sequence at the first two positions of each octet.
        after0, after1: (ROWS, 1), what stands at the first two positions after the last octet.

    Returns:
        Two tensors (ROWS, GROUPS), and the first two positions of the sequence, (ROWS, 1).
    """
    group = tl.arange(0, GROUPS)[None, :]
    neighbour = tl.broadcast_to((group + 1) % GROUPS, (ROWS, GROUPS))
    next0 = tl.where(group == GROUPS - 1, after0, tl.gather(g0, neighbour, 1))
    next1 = tl.where(group == GROUPS - 1, after1, tl.gather(g1, neighbour, 1))
    first0 = tl.sum(tl.where(group == 0, g0, 0.0), 1)[:, None]
    first1 = tl.sum(tl.where(group == 0, g1, 0.0), 1)[:, None]
    return next0, next1, first0, first1


@triton.jit
def store_sums(ptr, channel, sums, sum_p, HAS_P_BIAS: tl.constexpr):
    """Store what `adjoint_octets` summed, 5 numbers a channel."""
    tl.store(ptr + channel * 5 + tl.arange(0, 4), sums)
    if HAS_P_BIAS:
        tl.store(ptr + channel * 5 + 4, sum_p)


@triton.jit
def short_conv_grad_kernel(
    grad_ptr,
    p_ptr,
    weight_ptr,
    p_bias_ptr,
    grad_p_ptr,
    sums_ptr,
    batch_size,
    length_units,
    channels,
    stride_gb,
    stride_gc,
    stride_pb,
    stride_pc,
    stride_ob,
    stride_oc,
    HAS_P_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the gradient of p for one channel and a tile, and sums for the parameters."""
    c = tl.program_id(2).to(tl.int64)
    batch = (tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]).to(tl.int64)
    in_batch = batch < batch_size
    length = length_units * UNIT
    first = tl.program_id(0) * POSITIONS
    t = first + tl.arange(0, POSITIONS)[None, :]
    mask = in_batch & (t < length)
    grad_rows = grad_ptr + c * (stride_gc * UNIT) + batch * (stride_gb * UNIT)
    grad = tl.load(grad_rows + t, mask=mask, other=0.0).to(tl.float32)
    i = tl.arange(0, POSITIONS // 4)[None, :]
    pairs = first + (i // 2 * 8 + i % 2 + 8)
    after = tl.load(grad_rows + pairs, mask=in_batch & (pairs < length), other=0.0).to(tl.float32)
    next0, next1 = tl.split(tl.reshape(after, (BATCH, POSITIONS // 8, 2)))
    octets = split_octets(grad, BATCH, POSITIONS)
    grad_p, sums, sum_p = adjoint_octets(
        octets, next0, next1, p_ptr + c * (stride_pc * UNIT), weight_ptr, weight_ptr, p_bias_ptr, c,
        batch * (stride_pb * UNIT), in_batch, first, length, HAS_P_BIAS, False, BATCH, POSITIONS,
    )  # fmt: skip
    out = grad_p_ptr + c * (stride_oc * UNIT) + batch * (stride_ob * UNIT) + t
    tl.store(out, grad_p.to(grad_p_ptr.dtype.element_ty), mask=mask)
    part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    store_sums(sums_ptr + part * channels * 5, c, sums, sum_p, HAS_P_BIAS)


@triton.jit
def add_sums_kernel(
    sums_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_p_bias_ptr,
    parts,
    channels,
    HAS_P_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the sums (parts, 3D, 5) of all programs, in a fixed order."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    slot = tl.arange(0, 8)
    inside = (c < channels)[:, None] & (slot < 5)[None, :]
    if not HAS_P_BIAS:
        inside &= (slot < 4)[None, :]
    acc = tl.zeros((PARTS, CHANNELS, 8), tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)[:, None, None]).to(tl.int64)
        at = sums_ptr + (part * channels + c[None, :, None]) * 5 + slot[None, None, :]
        acc += tl.load(at, mask=inside[None, :, :] & (part < parts), other=0.0)
    total = tl.sum(acc, 0)
    c = c[:, None]
    slot = slot[None, :]
    tl.store(grad_bias_ptr + c + slot, total, mask=inside & (slot == 0))
    tl.store(grad_weight_ptr + c * 3 + slot - 1, total, mask=inside & (slot > 0) & (slot < 4))
    if HAS_P_BIAS:
        tl.store(grad_p_bias_ptr + c + slot - 4, total, mask=inside & (slot == 4))


def add_sums(sums: Tensor, has_p_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight, bias and p_bias (empty if not given) from partial sums.

    Args:
        sums: (parts, 3D, 5), fp32: for bias, the three taps, and p_bias.
        has_p_bias: Whether there is a p_bias.
    """
    parts, channels, _ = sums.shape
    grad_weight, grad_bias = sums.new_empty(channels, 3), sums.new_empty(channels)
    grad_p_bias = sums.new_empty(channels if has_p_bias else 0)
    launch_kernel(
        add_sums_kernel,
        (cdiv(channels, 16),),
        sums,
        grad_weight,
        grad_bias,
        grad_p_bias if has_p_bias else grad_bias,
        parts,
        channels,
        HAS_P_BIAS=has_p_bias,
        PARTS=4,
        CHANNELS=16,
        num_warps=4,
    )
    return grad_weight, grad_bias, grad_p_bias


def unit_of(*sequences: Tensor) -> int:
    """Return 8 if 8 divides the length and the strides of all (B, L, C), else 1.

    Kernels take sizes in units, which lets them load 8 positions at once where that is possible.
    """
    for x in sequences:
        row, channel = strides(x)
        if x.shape[1] % 8 or row % 8 or channel % 8:
            return 1
    return 8


def in_units(unit: int, *sequences: Tensor) -> list[int]:
    """Return the strides of rows and channels of each (B, L, C), in units."""
    found: list[int] = []
    for x in sequences:
        row, channel = strides(x)
        found += row // unit, channel // unit
    return found


def short_conv_backward(
    grad: Tensor, p: Tensor, weight: Tensor, p_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of p, weight, bias and p_bias (or an empty tensor).

    Args:
        grad: (B, L, 3D), of the short convolution's output; positions contiguous in memory.
        p: (B, L, 3D), likewise.
        weight: (3D, 3).
        p_bias: (3D,) or None.
    """
    batch_size, length, channels = p.shape
    grad_p = empty_sequence_last(p, channels)
    unit = unit_of(grad, p, grad_p)
    batch = next_power_of_2(batch_size)
    positions = tile(length, TILE // min(batch, 32))
    batch = min(batch, 64, TILE // positions)
    tiles = cdiv(length, positions), cdiv(batch_size, batch)
    sums = torch.empty(tiles[0] * tiles[1], channels, 5, dtype=torch.float32, device=p.device)
    launch_kernel(
        short_conv_grad_kernel,
        (*tiles, channels),
        grad,
        p,
        weight,
        weight if p_bias is None else p_bias,
        grad_p,
        sums,
        batch_size,
        length // unit,
        channels,
        *in_units(unit, grad, p, grad_p),
        HAS_P_BIAS=p_bias is not None,
        UNIT=unit,
        BATCH=batch,
        POSITIONS=positions,
        num_warps=8,
    )
    return grad_p, *add_sums(sums, p_bias is not None)
