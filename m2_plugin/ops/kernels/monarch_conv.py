"""Triton kernels of the mixer's core for long sequences: long convolutions by Monarch FFTs.

Dimension key: B batch, L sequence, D channels, N ≥ 2L − 1 circular length, N = R · M,
M = N1 · N2 points in one transform, R residues, S = ⌈L / M⌉ segments.

`ops/README.md` derives the method: FFTs of M points as Monarch matrices, two batch rows as one
complex sequence, frequencies in R residue classes. Spectra are stored by residue class: (D, real
and imaginary, R, N1, N2), where frequency R · (k1 + N1 · k2) + r is at (r, k1, k2).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.gates import Inputs, gated, short_conv, short_conv_grad
from m2_plugin.ops.kernels.launch import (
    device_class,
    dot_precision,
    empty_sequence_last,
    sequence_last,
    strides,
    tile,
)


@dataclass(frozen=True)
class Config:
    """The two factors of a transform, and the number of warps."""

    n1: int
    n2: int
    num_warps: int

    @property
    def points(self) -> int:
        """M, the points of one transform."""
        return self.n1 * self.n2


# By direction, device class and bytes per element: the largest transforms that spill no registers
# (`tests/ops/aot.py`), each with the longest sequence that it is for (None: no limit).
CONFIGS = {
    ("forward", "large", 2): (
        (2048, Config(n1=64, n2=32, num_warps=4)),
        (None, Config(n1=64, n2=64, num_warps=4)),
    ),
    ("forward", "small", 2): (
        (2048, Config(n1=64, n2=16, num_warps=4)),
        (None, Config(n1=64, n2=32, num_warps=4)),
    ),
    ("backward", "large", 2): (
        (8192, Config(n1=64, n2=32, num_warps=4)),
        (None, Config(n1=128, n2=32, num_warps=8)),
    ),
    ("backward", "small", 2): ((None, Config(n1=64, n2=16, num_warps=2)),),
    ("forward", "large", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
    ("forward", "small", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
    ("backward", "large", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
    ("backward", "small", 4): ((None, Config(n1=32, n2=16, num_warps=4)),),
}
# Memory for spectra and folded sequences. As many channels as fit are convolved at a time.
WORKSPACE_BYTES = 256 << 20
# Smaller sequences are not scaled: the reciprocal of the smallest fp32 numbers is infinite.
SMALLEST_SCALE = tl.constexpr(1e-30)
# Positions of a residue class that one program folds or unfolds.
FOLD_BLOCK = 256


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
def _operand(x, HALF: tl.constexpr):
    return x.to(tl.float16) if HALF else x


@triton.jit
def _normalised(re, im, HALF: tl.constexpr):
    """Scale a tile so that half precision holds it and its transform; also return the scale."""
    scale = 1.0
    if HALF:
        scale = tl.maximum(tl.max(tl.abs(re)), tl.max(tl.abs(im)))
        scale = tl.where(scale > SMALLEST_SCALE, scale, 1.0)
        re, im = re * (1.0 / scale), im * (1.0 / scale)
    return _operand(re, HALF), _operand(im, HALF), scale


@triton.jit
def _load_matrix(ptr, SIZE: tl.constexpr):
    """Load a DFT matrix (3, SIZE, SIZE): real, imaginary, negated imaginary."""
    at = ptr + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(at), tl.load(at + SIZE * SIZE), tl.load(at + 2 * SIZE * SIZE)


@triton.jit
def _spectrum(
    re, im, at, f1_ptr, f2_ptr, twiddle_ptr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Compute the DFT of M complex points; `at` are their offsets in a table (N1, N2)."""
    re, im, scale = _normalised(re, im, HALF)
    re, im = _from_left(_load_matrix(f1_ptr, N1), re, im, PRECISION)
    cos, sin = tl.load(twiddle_ptr + at), tl.load(twiddle_ptr + N1 * N2 + at)
    turned = _operand(re * cos - im * sin, HALF)
    im = _operand(re * sin + im * cos, HALF)
    re, im = _from_right(turned, im, _load_matrix(f2_ptr, N2), PRECISION)
    return re * scale, im * scale


