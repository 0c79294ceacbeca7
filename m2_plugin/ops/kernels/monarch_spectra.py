"""Triton kernels that order the spectra of filters as the kernels of Monarch FFTs read them.

Dimension key as in `monarch_conv`. The transforms themselves are `torch.fft`'s, in fp32.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.fixed import derived
from m2_plugin.ops.kernels.launch import (
    cdiv,
    launch_kernel,
    next_power_of_2,
)
from m2_plugin.ops.kernels.monarch_plan import Plan

# Memory for spectra in fp32; channels are transformed in turn.
SPECTRUM_BYTES = 256 << 20
# Numbers of a tile.
TILE = 2048

INFINITY_BITS = tl.constexpr(0x7F800000)
ABSOLUTE_BITS = tl.constexpr(0x7FFFFFFF)
# The exponents of the smallest and the largest scale, 2^−100 and 2^126, whose reciprocals exist.
SMALLEST_BITS = tl.constexpr(27 << 23)
LARGEST_BITS = tl.constexpr(253 << 23)
RECIPROCAL_BITS = tl.constexpr(254 << 23)


@triton.jit
def largest_bits(x):
    """Return the bits of the largest absolute value of fp32 numbers; NaN is the largest of all."""
    return tl.max(x.to(tl.int32, bitcast=True) & ABSOLUTE_BITS)


@triton.jit
def scale_of(largest):
    """Return a power of two near the number with these bits, its reciprocal, and NaN or 0.

    NaN, if the largest number is not finite; no row may spoil the row beside it.
    """
    exponent = tl.minimum(tl.maximum(largest & INFINITY_BITS, SMALLEST_BITS), LARGEST_BITS)
    scale = exponent.to(tl.float32, bitcast=True)
    inverse = (-exponent + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    poison = tl.where(largest < INFINITY_BITS, 0.0, float("nan"))
    return scale, inverse, poison


@triton.jit
def scaled(x, inverse, poison):
    """Multiply a row by the reciprocal of its scale; 0 if any of its numbers is not finite."""
    return tl.where(poison == 0.0, x * inverse, 0.0)


@triton.jit
def _place(at, VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Return k1 and k2 of the number at an offset, in the order of `order`."""
    VECTORS: tl.constexpr = VECTOR // 4
    odd, half, rest = at % 2, at // 2 % 2, at // 4
    n, rest = rest % VECTORS, rest // VECTORS
    pair, rest = rest % 4, rest // 4
    row, rest = rest % 8, rest // 8
    warp, rest = rest % WARPS, rest // WARPS
    n += rest % (N2 // (2 * VECTOR)) * VECTORS
    row += ((rest // (N2 // (2 * VECTOR)) * WARPS + warp) * 2 + half) * 8
    return row, (n * 4 + pair) * 2 + odd


@triton.jit
def _offset(k1, k2, VECTOR: tl.constexpr, WARPS: tl.constexpr, N2: tl.constexpr):
    """Undo `_place`."""
    VECTORS: tl.constexpr = VECTOR // 4
    n = k2 // 8
    at = (k1 // (16 * WARPS) * (N2 // (2 * VECTOR)) + n // VECTORS) * WARPS + k1 // 16 % WARPS
    at = ((at * 8 + k1 % 8) * 4 + k2 // 2 % 4) * VECTORS + n % VECTORS
    return at * 4 + k1 // 8 % 2 * 2 + k2 % 2


@triton.jit
def circle_kernel(taps_ptr, circle_ptr, length, points, stride_tc, stride_tt, BLOCK: tl.constexpr):
    """Put the taps of one channel on a circle: lag t at index t, lag −t at index N − t."""
    channel = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lag = tl.where(at < length, at, at - points)
    inside = (at < points) & (lag > -length)
    at_taps = taps_ptr + channel * stride_tc + (length - 1 + lag).to(tl.int64) * stride_tt
    x = tl.load(at_taps, mask=inside, other=0.0)
    tl.store(circle_ptr + channel * points + at, x, mask=at < points)


@triton.jit
def order_spectrum_kernel(
    half_ptr,
    k_ptr,
    scale_ptr,
    residues,
    classes,
    guard,
    VECTOR: tl.constexpr,
    WARPS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the spectrum of one channel by residue classes, scaled, and divided by N.

    `half` has frequencies 0 … N / 2 of a real sequence, real and imaginary parts side by side. The
    same place in TOGETHER classes comes from as many neighbours in `half`, or beyond N / 2 from
    their mirrors, in reverse. On an H200 this took 191 µs instead of 357 at 32,768 positions, but
    120 instead of 76 at 8,192, where there is one class.
    """
    M: tl.constexpr = N1 * N2
    channel = tl.program_id(0).to(tl.int64)
    points = residues * M
    half_ptr += channel * (points + 2)
    k_ptr += channel * classes * 2 * M
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, points + 2, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(half_ptr + at, mask=at < points + 2, other=0.0)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & ABSOLUTE_BITS)
    scale, inverse, poison = scale_of(tl.max(largest))
    tl.store(scale_ptr + channel, scale / guard / points + poison)
    scale_k = inverse * guard
    dtype = k_ptr.dtype.element_ty
    if TOGETHER == 1:
        at = tl.arange(0, M)
        k1, k2 = _place(at, VECTOR, WARPS, N1, N2)
        for r in range(classes):
            f = residues * (k1 + N1 * k2) + r
            mirrored = 2 * f > points
            f = tl.where(mirrored, points - f, f)
            re, im = tl.load(half_ptr + 2 * f), tl.load(half_ptr + 2 * f + 1)
            im = tl.where(mirrored, -im, im)
            k = k_ptr + r * (2 * M) + at
            tl.store(k, scaled(re, scale_k, poison).to(dtype))
            tl.store(k + M, scaled(im, scale_k, poison).to(dtype))
    else:
        TILE: tl.constexpr = 32 * VECTOR * WARPS  # rows k1 of all warps, and 2 · VECTOR columns k2
        TILES: tl.constexpr = N2 // (2 * VECTOR)  # beside each other
        i = tl.arange(0, 2 * TOGETHER)[None, :]
        for tile in range(M // TILE):
            at = tile * TILE + tl.arange(0, TILE)
            k1, k2 = _place(at, VECTOR, WARPS, N1, N2)
            mirrored = tile % TILES * 2 >= TILES  # all of a tile or none
            for first in range(0, classes, TOGETHER):
                f = residues * (k1 + N1 * k2)[:, None] + first
                f = tl.where(mirrored, points - f - (TOGETHER - 1), f)
                inside = (f + i // 2 >= 0) & (2 * (f + i // 2) <= points)
                pairs = tl.load(half_ptr + 2 * f + i, mask=inside, other=0.0)
                re, im = tl.split(tl.reshape(pairs, (TILE, TOGETHER, 2)))
                im = tl.where(mirrored, -im, im)
                r = tl.arange(0, TOGETHER)[None, :]
                r = first + tl.where(mirrored, TOGETHER - 1 - r, r)
                k = k_ptr + r * (2 * M) + at[:, None]
                tl.store(k, scaled(re, scale_k, poison).to(dtype), mask=r < classes)
                tl.store(k + M, scaled(im, scale_k, poison).to(dtype), mask=r < classes)


@triton.jit
def order_frequencies_kernel(
    k_ptr, hartley_ptr, residues, classes,
    VECTOR: tl.constexpr, WARPS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Undo `order_spectrum_kernel` for the gradient of a spectrum, whose real signal counts.

    That of the Hermitian part H: half of each number and of the conjugate of its mirror. Where only
    one of the two was computed, the number is Hermitian already. What is written is Re H − Im H at
    all N frequencies; see `taps_of`.
    """
    M: tl.constexpr = N1 * N2
    TILE: tl.constexpr = 32 * VECTOR * WARPS
    # Programs of one channel are neighbours: they share what they read in the L2 cache.
    channel = tl.program_id(1).to(tl.int64)
    points = residues * M
    at = tl.program_id(0) % (M // TILE) * TILE + tl.arange(0, TILE)
    first = tl.program_id(0) // (M // TILE) * TOGETHER
    k1, k2 = _place(at, VECTOR, WARPS, N1, N2)
    q = k1 + N1 * k2
    r = first + tl.arange(0, TOGETHER)[None, :]
    f = residues * q[:, None] + r
    inside = (r < residues) & (2 * f <= points)
    k_ptr += channel * classes * 2 * M
    ok = inside & (r < classes)
    here = r * (2 * M) + at[:, None]
    re = tl.load(k_ptr + here, mask=ok, other=0.0)
    im = tl.load(k_ptr + M + here, mask=ok, other=0.0)
    # The mirror of q in class r is M − 1 − q in class R − r, so all bits of its place are inverse;
    # in class 0 it is M − q in class 0.
    mirror = (M - q) % M
    mirror = _offset(mirror % N1, mirror // N1, VECTOR, WARPS, N2)
    there = tl.where(r > 0, (residues - r) * (2 * M) + (M - 1 - at)[:, None], mirror[:, None])
    also = inside & ((r == 0) | (residues - r < classes))
    re += tl.load(k_ptr + there, mask=also, other=0.0)
    im -= tl.load(k_ptr + M + there, mask=also, other=0.0)
    share = tl.where(ok & also, 0.5, 1.0)
    re, im = re * share, im * share
    hartley_ptr += channel * points
    tl.store(hartley_ptr + f, re - im, mask=inside)
    mirrored = inside & (f > 0) & (2 * f < points)
    tl.store(hartley_ptr + points - f, re + im, mask=mirrored)


@triton.jit
def lags_kernel(half_ptr, taps_ptr, length, points, BLOCK: tl.constexpr):
    """Write the taps of one channel by lag, from the transform G of `order_frequencies_kernel`.

    The one at lag ±t is (Re G[t] ∓ Im G[t]) / N.
    """
    channel = tl.program_id(1).to(tl.int64)
    lag = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lag < length
    pairs = tl.arange(0, 2)[None, :] + 2 * lag[:, None]
    half_ptr += channel * (points + 2)
    re, im = tl.split(tl.load(half_ptr + pairs, mask=inside[:, None], other=0.0))
    taps_ptr += channel * (2 * length - 1) + length - 1
    share = 1.0 / points
    tl.store(taps_ptr + lag, (re - im) * share, mask=inside)
    tl.store(taps_ptr - lag, (re + im) * share, mask=inside & (lag > 0))


def spectra(filters: Sequence[Tensor], plan: Plan) -> Sequence[tuple[Tensor, Tensor]]:
    """Transform filters' taps (D, 2L − 1), fp32, to (D, C, 2, M), divided by N and scales (D,).

    Spectra of fixed taps are kept.
    """
    key = plan.config, plan.residues, plan.classes, plan.operand
    return derived(filters, key, lambda tensors: _transformed(tensors, plan))


def _transformed(filters: Sequence[Tensor], plan: Plan) -> list[tuple[Tensor, Tensor]]:
    channels, length = filters[0].shape[0], (filters[0].shape[1] + 1) // 2
    device, count, points = filters[0].device, len(filters), plan.points
    shape = count, channels, plan.classes, 2, plan.config.points
    k = torch.empty(shape, dtype=plan.operand, device=device)
    scale = torch.empty(count, channels, dtype=torch.float32, device=device)
    k_rows, scale_rows = k.flatten(0, 1), scale.flatten()
    joined = _joined(filters)
    for rows in chunks(count * channels, 8 * points, SPECTRUM_BYTES):
        circle = torch.empty(rows.stop - rows.start, points, dtype=torch.float32, device=device)
        for i, part, here in split_rows(rows, len(joined[0])):
            taps = joined[i][part]
            launch_kernel(
                circle_kernel,
                (cdiv(points, TILE), len(taps)),
                taps,
                circle[here],
                length,
                points,
                *taps.stride(),
                BLOCK=TILE,
                num_warps=4,
            )
        half = torch.view_as_real(torch.fft.rfft(circle))
        launch_kernel(
            order_spectrum_kernel,
            (half.shape[0],),
            half,
            k_rows[rows],
            scale_rows[rows],
            plan.residues,
            plan.classes,
            plan.guard,
            TOGETHER=_together(plan),
            BLOCK=TILE,
            num_warps=8,
            **plan.order_constants,
        )
    return list(zip(k.unbind(), scale.unbind(), strict=True))


def _joined(filters: Sequence[Tensor]) -> list[Tensor]:
    """Return filters (D, 2L − 1), one below the other as one tensor if they lie so in memory.

    Those of several layers do, since one kernel wrote them.
    """
    first, size = filters[0], filters[0].numel()
    storage = first.untyped_storage()._cdata
    if all(
        taps.is_contiguous()
        and taps.untyped_storage()._cdata == storage
        and taps.storage_offset() == first.storage_offset() + i * size
        for i, taps in enumerate(filters)
    ):
        channels, width = first.shape
        return [first.as_strided((len(filters) * channels, width), (width, 1))]
    return list(filters)


def _together(plan: Plan) -> int:
    """Return how many residue classes are read or written at once: 32 bytes of a half spectrum."""
    if plan.config.n2 < 4 * plan.vector:  # a tile is mirrored in part
        return 1
    return min(4, next_power_of_2(plan.residues))


def taps_of(grad: Tensor, taps: Tensor, plan: Plan) -> None:
    """Transform the gradient (D, C, 2, M) of a spectrum back, to that of taps (D, 2L − 1).

    The inverse transform of a Hermitian spectrum H is Re G[t] − Im G[t], divided by N, where G is
    the transform of the real sequence Re H − Im H: the terms of other parity vanish. PyTorch's own
    inverse would first copy the spectrum, and pass over its result once more.
    """
    channels, points, length = grad.shape[0], plan.points, (taps.shape[1] + 1) // 2
    hartley = torch.empty(channels, points, dtype=torch.float32, device=grad.device)
    together = _together(plan)
    tiles = plan.config.points // (32 * plan.vector * plan.config.row_warps)
    launch_kernel(
        order_frequencies_kernel,
        (tiles * cdiv(plan.residues, together), channels),
        grad,
        hartley,
        plan.residues,
        plan.classes,
        TOGETHER=together,
        num_warps=8,
        **plan.order_constants,
    )
    launch_kernel(
        lags_kernel,
        (cdiv(length, TILE), channels),
        torch.view_as_real(torch.fft.rfft(hartley)),
        taps,
        length,
        points,
        BLOCK=TILE,
        num_warps=4,
    )


def chunks(channels: int, bytes_each: int, total: int) -> list[slice]:
    """Cut the channels into equal slices, as few as may be, that take at most so many bytes each.

    Equal ones of two filters seldom have channels of both.
    """
    number = cdiv(channels, max(1, total // bytes_each))
    together = cdiv(channels, number)
    return [slice(first, min(first + together, channels)) for first in range(0, channels, together)]


def split_rows(rows: slice, channels: int) -> Iterator[tuple[int, slice, slice]]:
    """Split rows that are counted through tensors of so many channels each.

    Yields the number of a tensor, its channels, and where these are among the rows.
    """
    for i in range(rows.start // channels, cdiv(rows.stop, channels)):
        first = i * channels
        low, high = max(rows.start, first), min(rows.stop, first + channels)
        yield i, slice(low - first, high - first), slice(low - rows.start, high - rows.start)
