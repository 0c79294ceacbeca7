"""Triton kernels of the mixer's core for long sequences: long convolutions by Monarch FFTs.

Dimension key: B batch, L sequence, D channels, N ≥ 2L − 1 circular length, N = R · M,
M = N1 · N2 points in one transform, R residues, C ≤ R residue classes that are computed,
S = ⌈L / M⌉ segments.

`ops/README.md` derives the method: FFTs of M points as Monarch matrices, two batch rows as one
complex sequence, frequencies in R residue classes. Spectra are stored by residue class: (D, C, real
and imaginary, M), where frequency R · (k1 + N1 · k2) + r is in class r, at the place of (k1, k2) in
the order of `order`. With only one batch row, class R − r is the mirror of class r, and half of
the classes are enough.

Half precision holds what these kernels multiply, because each sequence is divided by a power of
two near its largest number, and each spectrum of a filter likewise; `Plan.guard` bounds what is
between. Rows have scales of their own, so that no row of a batch changes another's result.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.gates import (
    Gradients,
    Inputs,
    conv_tile,
    gated_tile,
    short_conv_backward,
)
from m2_plugin.ops.kernels.launch import (
    cdiv,
    empty_sequence_last,
    launch_kernel,
    sequence_last,
    strides,
    tile,
)
from m2_plugin.ops.kernels.monarch_plan import TURNS, Plan, plan_for
from m2_plugin.ops.kernels.monarch_spectra import (
    ABSOLUTE_BITS,
    SPECTRUM_BYTES,
    chunks,
    largest_bits,
    scale_of,
    scaled,
    spectra,
    split_rows,
    taps_of,
)

# Memory for residue classes; as many channels as fit are convolved at a time. This is enough for
# 32,768 tokens of the base size. Less would stay in the L2 cache between two launches, but take
# more of them, and an H200 waited for the host: at 8,192 positions and 434 launches a pass took 29
# ms, and its kernels 19.
WORKSPACE_BYTES = 256 << 20
# Numbers of a tile of the kernels that go through memory once.
TILE = 2048
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _operand(x, HALF: tl.constexpr):
    return x.to(tl.float16) if HALF else x


@triton.jit
def _conjugate(f):
    """Exchange the imaginary part of a table and the negated one."""
    return f[0], f[2], f[1]


@triton.jit
def _from_left(f, re, im, PRECISION: tl.constexpr):
    """Multiply f · x, complex; f is its real, imaginary and negated imaginary part."""
    out_re = tl.dot(f[0], re, input_precision=PRECISION)
    out_im = tl.dot(f[0], im, input_precision=PRECISION)
    out_re = tl.dot(f[2], im, out_re, input_precision=PRECISION)
    return out_re, tl.dot(f[1], re, out_im, input_precision=PRECISION)


@triton.jit
def _from_right(re, im, f, PRECISION: tl.constexpr):
    """Multiply x · f, complex; f as in `_from_left`."""
    out_re = tl.dot(re, f[0], input_precision=PRECISION)
    out_im = tl.dot(im, f[0], input_precision=PRECISION)
    out_re = tl.dot(im, f[2], out_re, input_precision=PRECISION)
    return out_re, tl.dot(re, f[1], out_im, input_precision=PRECISION)


@triton.jit
def _load_matrix(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Load a DFT matrix (3, ROWS, COLS): real, imaginary, negated imaginary."""
    at = ptr + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return tl.load(at), tl.load(at + ROWS * COLS), tl.load(at + 2 * ROWS * COLS)