@triton.jit
def _signal(
    re, im, at, f1_ptr, f2_ptr, twiddle_ptr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Compute the adjoint of `_spectrum`, which is M times its inverse."""
    re, im, scale = _normalised(re, im, HALF)
    # Separate tables, although they are the conjugates: shared ones would stay in registers.
    re, im = _from_right(re, im, _load_matrix(f2_ptr + 3 * N2 * N2, N2), PRECISION)
    cos, sin = tl.load(twiddle_ptr + 2 * N1 * N2 + at), tl.load(twiddle_ptr + 3 * N1 * N2 + at)
    turned = _operand(re * cos - im * sin, HALF)
    im = _operand(re * sin + im * cos, HALF)
    re, im = _from_left(_load_matrix(f1_ptr + 3 * N1 * N1, N1), turned, im, PRECISION)
    return re * scale, im * scale


@triton.jit
def monarch_conv_kernel(
    x_ptr,
    spectrum_ptr,
    y_ptr,
    sums_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    first_channel,
    batch_size,
    length,
    stride_xb,
    stride_xc,
    stride_yb,
    stride_yc,
    MULTIPLY: tl.constexpr,
    RESIDUES: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Replace y by y · (k ∗ x) or y + (k ∗ x), for one channel and two batch rows, L ≤ M."""
    M: tl.constexpr = N1 * N2
    channel = tl.program_id(0).to(tl.int64)
    batch = 2 * tl.program_id(1).to(tl.int64)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    x_ptr += (first_channel + channel) * stride_xc + batch * stride_xb
    y_ptr += (first_channel + channel) * stride_yc + batch * stride_yb
    sums_ptr += (channel * tl.num_programs(1) + tl.program_id(1)) * 2 * M
    spectrum_ptr += 2 * channel * RESIDUES * M
    in_first = at < length
    in_second = in_first & (batch + 1 < batch_size)
    for r in tl.static_range(RESIDUES):
        f1, twiddle = f1_ptr + r * 6 * N1 * N1, twiddle_ptr + r * 4 * M
        re = tl.load(x_ptr + at, mask=in_first, other=0.0).to(tl.float32)
        im = tl.load(x_ptr + stride_xb + at, mask=in_second, other=0.0).to(tl.float32)
        re, im = _spectrum(re, im, at, f1, f2_ptr, twiddle, HALF, PRECISION, N1, N2)
        k_re = tl.load(spectrum_ptr + r * M + at)
        k_im = tl.load(spectrum_ptr + (RESIDUES + r) * M + at)
        re, im = re * k_re - im * k_im, re * k_im + im * k_re
        re, im = _signal(re, im, at, f1, f2_ptr, twiddle, HALF, PRECISION, N1, N2)
        if r > 0:
            re += tl.load(sums_ptr + at)
            im += tl.load(sums_ptr + M + at)
        if r < RESIDUES - 1:
            tl.store(sums_ptr + at, re)
            tl.store(sums_ptr + M + at, im)
            tl.debug_barrier()
        else:
            there = tl.load(y_ptr + at, mask=in_first, other=0.0)
            re = re * there if MULTIPLY else re + there
            tl.store(y_ptr + at, re.to(y_ptr.dtype.element_ty), mask=in_first)
            there = tl.load(y_ptr + stride_yb + at, mask=in_second, other=0.0)
            im = im * there if MULTIPLY else im + there
            tl.store(y_ptr + stride_yb + at, im.to(y_ptr.dtype.element_ty), mask=in_second)


@triton.jit
def fold_kernel(
    x_ptr,
    z_ptr,
    phase_ptr,
    first_channel,
    batch_size,
    length,
    residues,
    segments,
    points,
    stride_xb,
    stride_xc,
    BLOCK: tl.constexpr,
):
    """Compute z_r[t] = Σ_s e^{−2πi·rs/R} x[t + M·s], where x is a pair of batch rows.

    z is (channel, pair, R, real and imaginary, M).
    """
    channel = tl.program_id(0).to(tl.int64)
    batch = 2 * tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += (first_channel + channel) * stride_xc + batch * stride_xb
    z_ptr += (channel * tl.num_programs(1) + tl.program_id(1)) * 2 * residues * points
    for r in range(residues):
        re = tl.zeros((BLOCK,), tl.float32)
        im = tl.zeros((BLOCK,), tl.float32)
        for s in range(segments):
            here = t + s * points
            ok = here < length
            a = tl.load(x_ptr + here, mask=ok, other=0.0).to(tl.float32)
            ok &= batch + 1 < batch_size
            b = tl.load(x_ptr + stride_xb + here, mask=ok, other=0.0).to(tl.float32)
            cos = tl.load(phase_ptr + 2 * (r * segments + s))
            sin = tl.load(phase_ptr + 2 * (r * segments + s) + 1)
            re += a * cos - b * sin
            im += a * sin + b * cos
        tl.store(z_ptr + 2 * r * points + t, re)
        tl.store(z_ptr + (2 * r + 1) * points + t, im)


@triton.jit
def unfold_kernel(
    z_ptr,
    y_ptr,
    phase_ptr,
    first_channel,
    batch_size,
    length,
    residues,
    segments,
    points,
    stride_yb,
    stride_yc,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the adjoint of `fold_kernel`; set y to it, or multiply y by it, or add it to y."""
    channel = tl.program_id(0).to(tl.int64)
    batch = 2 * tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    y_ptr += (first_channel + channel) * stride_yc + batch * stride_yb
    z_ptr += (channel * tl.num_programs(1) + tl.program_id(1)) * 2 * residues * points
    for s in range(segments):
        a = tl.zeros((BLOCK,), tl.float32)
        b = tl.zeros((BLOCK,), tl.float32)
        for r in range(residues):
            re = tl.load(z_ptr + 2 * r * points + t)
            im = tl.load(z_ptr + (2 * r + 1) * points + t)
            cos = tl.load(phase_ptr + 2 * (r * segments + s))
            sin = tl.load(phase_ptr + 2 * (r * segments + s) + 1)
            a += re * cos + im * sin
            b += im * cos - re * sin
        here = t + s * points
        ok = here < length
        second = ok & (batch + 1 < batch_size)
        if HOW == "multiply":
            a *= tl.load(y_ptr + here, mask=ok, other=0.0)
            b *= tl.load(y_ptr + stride_yb + here, mask=second, other=0.0)
        if HOW == "add":
            a += tl.load(y_ptr + here, mask=ok, other=0.0)
            b += tl.load(y_ptr + stride_yb + here, mask=second, other=0.0)
        tl.store(y_ptr + here, a.to(y_ptr.dtype.element_ty), mask=ok)
        tl.store(y_ptr + stride_yb + here, b.to(y_ptr.dtype.element_ty), mask=second)


@triton.jit
def cyclic_conv_kernel(
    z_ptr,
    spectrum_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    residues,
    TRANSFORM: tl.constexpr,
    CONVOLVE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Convolve one residue class in place, for one channel and two batch rows.

    `TRANSFORM` replaces z by its spectrum, `CONVOLVE` replaces a spectrum of z by the signal k ∗ z.
    """
    M: tl.constexpr = N1 * N2
    channel = tl.program_id(0).to(tl.int64)
    r = tl.program_id(2)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    program = (channel * tl.num_programs(1) + tl.program_id(1)) * residues + r
    z_ptr += program * 2 * M
    f1_ptr += r * 6 * N1 * N1
    twiddle_ptr += r * 4 * M
    re, im = tl.load(z_ptr + at), tl.load(z_ptr + M + at)
    if TRANSFORM:
        re, im = _spectrum(re, im, at, f1_ptr, f2_ptr, twiddle_ptr, HALF, PRECISION, N1, N2)
    if CONVOLVE:
        spectrum_ptr += (2 * channel * residues + r) * M
        k_re, k_im = tl.load(spectrum_ptr + at), tl.load(spectrum_ptr + residues * M + at)
        re, im = re * k_re - im * k_im, re * k_im + im * k_re
        re, im = _signal(re, im, at, f1_ptr, f2_ptr, twiddle_ptr, HALF, PRECISION, N1, N2)
    tl.store(z_ptr + at, re)
    tl.store(z_ptr + M + at, im)


@triton.jit
def cyclic_correlation_kernel(
    grad_ptr,
    z_ptr,
    spectrum_ptr,
    grad_spectrum_ptr,
    f1_ptr,
    f2_ptr,
    twiddle_ptr,
    pairs,
    residues,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Compute the gradients of k ∗ z for one channel and residue class; that of z replaces `grad`.

    z is given as its spectrum. The gradients are products with a conjugate spectrum: conj(k) · grad
    for z and Σ conj(z) · grad for k, summed over pairs of batch rows. Products of the two rows of a
    pair only reach the imaginary part of the filter's gradient, which is not used.
    """
    M: tl.constexpr = N1 * N2
    channel = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    z_ptr += (channel * pairs * residues + r) * 2 * M
    grad_ptr += (channel * pairs * residues + r) * 2 * M
    spectrum_ptr += (2 * channel * residues + r) * M
    grad_spectrum_ptr += (2 * channel * residues + r) * M
    f1_ptr += r * 6 * N1 * N1
    twiddle_ptr += r * 4 * M
    for pair in range(pairs):
        re, im = tl.load(grad_ptr + at), tl.load(grad_ptr + M + at)
        re, im = _spectrum(re, im, at, f1_ptr, f2_ptr, twiddle_ptr, HALF, PRECISION, N1, N2)
        z_re, z_im = tl.load(z_ptr + at), tl.load(z_ptr + M + at)
        grad_re = z_re * re + z_im * im
        grad_im = z_re * im - z_im * re
        # The sum is kept in memory, because the registers hold only one sequence at a time.
        if pair > 0:
            grad_re += tl.load(grad_spectrum_ptr + at)
            grad_im += tl.load(grad_spectrum_ptr + residues * M + at)
        tl.store(grad_spectrum_ptr + at, grad_re)
        tl.store(grad_spectrum_ptr + residues * M + at, grad_im)
        tl.debug_barrier()
        k_re, k_im = tl.load(spectrum_ptr + at), tl.load(spectrum_ptr + residues * M + at)
        re, im = re * k_re + im * k_im, im * k_re - re * k_im
        re, im = _signal(re, im, at, f1_ptr, f2_ptr, twiddle_ptr, HALF, PRECISION, N1, N2)
        tl.store(grad_ptr + at, re)
        tl.store(grad_ptr + M + at, im)
        z_ptr += residues * 2 * M
        grad_ptr += residues * 2 * M


@triton.jit
def gates_kernel(
    p_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
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
    POSITIONS: tl.constexpr,
):
    """Compute the gated convolution's input w and its gate x2, times grad if `BACKWARD`."""
    d = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * POSITIONS + tl.arange(0, POSITIONS)
    ok = t < length
    w = gated(
        p_ptr, weight_ptr, bias_ptr, mask_ptr, d, channels, stride_pc, batch * stride_pb, batch, t,
        length, ok, HAS_MASK,
    )  # fmt: skip
    out = d * stride_oc + batch * stride_ob + t
    tl.store(w_ptr + out, w.to(w_ptr.dtype.element_ty), mask=ok)
    x2 = channels + d
    gate = short_conv(
        p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, x2, batch * stride_pb, t, length, ok
    )
    if BACKWARD:
        gate *= tl.load(grad_ptr + d * stride_gc + batch * stride_gb + t, mask=ok, other=0.0)
    tl.store(gate_ptr + out, gate.to(gate_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gates_grad_kernel(
    p_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    conv_ptr,
    grad_w_ptr,
    grad_short_ptr,
    batch_size,
    length,
    channels,
    stride_pb,
    stride_pc,
    stride_gb,
    stride_gc,
    stride_ob,
    stride_oc,
    HAS_MASK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the gradients (3D, B, L) of x1, x2 and v.

    dx1 = dw · v, dx2 = grad · (k ∗ w), dv = dw · x1.
    """
    d = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * POSITIONS + tl.arange(0, POSITIONS)
    ok = t < length
    rows = batch * stride_pb
    v = 2 * channels + d
    here = d * stride_oc + batch * stride_ob + t
    grad_w = tl.load(grad_w_ptr + here, mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        grad_w *= tl.load(mask_ptr + batch * length + t, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + d * stride_gc + batch * stride_gb + t, mask=ok, other=0.0)
    grad_x2 = grad.to(tl.float32) * tl.load(conv_ptr + here, mask=ok, other=0.0)
    x1 = short_conv(p_ptr + d * stride_pc, weight_ptr, bias_ptr, d, rows, t, length, ok)
    gate = short_conv(p_ptr + v * stride_pc, weight_ptr, bias_ptr, v, rows, t, length, ok)
    dtype = grad_short_ptr.dtype.element_ty
    out = grad_short_ptr + batch * length + t
    plane = batch_size.to(tl.int64) * length
    tl.store(out + d * plane, (grad_w * gate).to(dtype), mask=ok)
    tl.store(out + (channels + d) * plane, grad_x2.to(dtype), mask=ok)
    tl.store(out + v * plane, (grad_w * x1).to(dtype), mask=ok)


@dataclass(frozen=True)
class Plan:
    """How sequences of a length are transformed, and the tables for it."""

    config: Config
    residues: int
    segments: int
    f1: Tensor  # (R, 6, N1, N1): real, imaginary, negated imaginary part; then of the adjoint
    f2: Tensor  # (6, N2, N2)
    twiddle: Tensor  # (R, 4, N1, N2), fp32: the twiddles and their conjugates
    phases: Tensor  # (R, S, 2), fp32
    dtype: torch.dtype

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernels."""
        return {
            "HALF": self.dtype != torch.float32,
            "PRECISION": dot_precision(self.dtype),
            "N1": self.config.n1,
            "N2": self.config.n2,
            "num_warps": self.config.num_warps,
            "num_stages": 1,
        }

    @property
    def points(self) -> int:
        """N, the circular length."""
        return self.residues * self.config.points


def config_for(direction: str, x: Tensor) -> Config:
    """Return the configuration for sequences x (B, L, D)."""
    configs = CONFIGS[direction, device_class(x.device), x.element_size()]
    return next(c for longest, c in configs if longest is None or x.shape[1] <= longest)


def plan_for(direction: str, x: Tensor) -> Plan:
    """Return the plan for sequences x (B, L, D)."""
    config, length = config_for(direction, x), x.shape[1]
    residues = triton.cdiv(2 * length - 1, config.points)
    return _plan(config, residues, triton.cdiv(length, config.points), x.dtype, x.device)


@lru_cache(maxsize=16)
def _plan(
    config: Config, residues: int, segments: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    # If sequences are not fp32, the tensor cores multiply float16: bfloat16 is too coarse for four
    # products in a row.
    operand = torch.float32 if dtype == torch.float32 else torch.float16
    n1, n2 = config.n1, config.n2

    def ramp(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float64)

    def turn(angle: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(2 * math.pi * angle), -torch.sin(2 * math.pi * angle)

    shifted = ramp(n1) + ramp(residues)[:, None] / residues  # k1 + r/R
    cos, sin = turn(shifted[..., None] * ramp(n1) / n1)
    f1 = torch.stack([cos, sin, -sin, cos.mT, -sin.mT, sin.mT], 1)
    cos, sin = turn(shifted[..., None] * ramp(n2) / config.points)
    twiddle = torch.stack([cos, sin, cos, -sin], 1)
    cos, sin = turn(ramp(n2)[:, None] * ramp(n2) / n2)
    f2 = torch.stack([cos, sin, -sin, cos, -sin, sin])
    phases = torch.stack(turn(ramp(residues)[:, None] * ramp(segments) / residues), -1)
    return Plan(
        config,
        residues,
        segments,
        f1.to(device, operand),
        f2.to(device, operand),
        twiddle.to(device, torch.float32),
        phases.to(device, torch.float32),
        dtype,
    )


def spectrum(taps: Tensor, plan: Plan) -> Tensor:
    """Transform taps (D, 2L − 1), fp32, to (D, 2, R, N1, N2), divided by N."""
    length = (taps.shape[1] + 1) // 2
    between = taps.new_zeros(taps.shape[0], plan.points - taps.shape[1])
    circle = torch.cat([taps[:, length - 1 :], between, taps[:, : length - 1]], 1)
    k = torch.fft.fft(circle, norm="forward")
    k = k.unflatten(1, (plan.config.n2, plan.config.n1, plan.residues)).permute(0, 3, 2, 1)
    return torch.stack([k.real, k.imag], 1)


def taps_of(grad: Tensor, length: int) -> Tensor:
    """Transform the gradient (D, 2, R, N1, N2) of a spectrum back to taps (D, 2L − 1)."""
    k = torch.complex(grad[:, 0], grad[:, 1]).permute(0, 3, 2, 1).flatten(1)
    circle = torch.fft.ifft(k).real
    return torch.cat([circle[:, circle.shape[1] - (length - 1) :], circle[:, :length]], 1)


def _chunks(channels: int, bytes_each: int) -> list[slice]:
    """Cut the channels into slices that fit in the workspace."""
    together = min(max(1, WORKSPACE_BYTES // bytes_each), channels)
    return [slice(first, min(first + together, channels)) for first in range(0, channels, together)]


def _gates(inputs: Inputs, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return w and x2 (times grad, if given), (B, L, D) with positions contiguous in memory."""
    p, _, weight, bias, _, _, mask = inputs
    batch_size, length, channels = p.shape[0], p.shape[1], p.shape[2] // 3
    w = empty_sequence_last(p, channels)
    gate = torch.empty_like(w)
    given = w if grad is None else grad
    positions = tile(length, 1024)
    gates_kernel[channels, batch_size, triton.cdiv(length, positions)](
        p,
        given,
        weight,
        bias,
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
        POSITIONS=positions,
        num_warps=4,
    )
    return w, gate


def _fold(x: Tensor, chunk: slice, plan: Plan) -> Tensor:
    """Return the residue classes (channels, pairs, R, 2, M) of sequences (B, L, D), fp32."""
    batch_size, length, _ = x.shape
    pairs, points = triton.cdiv(batch_size, 2), plan.config.points
    shape = chunk.stop - chunk.start, pairs, plan.residues, 2, points
    z = torch.empty(shape, dtype=torch.float32, device=x.device)
    fold_kernel[shape[0], pairs, points // FOLD_BLOCK](
        x,
        z,
        plan.phases,
        chunk.start,
        batch_size,
        length,
        plan.residues,
        plan.segments,
        points,
        *strides(x),
        BLOCK=FOLD_BLOCK,
        num_warps=4,
    )
    return z


def _unfold(z: Tensor, y: Tensor, chunk: slice, plan: Plan, how: str) -> None:
    """Set, multiply or increase channels of y (B, L, D) by the sequences in residue classes."""
    batch_size, length, _ = y.shape
    points = plan.config.points
    unfold_kernel[z.shape[0], z.shape[1], points // FOLD_BLOCK](
        z,
        y,
        plan.phases,
        chunk.start,
        batch_size,
        length,
        plan.residues,
        plan.segments,
        points,
        *strides(y),
        HOW=how,
        BLOCK=FOLD_BLOCK,
        num_warps=4,
    )


def _convolve(x: Tensor, taps: Tensor, y: Tensor, how: str) -> None:
    """Multiply y by taps ∗ x, or add it to y, in place.

    Args:
        x: (B, L, D), positions contiguous in memory.
        taps: (D, 2L − 1), fp32.
        y: (B, L, D), positions contiguous in memory.
        how: `multiply` or `add`.
    """
    batch_size, length, channels = x.shape
    plan = plan_for("forward", x)
    pairs, points = triton.cdiv(batch_size, 2), plan.config.points
    whole = plan.segments == 1
    between = (2 * points * (plan.residues > 1)) if whole else 2 * plan.points
    for chunk in _chunks(channels, 4 * pairs * between + 16 * plan.points):
        k = spectrum(taps[chunk], plan)
        if whole:
            monarch_conv_kernel[k.shape[0], pairs](
                x,
                k,
                y,
                k.new_empty(k.shape[0] * pairs * between),
                plan.f1,
                plan.f2,
                plan.twiddle,
                chunk.start,
                batch_size,
                length,
                *strides(x),
                *strides(y),
                MULTIPLY=how == "multiply",
                RESIDUES=plan.residues,
                **plan.constants,
            )
            continue
        z = _fold(x, chunk, plan)
        cyclic_conv_kernel[k.shape[0], pairs, plan.residues](
            z,
            k,
            plan.f1,
            plan.f2,
            plan.twiddle,
            plan.residues,
            TRANSFORM=True,
            CONVOLVE=True,
            **plan.constants,
        )
        _unfold(z, y, chunk, plan, how)


def _correlate(grad: Tensor, x: Tensor, taps: Tensor, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and taps, and write taps ∗ x to `conv`.

    taps is (D, 2L − 1), fp32; all others are (B, L, D), positions contiguous in memory.
    """
    batch_size, length, channels = x.shape
    plan = plan_for("backward", x)
    pairs = triton.cdiv(batch_size, 2)
    grad_x, grad_taps = empty_sequence_last(x, channels), torch.empty_like(taps)
    for chunk in _chunks(channels, 16 * pairs * plan.points + 32 * plan.points):
        k = spectrum(taps[chunk], plan)
        grad_k = torch.empty_like(k)
        z, grad_z = _fold(x, chunk, plan), _fold(grad, chunk, plan)
        tables = plan.f1, plan.f2, plan.twiddle
        grid = k.shape[0], pairs, plan.residues
        cyclic_conv_kernel[grid](
            z, k, *tables, plan.residues, TRANSFORM=True, CONVOLVE=False, **plan.constants
        )
        cyclic_correlation_kernel[k.shape[0], plan.residues](
            grad_z, z, k, grad_k, *tables, pairs, plan.residues, **plan.constants
        )
        _unfold(grad_z, grad_x, chunk, plan, "set")
        if conv is not None:
            cyclic_conv_kernel[grid](
                z, k, *tables, plan.residues, TRANSFORM=False, CONVOLVE=True, **plan.constants
            )
            _unfold(z, conv, chunk, plan, "set")
        grad_taps[chunk] = taps_of(grad_k, length)
    return grad_x, grad_taps


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return sequence_last(x if mask is None else x * mask[..., None])


def forward(inputs: Inputs, causal: bool) -> Tensor:
    """Compute `gated_long_conv_op` for any length."""
    _, u, _, _, taps, res_taps, mask = inputs
    w, y = _gates(inputs._replace(p=sequence_last(inputs.p)), None)
    _convolve(w, taps, y, "multiply")
    if u is not None and res_taps is not None:
        _convolve(_masked(u, mask), res_taps, y, "add")
    return y


def backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `backward_op` for any length, bitwise reproducibly."""
    grad, inputs = sequence_last(grad), inputs._replace(p=sequence_last(inputs.p))
    p, u, weight, bias, taps, res_taps, mask = inputs
    batch_size, length, channels = grad.shape
    grad_u, grad_res_taps = p.new_empty(0), taps.new_empty(0)
    if u is not None and res_taps is not None:
        grad_u, grad_res_taps = _correlate(grad, _masked(u, mask), res_taps, None)
        grad_u = grad_u if mask is None else grad_u * mask[..., None]
    w, gated_grad = _gates(inputs, grad)
    conv = torch.empty_like(w)
    grad_w, grad_taps = _correlate(gated_grad, w, taps, conv)
    grad_short = p.new_empty(3 * channels, batch_size, length)
    positions = tile(length, 1024)
    gates_grad_kernel[channels, batch_size, triton.cdiv(length, positions)](
        p,
        grad,
        weight,
        bias,
        p if mask is None else mask,
        conv,
        grad_w,
        grad_short,
        batch_size,
        length,
        channels,
        *strides(p),
        *strides(grad),
        *strides(conv),
        HAS_MASK=mask is not None,
        POSITIONS=positions,
        num_warps=4,
    )
    grad_p, grad_weight, grad_bias = short_conv_grad(grad_short, p, weight)
    return grad_p, grad_u, grad_weight, grad_bias, grad_taps, grad_res_taps