@triton.jit
def _in_place(x, VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Turn M numbers in the order of `order` into (N1, N2)."""
    x = tl.reshape(x, (N1 // (16 * WARPS), N2 // (2 * VECTOR), WARPS, 8, 4, VECTOR // 4, 2, 2))
    return tl.reshape(tl.permute(x, (0, 2, 6, 3, 1, 5, 4, 7)), (N1, N2))


@triton.jit
def _as_stored(x, VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Undo `_in_place`."""
    x = tl.reshape(x, (N1 // (16 * WARPS), WARPS, 2, 8, N2 // (2 * VECTOR), VECTOR // 4, 4, 2))
    return tl.reshape(tl.permute(x, (0, 4, 1, 3, 6, 5, 2, 7)), (N1 * N2,))


@triton.jit
def _load_complex(
    ptr, VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """Load real and imaginary part, (N1, N2) each, of a table (2, M) in the order of `order`."""
    at = ptr + tl.arange(0, N1 * N2)
    re = _in_place(tl.load(at), VECTOR, WARPS, N1, N2)
    return re, _in_place(tl.load(at + N1 * N2), VECTOR, WARPS, N1, N2)


@triton.jit
def _turned(re, im, turn_ptr, N1: tl.constexpr):
    """Return twiddles (N1, …) and others, which are these times a turn for each row, in a pair."""
    k1 = tl.arange(0, N1)[:, None]
    cos, sin = tl.load(turn_ptr + k1), tl.load(turn_ptr + N1 + k1)
    return tl.join(re, re * cos - im * sin), tl.join(im, re * sin + im * cos)


@triton.jit
def _more_columns(re, im, turn_ptr, N1: tl.constexpr, N2: tl.constexpr):
    """Double the columns of twiddles (N1, N2); the new ones come after the old ones."""
    re, im = _turned(re, im, turn_ptr, N1)
    re, im = tl.permute(re, (0, 2, 1)), tl.permute(im, (0, 2, 1))
    return tl.reshape(re, (N1, 2 * N2)), tl.reshape(im, (N1, 2 * N2))


@triton.jit
def _load_even(ptr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Load N2 even columns (N1, N2), which lie in the order of `order_even`."""
    x = tl.load(ptr + tl.arange(0, N1 * N2))
    x = tl.reshape(x, (N1 // (16 * WARPS), N2 // 8, WARPS, 8, 4, 2, 2))
    return tl.reshape(tl.permute(x, (0, 2, 6, 3, 1, 5, 4)), (N1, N2))


@triton.jit
def _twiddles(
    ptr, SPLIT: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr,
):  # fmt: skip
    """Load the twiddles' real and imaginary part, (N1, N2) each; see `Config.split`."""
    if SPLIT == 1:
        re, im = _load_complex(ptr, VECTOR, WARPS, N1, N2)
    else:
        stored: tl.constexpr = N2 // SPLIT
        re = _load_even(ptr, WARPS, N1, stored)
        im = _load_even(ptr + N1 * stored, WARPS, N1, stored)
        turns = ptr + 2 * N1 * stored
        if SPLIT >= 4:
            re, im = _more_columns(re, im, turns + 2 * N1, N1, stored)
        if SPLIT >= 8:
            re, im = _more_columns(re, im, turns + 4 * N1, N1, 2 * stored)
        # Last, so that a thread has both of two neighbouring columns, as of a product.
        re, im = _turned(re, im, turns, N1)
        re, im = tl.reshape(re, (N1, N2)), tl.reshape(im, (N1, N2))
    return re, im


@triton.jit
def _class_twiddles(ptr, r, SPLIT: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Return where the twiddles of residue class r begin."""
    return ptr + r * 2 * N1 * (N2 // SPLIT + TURNS)


@triton.jit
def _spectrum(
    re, im, f1, f2, twiddle_ptr, HALF: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TWIDDLES: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Compute the DFT (N1, N2) of complex points, of which the first (ROWS, N2) are given."""
    re, im = _from_left(f1, _operand(re, HALF), _operand(im, HALF), PRECISION)
    cos, sin = _twiddles(twiddle_ptr, SPLIT, TWIDDLES, WARPS, N1, N2)
    turned = _operand(re * cos - im * sin, HALF)
    im = _operand(re * sin + im * cos, HALF)
    return _from_right(turned, im, f2, PRECISION)


@triton.jit
def _signal(
    re, im, f1, f2, twiddle_ptr, HALF: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    TWIDDLES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr,
):  # fmt: skip
    """Compute the adjoint of `_spectrum`, which is M times its inverse."""
    # Without this, the twiddles would stay in registers from the transform on.
    tl.debug_barrier()
    re, im = _from_right(_operand(re, HALF), _operand(im, HALF), _conjugate(f2), PRECISION)
    cos, sin = _twiddles(twiddle_ptr, SPLIT, TWIDDLES, WARPS, N1, N2)
    turned = _operand(re * cos + im * sin, HALF)
    im = _operand(im * cos - re * sin, HALF)
    # The matrix unit wants 64 rows or more on the left.
    if ROWS >= 64:
        f1 = _conjugate(f1)
        left = tl.trans(f1[0]), tl.trans(f1[1]), tl.trans(f1[2])
        return _from_left(left, turned, im, PRECISION)
    re, im = _from_right(tl.trans(turned), tl.trans(im), _conjugate(f1), PRECISION)
    return tl.trans(re), tl.trans(im)


@triton.jit
def _product(
    re, im, k_ptr, CONJUGATE: tl.constexpr, HALF: tl.constexpr, WARPS: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Multiply a spectrum by that of a filter, or by its conjugate."""
    k_re, k_im = _load_complex(k_ptr, 8 if HALF else 4, WARPS, N1, N2)
    k_re, k_im = k_re.to(tl.float32), k_im.to(tl.float32)
    if CONJUGATE:
        k_im = -k_im
    return re * k_re - im * k_im, re * k_im + im * k_re


@triton.jit
def _short(
    p_ptr, weight_ptr, bias_ptr, p_bias_ptr, channel, stride_pc, rows, in_rows, length,
    HAS_P_BIAS: tl.constexpr, POSITIONS: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Compute one row of the short convolution's output, fp32, as (POSITIONS / N2, N2)."""
    x = conv_tile(
        p_ptr + channel * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, channel, rows, in_rows, 0,
        length, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    return tl.reshape(x, (POSITIONS // N2, N2))


@triton.jit
def _gated(
    p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc, rows, batch,
    in_rows, length, HAS_MASK: tl.constexpr, HAS_P_BIAS: tl.constexpr,
    POSITIONS: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Compute one row of the gated convolution's input w, fp32, as (POSITIONS / N2, N2)."""
    w = gated_tile(
        p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc, rows, batch,
        in_rows, 0, length, HAS_MASK, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    return tl.reshape(w, (POSITIONS // N2, N2))


@triton.jit
def monarch_conv_kernel(
    p_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    mask_ptr,
    k_ptr,
    k_scale_ptr,
    y_ptr,
    source_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    batch_size,
    length,
    channels,
    stride_pb,
    stride_pc,
    stride_xb,
    stride_xc,
    stride_yb,
    stride_yc,
    TERM: tl.constexpr,
    ADD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TWIDDLES: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Compute one term of the mixer's core, or of its gradient, for two batch rows, 2L − 1 ≤ M.

    With x = u, or the gradient of the core's output, and k* the filter backwards, `TERM` says what
    y is set to, or, if `ADD`, what is added to it:

    - `residual`: k ∗ x
    - `gated`: x2 · (k ∗ w)
    - `grad_u`: k* ∗ x
    - `grad_x2`: x · (k ∗ w), where y are the gradients of x1, x2 and v
    - `grad_w`: dw = k* ∗ (x2 · x), and with it the gradients dw · v of x1 and dw · x1 of v

    The last two also write what they convolve to `source`, with y's strides, for the gradient of
    the taps. A launch with several terms would not have registers enough to keep a multiprocessor
    busy.
    """
    M: tl.constexpr = N1 * N2
    POSITIONS: tl.constexpr = ROWS * N2
    d = tl.program_id(1).to(tl.int64)
    one = tl.zeros((1, 1), tl.int64) + 2 * tl.program_id(0)
    two = one + 1
    yes = one < batch_size
    ok = two < batch_size
    t = tl.arange(0, ROWS)[:, None] * N2 + tl.arange(0, N2)[None, :]
    in_a = t < length
    in_b = in_a & ok
    x2, v = channels + d, 2 * channels + d
    x_ptr += d * stride_xc + t
    if TERM == "gated" or TERM == "grad_x2":
        a = _gated(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc,
            one * stride_pb, one, yes, length, HAS_MASK, HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        b = _gated(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc,
            two * stride_pb, two, ok, length, HAS_MASK, HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
    else:
        a = tl.load(x_ptr + one * stride_xb, mask=in_a, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + two * stride_xb, mask=in_b, other=0.0).to(tl.float32)
    if TERM == "residual" and HAS_MASK:
        a *= tl.load(mask_ptr + one * length + t, mask=in_a, other=0.0).to(tl.float32)
        b *= tl.load(mask_ptr + two * length + t, mask=in_b, other=0.0).to(tl.float32)
    if TERM == "grad_w":
        a *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, x2, stride_pc, one * stride_pb, yes, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        b *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, x2, stride_pc, two * stride_pb, ok, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
    if TERM == "grad_x2" or TERM == "grad_w":
        source_ptr += d * stride_yc + t
        tl.store(source_ptr + one * stride_yb, a.to(source_ptr.dtype.element_ty), mask=in_a)
        tl.store(source_ptr + two * stride_yb, b.to(source_ptr.dtype.element_ty), mask=in_b)
    scale_a, inverse_a, poison_a = scale_of(largest_bits(a))
    scale_b, inverse_b, poison_b = scale_of(largest_bits(b))
    a, b = scaled(a, inverse_a, poison_a), scaled(b, inverse_b, poison_b)
    f1, f2 = _load_matrix(f1_ptr, N1, ROWS), _load_matrix(f2_ptr, N2, N2)
    BACK: tl.constexpr = TERM == "grad_u" or TERM == "grad_w"
    re, im = _spectrum(
        a, b, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, N1, N2
    )  # fmt: skip
    re, im = _product(re, im, k_ptr + d * 2 * M, BACK, HALF, WARPS, N1, N2)
    a, b = _signal(
        re, im, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, ROWS, N1, N2
    )  # fmt: skip
    k_scale = tl.load(k_scale_ptr + d)
    a, b = a * k_scale * (scale_a + poison_a), b * k_scale * (scale_b + poison_b)
    if HAS_MASK and BACK:
        a *= tl.load(mask_ptr + one * length + t, mask=in_a, other=0.0).to(tl.float32)
        b *= tl.load(mask_ptr + two * length + t, mask=in_b, other=0.0).to(tl.float32)
    if TERM == "gated":
        a *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, x2, stride_pc, one * stride_pb, yes, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        b *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, x2, stride_pc, two * stride_pb, ok, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
    if TERM == "grad_x2":
        a *= tl.load(x_ptr + one * stride_xb, mask=in_a, other=0.0).to(tl.float32)
        b *= tl.load(x_ptr + two * stride_xb, mask=in_b, other=0.0).to(tl.float32)
        y_ptr += channels * stride_yc
    y_ptr += d * stride_yc + t
    dtype = y_ptr.dtype.element_ty
    if TERM == "grad_w":
        other = y_ptr + 2 * channels * stride_yc
        x1_a = _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, d, stride_pc, one * stride_pb, yes, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        tl.store(other + one * stride_yb, (a * x1_a).to(dtype), mask=in_a)
        x1_b = _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, d, stride_pc, two * stride_pb, ok, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        tl.store(other + two * stride_yb, (b * x1_b).to(dtype), mask=in_b)
        a *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, v, stride_pc, one * stride_pb, yes, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
        b *= _short(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, v, stride_pc, two * stride_pb, ok, length,
            HAS_P_BIAS, POSITIONS, N2,
        )  # fmt: skip
    if ADD:
        a += tl.load(y_ptr + one * stride_yb, mask=in_a, other=0.0).to(tl.float32)
        b += tl.load(y_ptr + two * stride_yb, mask=in_b, other=0.0).to(tl.float32)
    tl.store(y_ptr + one * stride_yb, a.to(dtype), mask=in_a)
    tl.store(y_ptr + two * stride_yb, b.to(dtype), mask=in_b)


@triton.jit
def _load_rows(ptr, stride, at, length, second):
    """Load a tile of both rows of a pair, fp32; the second row is 0 where there is none."""
    inside = at < length
    a = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + stride + at, mask=inside & second, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _unpoisoned(scale):
    """Undo the sum of a scale and a poison."""
    fine = scale == scale
    return tl.where(fine, scale, 1.0), tl.where(fine, 0.0, scale)


@triton.jit
def _load_class(z_ptr, at, M: tl.constexpr):
    """Load one residue class that `fold_kernel` wrote."""
    return tl.load(z_ptr + at).to(tl.float32), tl.load(z_ptr + M + at).to(tl.float32)


@triton.jit
def fold_kernel(
    x_ptr,
    z_ptr,
    scale_ptr,
    other_scale_ptr,
    matrix_ptr,
    first_channel,
    batch_size,
    length,
    classes,
    points,
    stride_xb,
    stride_xc,
    JOINT: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Fold one channel of two batch rows into all residue classes, as a product of matrices.

    z is (channel, pair, C, real and imaginary, M). What it has to be multiplied by, one number for
    each row, is in `scale`, (channel, pair, 2). If `JOINT`, z is to be multiplied by other folded
    rows, whose scales are given: then products of both rows have one scale, twice in `scale`.
    """
    channel = tl.program_id(1).to(tl.int64)
    batch = 2 * tl.program_id(0).to(tl.int64)
    pair = channel * tl.num_programs(0) + tl.program_id(0)
    x_ptr += (first_channel + channel) * stride_xc + batch * stride_xb
    second = batch + 1 < batch_size
    bits_a = tl.zeros((WHOLE,), tl.int32)
    bits_b = tl.zeros((WHOLE,), tl.int32)
    for first in range(0, length, WHOLE):
        a, b = _load_rows(x_ptr, stride_xb, first + tl.arange(0, WHOLE), length, second)
        bits_a = tl.maximum(bits_a, a.to(tl.int32, bitcast=True) & ABSOLUTE_BITS)
        bits_b = tl.maximum(bits_b, b.to(tl.int32, bitcast=True) & ABSOLUTE_BITS)
    scale_a, factor_a, poison_a = scale_of(tl.max(bits_a))
    scale_b, factor_b, poison_b = scale_of(tl.max(bits_b))
    if JOINT:
        other_a, other_poison_a = _unpoisoned(tl.load(other_scale_ptr + 2 * pair))
        other_b, other_poison_b = _unpoisoned(tl.load(other_scale_ptr + 2 * pair + 1))
        scale = tl.maximum(tl.maximum(scale_a * other_a, scale_b * other_b), SMALLEST_NORMAL)
        factor_a, factor_b = other_a / scale, other_b / scale
        scale += (poison_a + poison_b) + (other_poison_a + other_poison_b)
        tl.store(scale_ptr + 2 * pair, scale)
        tl.store(scale_ptr + 2 * pair + 1, scale)
    else:
        tl.store(scale_ptr + 2 * pair, scale_a + poison_a)
        tl.store(scale_ptr + 2 * pair + 1, scale_b + poison_b)
    out = tl.program_id(2) * OUT + tl.arange(0, OUT)[:, None]
    z_ptr += (pair * classes * 2 + out) * points
    for first in range(0, points, BLOCK):
        t = first + tl.arange(0, BLOCK)[None, :]
        z = tl.zeros((OUT, BLOCK), tl.float32)
        for k in range(0, IN, DEPTH):
            i = k + tl.arange(0, DEPTH)
            matrix = tl.load(matrix_ptr + out * IN + i[None, :])
            row, s = i[:, None] % 2, i[:, None] // 2
            here = t + s * points
            inside = (here < length) & ((row == 0) | second)
            x = tl.load(x_ptr + row * stride_xb + here, mask=inside, other=0.0).to(tl.float32)
            factor = tl.where(row == 0, factor_a, factor_b)
            x = _operand(scaled(x, factor, tl.where(row == 0, poison_a, poison_b)), HALF)
            z = tl.dot(matrix, x, z, input_precision=PRECISION)
        tl.store(z_ptr + t, z.to(z_ptr.dtype.element_ty), mask=out < 2 * classes)


@triton.jit
def cyclic_conv_kernel(
    x_ptr,
    k_ptr,
    k_scale_ptr,
    z_ptr,
    scale_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    first_channel,
    batch_size,
    length,
    stride_xb,
    stride_xc,
    CONJUGATE: tl.constexpr,
    FOLDED: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TWIDDLES: tl.constexpr,
    WARPS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Convolve one residue class of one channel and two batch rows, backwards if `CONJUGATE`.

    z is (channel, pair, C, real and imaginary, M), and has to be multiplied by the two scales of
    its rows, (channel, pair, 2). If `FOLDED`, both are what `fold_kernel` wrote.
    """
    M: tl.constexpr = N1 * N2
    r = tl.program_id(0)
    classes = tl.num_programs(0)
    channel = tl.program_id(2).to(tl.int64)
    batch = 2 * tl.program_id(1).to(tl.int64)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    x_ptr += (first_channel + channel) * stride_xc + batch * stride_xb
    second = batch + 1 < batch_size
    pair = channel * tl.num_programs(1) + tl.program_id(1)
    z_ptr += (pair * classes + r) * 2 * M
    scale_ptr += 2 * pair
    if FOLDED:
        re, im = _load_class(z_ptr, at, M)
    else:
        a, b = _load_rows(x_ptr, stride_xb, at, length, second)
        scale_a, inverse_a, poison_a = scale_of(largest_bits(a))
        scale_b, inverse_b, poison_b = scale_of(largest_bits(b))
        re, im = scaled(a, inverse_a, poison_a), scaled(b, inverse_b, poison_b)
        scale_a, scale_b = scale_a + poison_a, scale_b + poison_b
    f1, f2 = _load_matrix(f1_ptr + r * 3 * N1 * N1, N1, N1), _load_matrix(f2_ptr, N2, N2)
    twiddle_ptr = _class_twiddles(twiddle_ptr, r, SPLIT, N1, N2)
    re, im = _spectrum(
        re, im, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, N1, N2
    )  # fmt: skip
    k_ptr += (channel * classes + r) * 2 * M
    re, im = _product(re, im, k_ptr, CONJUGATE, HALF, WARPS, N1, N2)
    re, im = _signal(
        re, im, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, N1, N1, N2
    )  # fmt: skip
    tl.store(z_ptr + at, re.to(z_ptr.dtype.element_ty))
    tl.store(z_ptr + M + at, im.to(z_ptr.dtype.element_ty))
    if r == 0:
        k_scale = tl.load(k_scale_ptr + channel)
        if FOLDED:
            scale_a, scale_b = tl.load(scale_ptr), tl.load(scale_ptr + 1)
        tl.store(scale_ptr, k_scale * scale_a)
        tl.store(scale_ptr + 1, k_scale * scale_b)


@triton.jit
def _unfolded(
    z_ptr, scale_ptr, matrix_ptr, pair, out, t, classes, points, PRECISION: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the adjoint of the fold, (OUT, BLOCK), multiplied by the scales of the rows."""
    y = tl.zeros((OUT, BLOCK), tl.float32)
    z_ptr += pair * classes * 2 * points + t
    for k in range(0, IN, DEPTH):
        i = k + tl.arange(0, DEPTH)
        matrix = tl.load(matrix_ptr + out * IN + i[None, :])
        z = tl.load(z_ptr + i[:, None] * points, mask=i[:, None] < 2 * classes, other=0.0)
        y = tl.dot(matrix, z, y, input_precision=PRECISION)
    return y * tl.load(scale_ptr + 2 * pair + out % 2)


@triton.jit
def unfold_kernel(
    z_ptr,
    scale_ptr,
    other_ptr,
    other_scale_ptr,
    gate_ptr,
    y_ptr,
    matrix_ptr,
    first_channel,
    batch_size,
    length,
    classes,
    segments,
    points,
    stride_gb,
    stride_gc,
    stride_yb,
    stride_yc,
    GATED: tl.constexpr,
    OTHER: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put residue classes together to a sequence, and write y = gate · sequence + other one."""
    channel = tl.program_id(2).to(tl.int64)
    batch = 2 * tl.program_id(1).to(tl.int64)
    pair = channel * tl.num_programs(1) + tl.program_id(1)
    tiles = (2 * segments + OUT - 1) // OUT
    t = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    out = tl.program_id(0) % tiles * OUT + tl.arange(0, OUT)[:, None]
    row, s = out % 2, out // 2
    here = t + s * points
    ok = (here < length) & (batch + row < batch_size)
    y = _unfolded(
        z_ptr, scale_ptr, matrix_ptr, pair, out, t, classes, points, PRECISION,
        OUT, IN, DEPTH, BLOCK,
    )  # fmt: skip
    if GATED:
        gate_ptr += (first_channel + channel) * stride_gc + (batch + row) * stride_gb
        y *= tl.load(gate_ptr + here, mask=ok, other=0.0)
    if OTHER:
        y += _unfolded(
            other_ptr, other_scale_ptr, matrix_ptr, pair, out, t, classes, points, PRECISION,
            OUT, IN, DEPTH, BLOCK,
        )  # fmt: skip
    y_ptr += (first_channel + channel) * stride_yc + (batch + row) * stride_yb
    tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def correlation_kernel(
    x_ptr,
    grad_ptr,
    grad_k_ptr,
    scale_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    first_channel,
    batch_size,
    length,
    stride_xb,
    stride_xc,
    stride_gb,
    stride_gc,
    FOLDED: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TWIDDLES: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Compute the gradient Σ conj(x) · grad of a filter's spectrum, for one residue class.

    The sum is over pairs of batch rows. Products of the two rows of a pair only reach the imaginary
    part of the filter's gradient, which is not used. If `FOLDED`, x and grad are residue classes
    that `fold_kernel` wrote, and `scale` is that of their products.
    """
    M: tl.constexpr = N1 * N2
    r = tl.program_id(0)
    classes = tl.num_programs(0)
    channel = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, ROWS)[:, None] * N2 + tl.arange(0, N2)[None, :]
    pairs = (batch_size + 1) // 2
    if not FOLDED:
        x_ptr += (first_channel + channel) * stride_xc
        grad_ptr += (first_channel + channel) * stride_gc
    f1, f2 = _load_matrix(f1_ptr + r * 3 * N1 * ROWS, N1, ROWS), _load_matrix(f2_ptr, N2, N2)
    twiddle_ptr = _class_twiddles(twiddle_ptr, r, SPLIT, N1, N2)
    sum_re = tl.zeros((N1, N2), tl.float32)
    sum_im = tl.zeros((N1, N2), tl.float32)
    for i in range(pairs):
        if FOLDED:
            pair = channel * pairs + i
            here = (pair * classes + r) * 2 * M
            re, im = _load_class(grad_ptr + here, at, M)
        else:
            batch = 2 * tl.cast(i, tl.int64)
            second = batch + 1 < batch_size
            x, grad = x_ptr + batch * stride_xb, grad_ptr + batch * stride_gb
            a, b = _load_rows(grad, stride_gb, at, length, second)
            grad_a, grad_b = scale_of(largest_bits(a)), scale_of(largest_bits(b))
            re, im = scaled(a, grad_a[1], grad_a[2]), scaled(b, grad_b[1], grad_b[2])
        grad_re, grad_im = _spectrum(
            re, im, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, N1, N2
        )  # fmt: skip
        tl.debug_barrier()  # loading x earlier would take registers that there are not
        if FOLDED:
            re, im = _load_class(x_ptr + here, at, M)
            scale = tl.load(scale_ptr + 2 * pair)
        else:
            # Products of both rows are added in the spectrum: x is scaled so that they have one
            # scale.
            a, b = _load_rows(x, stride_xb, at, length, second)
            x_a, x_b = scale_of(largest_bits(a)), scale_of(largest_bits(b))
            scale = tl.maximum(tl.maximum(x_a[0] * grad_a[0], x_b[0] * grad_b[0]), SMALLEST_NORMAL)
            re = scaled(a, grad_a[0] / scale, x_a[2])
            im = scaled(b, grad_b[0] / scale, x_b[2])
            scale += (x_a[2] + x_b[2]) + (grad_a[2] + grad_b[2])
        tl.debug_barrier()  # loads the twiddles again, instead of keeping them
        re, im = _spectrum(
            re, im, f1, f2, twiddle_ptr, HALF, PRECISION, SPLIT, TWIDDLES, WARPS, N1, N2
        )  # fmt: skip
        sum_re += scale * (re * grad_re + im * grad_im)
        sum_im += scale * (re * grad_im - im * grad_re)
    grad_k_ptr += (channel * classes + r) * 2 * M + tl.arange(0, M)
    tl.store(grad_k_ptr, _as_stored(sum_re, 8 if HALF else 4, WARPS, N1, N2))
    tl.store(grad_k_ptr + M, _as_stored(sum_im, 8 if HALF else 4, WARPS, N1, N2))


@triton.jit
def gates_kernel(
    p_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    mask_ptr,
    w_ptr,
    gate_ptr,
    length,
    channels,
    stride_pb,
    stride_pc,
    stride_gb,
    stride_gc,
    stride_ob,
    stride_oc,
    BACKWARD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the gated convolution's input w and its gate x2, times grad if `BACKWARD`."""
    d = tl.program_id(1).to(tl.int64)
    batch = tl.zeros((1, 1), tl.int64) + tl.program_id(2)
    first = tl.program_id(0) * POSITIONS
    t = first + tl.arange(0, POSITIONS)[None, :]
    ok = t < length
    row = batch >= 0
    w = gated_tile(
        p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc,
        batch * stride_pb, batch, row, first, length, HAS_MASK, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    out = d * stride_oc + batch * stride_ob + t
    tl.store(w_ptr + out, w.to(w_ptr.dtype.element_ty), mask=ok)
    x2 = channels + d
    gate = conv_tile(
        p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, x2, batch * stride_pb, row,
        first, length, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    if BACKWARD:
        gate *= tl.load(grad_ptr + d * stride_gc + batch * stride_gb + t, mask=ok, other=0.0)
    tl.store(gate_ptr + out, gate.to(gate_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gates_grad_kernel(
    p_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    mask_ptr,
    conv_ptr,
    grad_w_ptr,
    grad_short_ptr,
    length,
    channels,
    stride_pb,
    stride_pc,
    stride_gb,
    stride_gc,
    stride_ob,
    stride_oc,
    stride_sb,
    stride_sc,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the gradients of x1, x2 and v: dx1 = dw · v, dx2 = grad · (k ∗ w), dv = dw · x1."""
    d = tl.program_id(1).to(tl.int64)
    batch = tl.zeros((1, 1), tl.int64) + tl.program_id(2)
    first = tl.program_id(0) * POSITIONS
    t = first + tl.arange(0, POSITIONS)[None, :]
    ok = t < length
    row = batch >= 0
    v = 2 * channels + d
    here = d * stride_oc + batch * stride_ob + t
    grad_w = tl.load(grad_w_ptr + here, mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        grad_w *= tl.load(mask_ptr + batch * length + t, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + d * stride_gc + batch * stride_gb + t, mask=ok, other=0.0)
    grad_x2 = grad.to(tl.float32) * tl.load(conv_ptr + here, mask=ok, other=0.0)
    x1 = conv_tile(
        p_ptr + d * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, d, batch * stride_pb, row,
        first, length, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    gate = conv_tile(
        p_ptr + v * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, v, batch * stride_pb, row,
        first, length, HAS_P_BIAS, False, 1, POSITIONS,
    )  # fmt: skip
    dtype = grad_short_ptr.dtype.element_ty
    out = grad_short_ptr + batch * stride_sb + t
    tl.store(out + d * stride_sc, (grad_w * gate).to(dtype), mask=ok)
    tl.store(out + (channels + d) * stride_sc, grad_x2.to(dtype), mask=ok)
    tl.store(out + v * stride_sc, (grad_w * x1).to(dtype), mask=ok)


def _gates(inputs: Inputs, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return w and x2 (times grad, if given), (B, L, D) with positions contiguous in memory."""
    p, weight, bias, mask, p_bias = (
        inputs.p, inputs.weight, inputs.bias, inputs.mask, inputs.p_bias
    )  # fmt: skip
    batch_size, length, channels = p.shape[0], p.shape[1], p.shape[2] // 3
    w = empty_sequence_last(p, channels)
    gate = torch.empty_like(w)
    given = w if grad is None else grad
    positions = tile(length, TILE)
    launch_kernel(
        gates_kernel,
        (cdiv(length, positions), channels, batch_size),
        p,
        given,
        weight,
        bias,
        p if p_bias is None else p_bias,
        p if mask is None else mask,
        w,
        gate,
        length,
        channels,
        *strides(p),
        *strides(given),
        *strides(w),
        BACKWARD=grad is not None,
        HAS_MASK=mask is not None,
        HAS_P_BIAS=p_bias is not None,
        POSITIONS=positions,
        num_warps=4,
    )
    return w, gate


def _class_bytes(plan: Plan, batch_size: int) -> int:
    """Return the memory that the residue classes of one channel take."""
    pairs = cdiv(batch_size, 2)
    return pairs * plan.classes * 2 * plan.config.points * plan.operand.itemsize


def _empty_classes(x: Tensor, channels: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return memory for residue classes and their scales, (channels, pairs, …)."""
    shape = channels, cdiv(x.shape[0], 2)
    z = torch.empty(
        *shape, plan.classes, 2, plan.config.points, dtype=plan.operand, device=x.device
    )
    return z, torch.empty(*shape, 2, dtype=torch.float32, device=x.device)


def _fold_tiles(matrix: Tensor, plan: Plan) -> dict[str, Any]:
    """Return the compile-time arguments of a product with a matrix that folds or unfolds."""
    rows, columns = (min(size, 32) for size in matrix.shape)
    block = (256 if rows == columns == 16 else 64) // (plan.operand.itemsize // 2)
    return {
        "PRECISION": plan.constants["PRECISION"],
        "OUT": rows,
        "IN": matrix.shape[1],
        "DEPTH": columns,
        "BLOCK": min(plan.config.points, block),
    }


def _fold(
    x: Tensor, chunk: slice, plan: Plan, other_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fold some channels of x (B, L, D) into residue classes; see `fold_kernel`."""
    z, scale = _empty_classes(x, chunk.stop - chunk.start, plan)
    tiles = _fold_tiles(plan.tables.fold, plan)
    launch_kernel(
        fold_kernel,
        (z.shape[1], z.shape[0], cdiv(2 * plan.classes, tiles["OUT"])),
        x,
        z,
        scale,
        scale if other_scale is None else other_scale,
        plan.tables.fold,
        chunk.start,
        x.shape[0],
        x.shape[1],
        plan.classes,
        plan.config.points,
        *strides(x),
        JOINT=other_scale is not None,
        HALF=plan.constants["HALF"],
        **tiles,
        WHOLE=TILE,
        num_warps=4,
    )
    return z, scale


def _classes(
    x: Tensor, filters: tuple[Tensor, Tensor], chunk: slice, plan: Plan, conjugate: bool = False
) -> tuple[Tensor, Tensor]:
    """Convolve some channels of x (B, L, D) by residue classes; the filters are spectra.

    Returns (channels, pairs, C, 2, M), and what multiplies it, (channels, pairs, 2).
    """
    k, k_scale = filters[0][chunk], filters[1][chunk]
    channels, pairs = k.shape[0], cdiv(x.shape[0], 2)
    z, scale = _fold(x, chunk, plan) if plan.folded else _empty_classes(x, channels, plan)
    launch_kernel(
        cyclic_conv_kernel,
        (plan.classes, pairs, channels),
        x,
        k,
        k_scale,
        z,
        scale,
        plan.tables.f1,
        plan.tables.f2,
        plan.tables.twiddle,
        chunk.start,
        x.shape[0],
        x.shape[1],
        *strides(x),
        CONJUGATE=conjugate,
        FOLDED=plan.folded,
        **plan.constants,
    )
    return z, scale


def _unfold(
    classes: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor] | None,
    gate: Tensor | None,
    y: Tensor,
    chunk: slice,
    plan: Plan,
) -> None:
    """Write channels of y (B, L, D): the sequences in residue classes, times gate, plus others."""
    batch_size, length, _ = y.shape
    points, (z, scale) = plan.config.points, classes
    tiles = _fold_tiles(plan.tables.unfold, plan)
    programs = cdiv(points, tiles["BLOCK"]) * cdiv(2 * plan.segments, tiles["OUT"])
    launch_kernel(
        unfold_kernel,
        (programs, z.shape[1], z.shape[0]),
        z,
        scale,
        *(other or classes),
        y if gate is None else gate,
        y,
        plan.tables.unfold,
        chunk.start,
        batch_size,
        length,
        plan.classes,
        plan.segments,
        points,
        *strides(y if gate is None else gate),
        *strides(y),
        GATED=gate is not None,
        OTHER=other is not None,
        **tiles,
        num_warps=4,
    )


def _parts(channels: int, plan: Plan, batch_size: int, convolutions: int) -> list[slice]:
    """Cut the channels into slices whose residue classes fit in the workspace."""
    return chunks(channels, convolutions * _class_bytes(plan, batch_size), WORKSPACE_BYTES)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return sequence_last(x if mask is None else x * mask[..., None])


def _term(
    term: str,
    inputs: Inputs,
    x: Tensor,
    filters: tuple[Tensor, Tensor],
    y: Tensor,
    plan: Plan,
    add: bool = False,
    source: Tensor | None = None,
) -> None:
    """Launch `monarch_conv_kernel`, which writes y (B, L, …) and, if given, source (B, L, D)."""
    p, mask, p_bias = inputs.p, inputs.mask, inputs.p_bias
    batch_size, length, channels = p.shape[0], p.shape[1], p.shape[2] // 3
    launch_kernel(
        monarch_conv_kernel,
        (cdiv(batch_size, 2), channels),
        p,
        x,
        inputs.weight,
        inputs.bias,
        p if p_bias is None else p_bias,
        p if mask is None else mask,
        *filters,
        y,
        y if source is None else source,
        plan.tables.f1,
        plan.tables.f2,
        plan.tables.twiddle,
        batch_size,
        length,
        channels,
        *strides(p),
        *strides(x),
        *strides(y),
        TERM=term,
        ADD=add,
        HAS_MASK=mask is not None,
        HAS_P_BIAS=p_bias is not None,
        ROWS=plan.rows,
        **plan.constants,
    )


def _taps_grads(pairs: Sequence[tuple[Tensor, Tensor]], plan: Plan) -> list[Tensor]:
    """Return the gradient of the taps (D, 2L − 1) of each k ∗ x.

    Args:
        pairs: x and the gradient of k ∗ x, (B, L, D) with positions contiguous in memory.
        plan: How they are correlated.
    """
    batch_size, length, channels = pairs[0][1].shape
    points, device = plan.config.points, pairs[0][1].device
    grad_taps = torch.empty(
        len(pairs), channels, 2 * length - 1, dtype=torch.float32, device=device
    )
    each = 8 * plan.classes * points
    if plan.folded:
        each += 2 * _class_bytes(plan, batch_size)
    for rows in chunks(len(pairs) * channels, each, SPECTRUM_BYTES + WORKSPACE_BYTES):
        shape = rows.stop - rows.start, plan.classes, 2, points
        grad_k = torch.empty(shape, dtype=torch.float32, device=device)
        for i, chunk, here in split_rows(rows, channels):
            _correlate(*pairs[i], grad_k[here], chunk, plan)
        taps_of(grad_k, grad_taps.flatten(0, 1)[rows], plan)
    return [*grad_taps.unbind()]


def _correlate(x: Tensor, grad: Tensor, grad_k: Tensor, chunk: slice, plan: Plan) -> None:
    """Launch `correlation_kernel`: write grad_k (channels, C, 2, M) of some channels."""
    batch_size, length, _ = grad.shape
    given, scale = (x, grad), grad_k
    if plan.folded:
        grad_z, grad_scale = _fold(grad, chunk, plan)
        x_z, scale = _fold(x, chunk, plan, grad_scale)
        given = x_z, grad_z
    launch_kernel(
        correlation_kernel,
        (plan.classes, len(grad_k)),
        *given,
        grad_k,
        scale,
        plan.tables.f1,
        plan.tables.f2,
        plan.tables.twiddle,
        chunk.start,
        batch_size,
        length,
        *strides(x),
        *strides(grad),
        FOLDED=plan.folded,
        ROWS=plan.rows,
        **plan.constants,
    )


def _convolve(x: Tensor, filters: tuple[Tensor, Tensor], plan: Plan, conjugate: bool) -> Tensor:
    """Return the convolution of x (B, L, D) with filters, or with them backwards.

    The filters are spectra, and there are residue classes.
    """
    y = empty_sequence_last(x, x.shape[2])
    for chunk in _parts(x.shape[2], plan, x.shape[0], 1):
        _unfold(_classes(x, filters, chunk, plan, conjugate), None, None, y, chunk, plan)
    return y


def forward(inputs: Inputs, causal: bool, largest: bool = False) -> Tensor:
    """Compute `gated_long_conv_op` for any length; `largest` as in `plan_for`."""
    inputs = inputs._replace(p=sequence_last(inputs.p))
    taps, res_taps, mask = inputs.taps, inputs.res_taps, inputs.mask
    plan = plan_for("convolve", inputs.p, largest)
    y = empty_sequence_last(inputs.p, inputs.p.shape[2] // 3)
    filters = spectra([taps] if res_taps is None else [taps, res_taps], plan)
    residual = inputs.u is not None and res_taps is not None
    if plan.residues == 1:
        if inputs.u is not None and res_taps is not None:
            _term("residual", inputs, sequence_last(inputs.u), filters[1], y, plan)
        _term("gated", inputs, y, filters[0], y, plan, add=residual)
        return y
    w, gate = _gates(inputs, None)
    u = None if inputs.u is None else _masked(inputs.u, mask)
    for chunk in _parts(y.shape[2], plan, y.shape[0], 1 + residual):
        gated = _classes(w, filters[0], chunk, plan)
        other = None if u is None else _classes(u, filters[1], chunk, plan)
        _unfold(gated, other, gate, y, chunk, plan)
    return y


def backward(grad: Tensor, inputs: Inputs, largest: bool = False) -> Gradients:
    """Compute `backward_op` for any length, bitwise reproducibly; `largest` as in `plan_for`."""
    grad, inputs = sequence_last(grad), inputs._replace(p=sequence_last(inputs.p))
    p, u, weight, _, taps, res_taps, mask, _ = inputs
    batch_size, length, channels = grad.shape
    grad_u = p.new_empty(0)
    plan, correlation = plan_for("convolve", p, largest), plan_for("correlate", p)
    whole = plan.residues == 1
    filters = spectra([taps] if res_taps is None else [taps, res_taps], plan)
    grad_short = p.new_empty(3 * channels, batch_size, length)
    if whole:
        grads = grad_short.permute(1, 2, 0)
        w, gated_grad = empty_sequence_last(p, channels), empty_sequence_last(p, channels)
        _term("grad_x2", inputs, grad, filters[0], grads, plan, source=w)
        _term("grad_w", inputs, grad, filters[0], grads, plan, source=gated_grad)
    else:
        w, gated_grad = _gates(inputs, grad)
        conv = _convolve(w, filters[0], plan, conjugate=False)
        grad_w = _convolve(gated_grad, filters[0], plan, conjugate=True)
        _gates_grad(inputs, grad, conv, grad_w, grad_short)
        del conv, grad_w
    pairs = [(w, gated_grad)]
    if u is not None and res_taps is not None:
        pairs.append((_masked(u, mask), grad))
        if whole:
            grad_u = empty_sequence_last(u, channels)
            _term("grad_u", inputs, grad, filters[1], grad_u, plan)
        else:
            grad_u = _convolve(grad, filters[1], plan, conjugate=True)
            grad_u = grad_u if mask is None else grad_u * mask[..., None]
    grad_taps, *rest = _taps_grads(pairs, correlation)
    grad_res_taps = rest[0] if rest else taps.new_empty(0)
    grad_p, grad_weight, grad_bias, grad_p_bias = short_conv_backward(
        grad_short.permute(1, 2, 0), p, weight, inputs.p_bias
    )
    return Gradients(grad_p, grad_u, grad_weight, grad_bias, grad_p_bias, grad_taps, grad_res_taps)


def _gates_grad(
    inputs: Inputs, grad: Tensor, conv: Tensor, grad_w: Tensor, grad_short: Tensor
) -> None:
    """Write the gradients (3D, B, L) of x1, x2 and v; the others are (B, L, …)."""
    p, mask, p_bias = inputs.p, inputs.mask, inputs.p_bias
    batch_size, length, channels = grad.shape
    positions = tile(length, TILE)
    launch_kernel(
        gates_grad_kernel,
        (cdiv(length, positions), channels, batch_size),
        p,
        grad,
        inputs.weight,
        inputs.bias,
        p if p_bias is None else p_bias,
        p if mask is None else mask,
        conv,
        grad_w,
        grad_short,
        length,
        channels,
        *strides(p),
        *strides(grad),
        *strides(conv),
        length,
        batch_size * length,
        HAS_MASK=mask is not None,
        HAS_P_BIAS=p_bias is not None,
        POSITIONS=positions,
        num_warps=4,
    )
