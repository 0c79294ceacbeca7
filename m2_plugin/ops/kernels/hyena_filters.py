"""The taps of Hyena filters as one kernel, their gradients as three.

All products are as exact as in fp32, whatever PyTorch's settings are, because sines of a high
frequency amplify errors. Tensor cores compute each as three: forward of float16 pairs, which is
twice as fast as TF32 and enough for sines and weights, backward of TF32 pairs, with a larger range.

Dimension key: G filters, N MLPs (one or two per filter), L sequence, D channels, E positional
features, O order.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.backend import interpreted
from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.check import Case, draws, register
from m2_plugin.ops.kernels.launch import (
    cdiv,
    device_class,
    fitting_warps,
    launch_kernel,
    next_power_of_2,
    tile,
)
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import run_kernel
from m2_plugin.ops.reference.hyena_filters import (
    MAX_ORDER,
    OP,
    Packed,
    Sizes,
    hyena_filters_torch,
    packed_shapes,
    unpack,
)


class Config(NamedTuple):
    """Tiles: positions of a program; hidden columns, and channels, that it takes at a time."""

    positions: int
    chunk: int
    channels: int
    num_warps: int


# Of two, a GPU takes the faster one. The first reads each weight and splits it into a pair half as
# often, but makes half as many programs.
FORWARD = {
    "large": (Config(128, 16, 32, 8), Config(64, 16, 64, 4)),
    "small": (Config(32, 16, 16, 4),),
}
# The second one spills registers, but not in its loop.
HIDDEN = {
    "large": (Config(32, 16, 16, 4), Config(64, 16, 16, 4)),
    "small": (Config(32, 16, 16, 8),),
}
# Positions and rows of weights at a time of the kernel for gradients of layers, warps and stages.
# Two of the large programs share a multiprocessor.
LAYER_GRAD = {"large": (64, 32, 4, 2), "small": (32, 16, 4, 3)}
# Rows and positions at a time of the kernel for the weights' gradients, and its warps; likewise.
WEIGHT_GRAD = {"large": ((128, 32, 8), (64, 32, 4)), "small": ((64, 16, 4),)}
# Programs that keep all multiprocessors of a large GPU busy. A constant, so that sums have as many
# parts on every GPU.
BUSY = 256
PAIRS_ROWS = 32  # that a program of `pairs_kernel` splits, of all columns
HALVES_BLOCK = 1024  # numbers of a program of `halves_kernel`
POSITIONS_PER_SPLIT = 256  # at least
# Weights are multiplied by this before they become pairs of float16 numbers: it puts the smallest
# difference that matters, 5e-10, above float16's smallest number, and weights of 1,000 below its
# largest.
WEIGHT_SCALE = 64.0


def by_programs(configs: Sequence[Any], programs: int) -> Sequence[Any]:
    """Return configurations, the first one first only if it makes enough programs."""
    return configs if programs >= BUSY else configs[::-1]


def precision() -> str:
    """Return the precision of `tl.dot`; the interpreter multiplies in fp32 anyway."""
    return "ieee" if interpreted() else "tf32x3"


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def sine_of_rest(x, half_turns):
    """The sine of x − π · half_turns, which must be within ±π/2.

    π is subtracted in four parts, of which the first three have so few bits that their products are
    exact. The hardware's own sine is fast, but wrong by 1e-3 where x is 10,000.
    """
    r = x - half_turns * 3.140625
    r = r - half_turns * 0.0009670257568359375
    r = r - half_turns * 6.2771141529083251953e-07
    r = r - half_turns * 1.2154201256553420762e-10
    # Beyond 1e5 an argument's own rounding says nothing of its sine; this bounds it.
    r = tl.minimum(tl.maximum(r, -1.5707964), 1.5707964)
    s = r * r
    p = 2.605309215709362e-06 * s - 0.0001980935862981474
    p = p * s + 0.008333062285874259
    p = p * s - 0.16666659355112512
    return r + r * (s * p)


@triton.jit
def signed(value, turns):
    """Negate the value where `turns` is odd."""
    odd = turns - 2.0 * tl.floor(turns * 0.5)
    return value * (1.0 - 2.0 * odd)


@triton.jit
def sin(x):
    """The sine of x, to within 2e-7 for |x| < 1,000 and 3e-6 for |x| < 30,000."""
    turns = tl.floor(x * 0.31830988618379067 + 0.5)
    return signed(sine_of_rest(x, turns), turns)


@triton.jit
def cos(x):
    """The cosine of x, as exact as `sin`."""
    turns = tl.floor(x * 0.31830988618379067)
    return signed(sine_of_rest(x, turns + 0.5), turns + 1.0)


@triton.jit
def first_layer(z_ptr, w1_ptr, b1_ptr, t, o, length, ORDER: tl.constexpr, EMB_DIM: tl.constexpr):
    """z[t] · W1[o] + b1[o], (positions, order)."""
    x = tl.load(b1_ptr + o, mask=o < ORDER, other=0.0)[None, :] + tl.zeros_like(t)[:, None]
    for e in tl.static_range(EMB_DIM):
        z = tl.load(z_ptr + t * EMB_DIM + e, mask=t < length, other=0.0)
        w = tl.load(w1_ptr + o * EMB_DIM + e, mask=o < ORDER, other=0.0)
        x += z[:, None] * w[None, :]
    return x


@triton.jit
def matrix(ptr, rows, cols, num_rows, num_cols):
    """A tile of a row-major matrix (num_rows, num_cols); zeros outside it."""
    return tl.load(
        ptr + rows * num_cols + cols, mask=(rows < num_rows) & (cols < num_cols), other=0.0
    )


@triton.jit
def split(x):
    """Write x as the sum of two float16 numbers, to within 3e-8 for |x| ≤ 1."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def halves_kernel(
    weights_ptr, halves_ptr, size, low_part, WEIGHT_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write all weights, times WEIGHT_SCALE, as pairs of float16 numbers, (2, low_part)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weights_ptr + at, mask=at < size, other=0.0)
    high, low = split(w * WEIGHT_SCALE)
    tl.store(halves_ptr + at, high, mask=at < size)
    tl.store(halves_ptr + low_part + at, low, mask=at < size)


@triton.jit
def add_product(
    acc, high, low, w_ptr, low_part, rows, cols, num_rows, num_cols, PRECISION: tl.constexpr = None
):
    """Return acc + (high + low) · w, but for the product of the two low parts.

    w is a tile of a matrix (num_rows, num_cols) that `halves_kernel` or `pairs_kernel` wrote.
    """
    w_high = matrix(w_ptr, rows, cols, num_rows, num_cols)
    w_low = matrix(w_ptr + low_part, rows, cols, num_rows, num_cols)
    acc = tl.dot(low, w_high, acc, input_precision=PRECISION)
    acc = tl.dot(high, w_low, acc, input_precision=PRECISION)
    return tl.dot(high, w_high, acc, input_precision=PRECISION)


@triton.jit
def taps_kernel(
    z_ptr,
    freq_ptr,
    skip_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    w3_ptr,
    b3_ptr,
    out_ptr,
    scale_ptr,
    rates_ptr,
    taps_ptr,
    hidden_ptr,
    w_mod,
    length,
    channels,
    before,
    mlps,
    channels_per_program,
    low_part,
    padded,
    DIRECTIONS: tl.constexpr,
    EMB_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The taps of some positions and channels of one MLP, (G, D, before + L).

    w2, w3 and out are the first numbers of the pairs of `halves_kernel`; the second ones come
    `low_part` numbers later. With `HIDDEN` no taps, but what the backward pass needs: the outputs
    of the hidden layers, three of (N, O, P), and what the sines of the second and third get,
    without its factor freq, two of (N, P, O). So the tensor cores can read the outputs as they are:
    see `pairs_kernel`. P is the length, padded to a multiple of 16.
    """
    tiles = tl.cdiv(length, POSITIONS)
    n = tl.program_id(1).to(tl.int64)
    g = n // DIRECTIONS
    direction = n % DIRECTIONS
    t = (tl.program_id(0) % tiles) * POSITIONS + tl.arange(0, POSITIONS)
    o = tl.arange(0, WIDTH)
    freq = w_mod * tl.load(freq_ptr + g * ORDER + o, mask=o < ORDER, other=0.0)[None, :]
    w1_ptr += n * ORDER * EMB_DIM
    w2_ptr += n * ORDER * ORDER
    w3_ptr += n * ORDER * ORDER
    out_ptr += n * channels * ORDER
    layer = tl.cast(mlps, tl.int64) * padded * ORDER  # an argument of 1 has no .to
    hidden_ptr += n * padded * ORDER
    at = o[None, :] * padded + t[:, None]
    inside = (t < padded)[:, None] & (o < ORDER)[None, :]

    z_ptr += g * length * EMB_DIM
    x = first_layer(z_ptr, w1_ptr, b1_ptr + n * ORDER, t, o, length, ORDER, EMB_DIM)
    h = sin(freq * x)
    if HIDDEN:
        tl.store(hidden_ptr + at, h, mask=inside)
    high, low = split(h)
    # A chunk of the second layer's columns is needed by all of the third's.
    x = tl.zeros((POSITIONS, WIDTH), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        c = start + tl.arange(0, CHUNK)
        bias = tl.load(b2_ptr + n * ORDER + c, mask=c < ORDER, other=0.0)
        f = w_mod * tl.load(freq_ptr + g * ORDER + c, mask=c < ORDER, other=0.0)
        x2 = tl.zeros((POSITIONS, CHUNK), tl.float32)
        x2 = add_product(x2, high, low, w2_ptr, low_part, c[None, :], o[:, None], ORDER, ORDER)
        x2 = x2 * (1.0 / WEIGHT_SCALE) + bias[None, :]
        h2 = sin(f[None, :] * x2)
        if HIDDEN:
            chunk = (t < padded)[:, None] & (c < ORDER)[None, :]
            to = hidden_ptr + layer + c[None, :] * padded + t[:, None]
            tl.store(to, h2, mask=chunk)
            to = hidden_ptr + 3 * layer + t[:, None] * ORDER + c[None, :]
            tl.store(to, x2, mask=chunk)
        h2_high, h2_low = split(h2)
        x = add_product(x, h2_high, h2_low, w3_ptr, low_part, o[None, :], c[:, None], ORDER, ORDER)
    bias = tl.load(b3_ptr + n * ORDER + o, mask=o < ORDER, other=0.0)
    x = x * (1.0 / WEIGHT_SCALE) + bias[None, :]
    h = sin(freq * x)
    if HIDDEN:
        tl.store(hidden_ptr + 2 * layer + at, h, mask=inside)
        to = hidden_ptr + 4 * layer + t[:, None] * ORDER + o[None, :]
        tl.store(to, x, mask=inside)
    else:
        high, low = split(h)
        scale = tl.load(scale_ptr + t, mask=t < length, other=0.0)
        col = before + t
        kept = t < length
        if direction == 1:
            col = before - 1 - t
            kept = t < before
        first = (tl.program_id(0) // tiles) * channels_per_program
        for start in range(first, tl.minimum(first + channels_per_program, channels), CHANNELS):
            d = start + tl.arange(0, CHANNELS)
            rates = tl.load(rates_ptr + d, mask=d < channels, other=0.0)
            k = tl.zeros((POSITIONS, CHANNELS), tl.float32)
            k = add_product(
                k, high, low, out_ptr, low_part, d[None, :], o[:, None], channels, ORDER
            )
            k *= 1.0 / WEIGHT_SCALE
            k *= tl.exp(-scale[:, None] * rates[None, :])
            if direction == 0:
                skip = tl.load(skip_ptr + g * channels + d, mask=d < channels, other=0.0)
                k += tl.where(t[:, None] == 0, skip[None, :], 0.0)
            to = taps_ptr + (g * channels + d[None, :]) * (before + length) + col[:, None]
            tl.store(to, k, mask=kept[:, None] & (d < channels)[None, :])


@triton.jit
def tf32_pair(x):
    """Write x as the sum of two numbers of which TF32 keeps all, or all but the last bit."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def pairs_kernel(
    weight_ptr, pairs_ptr, num_rows, ORDER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Split (N, M, O) into pairs of TF32 numbers, (2, N, O, M).

    The tensor cores read TF32 matrices only if the dimension of the sum is contiguous. To transpose
    them in each program would take longer than the products: 16 threads would write to one bank.
    """
    n = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, WIDTH)
    inside = (m < num_rows)[:, None] & (o < ORDER)[None, :]
    size = ORDER * num_rows
    w = matrix(weight_ptr + n * size, m[:, None], o[None, :], num_rows, ORDER)
    high, low = tf32_pair(w)
    pairs_ptr += n * size + m[:, None] + o[None, :] * num_rows
    tl.store(pairs_ptr, high, mask=inside)
    tl.store(pairs_ptr + tl.num_programs(1).to(tl.int64) * size, low, mask=inside)


@triton.jit
def input_grad(
    acc, z_ptr, freq_ptr, w1_ptr, b1_ptr, x_ptr, partial_ptr, w_mod, length, t, o,
    LAYER: tl.constexpr, EMB_DIM: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The gradient of a sine's input at columns o, where acc is that of its output; and sums."""
    inside = (t < length)[:, None] & (o < ORDER)[None, :]
    at = t[:, None] * ORDER + o[None, :]
    freq = w_mod * tl.load(freq_ptr + o, mask=o < ORDER, other=0.0)[None, :]
    if LAYER == 1:
        x = first_layer(z_ptr, w1_ptr, b1_ptr, t, o, length, ORDER, EMB_DIM)
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
    acc *= cos(freq * x)
    partial_ptr += o
    tl.store(partial_ptr + ORDER, w_mod * tl.sum(acc * x, axis=0), mask=o < ORDER)
    acc *= freq
    tl.store(partial_ptr, tl.sum(acc, axis=0), mask=o < ORDER)
    if LAYER == 1:
        for e in tl.static_range(EMB_DIM):
            z = tl.load(z_ptr + t * EMB_DIM + e, mask=t < length, other=0.0)
            sums = tl.sum(acc * z[:, None], axis=0)
            tl.store(partial_ptr + (2 + e) * ORDER, sums, mask=o < ORDER)
    else:
        tl.store(x_ptr + at, acc, mask=inside)
    return acc


@triton.jit
def layer_grad_kernel(
    z_ptr,
    freq_ptr,
    w1_ptr,
    b1_ptr,
    pairs_ptr,
    scale_ptr,
    rates_ptr,
    grad_ptr,
    x_ptr,
    partial_ptr,
    grad_z_ptr,
    w_mod,
    length,
    num_rows,
    before,
    padded,
    DIRECTIONS: tl.constexpr,
    LAYER: tl.constexpr,
    EMB_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient x of the input of hidden layer `LAYER`'s sine, for some positions of one MLP.

    `grad` is the gradient of the next layer's output: of the taps (G, D, before + L) after layer 3,
    else (N, P, O); `pairs` (2, N, O, M) are the next layer's weights. The gradient replaces `x`,
    (N, P, O); of layer 1, whose input is z, those of z (N, L, E) and of W1 are formed at once.
    `partial` (N, tiles, rows, O) gets sums over the tile's positions: the gradients of the bias and
    of freq, and, of layer 1, of the columns of W1. With two `PARTS`, each half of the columns is
    finished by itself, so that registers hold no more than half of x.
    """
    pid = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    g = n // DIRECTIONS
    t = pid * POSITIONS + tl.arange(0, POSITIONS)
    col = before + t
    kept = t < length
    if LAYER == 3:
        scale = tl.load(scale_ptr + t, mask=t < length, other=0.0)
        grad_ptr += g * num_rows * (before + length)
        if n % DIRECTIONS == 1:
            col = before - 1 - t
            kept = t < before
    else:
        grad_ptr += n * padded * num_rows
    pairs_ptr += n * ORDER * num_rows
    low_part = tl.num_programs(1).to(tl.int64) * ORDER * num_rows
    part = tl.arange(0, WIDTH // PARTS)
    acc = tl.zeros((POSITIONS, WIDTH // PARTS), tl.float32)
    rest = tl.zeros((POSITIONS, WIDTH // PARTS), tl.float32)
    for start in range(0, num_rows, CHUNK):
        m = start + tl.arange(0, CHUNK)
        valid = kept[:, None] & (m < num_rows)[None, :]
        if LAYER == 3:
            at = m[None, :] * (before + length) + col[:, None]
            grad = tl.load(grad_ptr + at, mask=valid, other=0.0)
            rates = tl.load(rates_ptr + m, mask=m < num_rows, other=0.0)
            grad *= tl.exp(-scale[:, None] * rates[None, :])
        else:
            grad = tl.load(grad_ptr + t[:, None] * num_rows + m[None, :], mask=valid, other=0.0)
        high, low = tf32_pair(grad)
        acc = add_product(
            acc, high, low, pairs_ptr, low_part, part[None, :], m[:, None], ORDER, num_rows,
            PRECISION,
        )  # fmt: skip
        if PARTS == 2:
            rest = add_product(
                rest, high, low, pairs_ptr, low_part, WIDTH // 2 + part[None, :], m[:, None],
                ORDER, num_rows, PRECISION,
            )  # fmt: skip
    x_ptr += n * padded * ORDER
    freq_ptr += g * ORDER
    if LAYER == 1:
        z_ptr += g * length * EMB_DIM
        w1_ptr += n * ORDER * EMB_DIM
        b1_ptr += n * ORDER
    rows = 2
    if LAYER == 1:
        rows = 2 + EMB_DIM
    partial_ptr += (n * tl.num_programs(0) + pid) * rows * ORDER
    acc = input_grad(
        acc, z_ptr, freq_ptr, w1_ptr, b1_ptr, x_ptr, partial_ptr, w_mod, length, t,
        part, LAYER, EMB_DIM, ORDER,
    )  # fmt: skip
    if PARTS == 2:
        rest = input_grad(
            rest, z_ptr, freq_ptr, w1_ptr, b1_ptr, x_ptr, partial_ptr, w_mod, length, t,
            WIDTH // 2 + part, LAYER, EMB_DIM, ORDER,
        )  # fmt: skip
    if LAYER == 1:
        for e in tl.static_range(EMB_DIM):
            w = tl.load(w1_ptr + part * EMB_DIM + e, mask=part < ORDER, other=0.0)
            grad_z = tl.sum(acc * w[None, :], axis=1)
            if PARTS == 2:
                o = WIDTH // 2 + part
                w = tl.load(w1_ptr + o * EMB_DIM + e, mask=o < ORDER, other=0.0)
                grad_z += tl.sum(rest * w[None, :], axis=1)
            tl.store(grad_z_ptr + (n * length + t) * EMB_DIM + e, grad_z, mask=t < length)


@triton.jit
def filter_weight_grad_kernel(
    left_ptr,
    right_ptr,
    scale_ptr,
    rates_ptr,
    grad_weight_ptr,
    length,
    num_rows,
    before,
    padded,
    positions_per_split,
    DIRECTIONS: tl.constexpr,
    OF_TAPS: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split, n, m, o] = Σ_{t in split} left[n, t, m] · right[n, o, t].

    With `OF_TAPS`, left is the gradient of the taps (G, D, before + L), times the window. What is
    right of the length is a finite number, times 0.
    """
    n = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, WIDTH)
    first = split * positions_per_split
    end = tl.minimum(first + positions_per_split, length)
    last = end
    step = 1
    zero = before
    if OF_TAPS:
        rates = tl.load(rates_ptr + m, mask=m < num_rows, other=0.0)
        left_ptr += ((n // DIRECTIONS) * num_rows + m[:, None]) * (before + length)
        if n % DIRECTIONS == 1:
            step = -1
            zero = before - 1
            last = tl.minimum(end, before)
    else:
        left_ptr += n * padded * num_rows + m[:, None]
    right_ptr += n * ORDER * padded
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, end, POSITIONS):
        t = start + tl.arange(0, POSITIONS)
        if OF_TAPS:
            left = tl.load(
                left_ptr + zero + step * t[None, :],
                mask=(m < num_rows)[:, None] & (t < last)[None, :],
                other=0.0,
            )
            scale = tl.load(scale_ptr + t, mask=t < length, other=0.0)
            left *= tl.exp(-rates[:, None] * scale[None, :])
        else:
            left = tl.load(
                left_ptr + t[None, :] * num_rows,
                mask=(m < num_rows)[:, None] & (t < end)[None, :],
                other=0.0,
            )
        right = tl.load(
            right_ptr + o[None, :] * padded + t[:, None],
            mask=(t < padded)[:, None] & (o < ORDER)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    to = grad_weight_ptr + (split * tl.num_programs(1) + n) * num_rows * ORDER
    tl.store(
        to + m[:, None] * ORDER + o[None, :],
        acc,
        mask=(m < num_rows)[:, None] & (o < ORDER)[None, :],
    )


# --- launches -------------------------------------------------------------------------------------


def compute_taps(
    packed: Tensor, scale: Tensor, rates: Tensor, sizes: Sizes, w_mod: float
) -> Tensor:
    """Launch the kernel for the taps (G, D, before + L).

    Args:
        packed: The weights, as `pack` gives them.
        scale: (L,).
        rates: (D,).
        sizes: What `pack` gives beside them.
        w_mod: Constant factor on the frequencies.
    """
    taps, device, halves = new_taps(packed, sizes), packed.device, _halves(packed)

    def run(config: Config) -> None:
        _launch_taps(packed, halves, scale, rates, sizes, w_mod, taps, None, config)

    configs: Sequence[Config] = FORWARD[device_class(device)]
    configs = by_programs(configs, cdiv(sizes.length, configs[0].positions) * sizes.mlps)
    run(tuning.best(f"{OP} forward", shape_class(sizes), configs, run, device))
    return taps


def shape_class(sizes: Sizes) -> tuple[int, ...]:
    """Return what the choice of a configuration depends on."""
    length = next_power_of_2(sizes.length)
    return sizes.mlps, sizes.directions, length, sizes.channels, sizes.emb_dim, sizes.order


def _padded(size: int) -> int:
    """Return a size of rows that all begin where 16 bytes can be read at once."""
    return cdiv(size, 16) * 16


def _halves(packed: Tensor) -> Tensor:
    """Return weights as pairs of float16 numbers, in two rows of the same alignment."""
    size = packed.numel()
    halves = packed.new_empty(2, _padded(size), dtype=torch.float16)
    launch_kernel(
        halves_kernel,
        (cdiv(size, HALVES_BLOCK),),
        packed,
        halves,
        size,
        halves.shape[1],
        WEIGHT_SCALE=WEIGHT_SCALE,
        BLOCK=HALVES_BLOCK,
        num_warps=4,
    )
    return halves


def _launch_taps(
    packed: Tensor,
    halves: Tensor,
    scale: Tensor,
    rates: Tensor,
    sizes: Sizes,
    w_mod: float,
    taps: Tensor | None,
    hidden: Tensor | None,
    config: Config,
) -> None:
    """Write taps, or the hidden layers."""
    w, high = unpack(packed, sizes), unpack(halves[0, : packed.numel()], sizes)
    positions = tile(sizes.length, config.positions)
    channels = tile(sizes.channels, config.channels)
    order = tile(sizes.order, MAX_ORDER)
    chunk = min(config.chunk, order)
    tiles = cdiv(sizes.length, positions)
    # Each part of the channels computes the hidden layers again, a third of the work.
    parts = max(1, min(BUSY // (tiles * sizes.mlps), cdiv(sizes.channels, 4 * channels)))
    per_program = cdiv(cdiv(sizes.channels, channels), parts) * channels
    parts = 1 if taps is None else cdiv(sizes.channels, per_program)
    launch_kernel(
        taps_kernel,
        (tiles * parts, sizes.mlps),
        w.z,
        w.freq,
        w.skip,
        w.w1,
        w.b1,
        high.w2,
        w.b2,
        high.w3,
        w.b3,
        high.out,
        scale,
        rates,
        packed if taps is None else taps,
        packed if hidden is None else hidden,
        w_mod,
        sizes.length,
        sizes.channels,
        sizes.before,
        sizes.mlps,
        per_program,
        halves.shape[1],
        _padded(sizes.length),
        DIRECTIONS=sizes.directions,
        EMB_DIM=sizes.emb_dim,
        ORDER=sizes.order,
        WIDTH=order,
        POSITIONS=positions,
        CHUNK=chunk,
        CHANNELS=channels,
        WEIGHT_SCALE=WEIGHT_SCALE,
        HIDDEN=hidden is not None,
        num_warps=fitting_warps(config.num_warps, positions, min(chunk, channels)),
    )


def new_taps(packed: Tensor, sizes: Sizes) -> Tensor:
    """Return memory for taps, with the zeros that the kernel does not write."""
    shape = sizes.filters, sizes.channels, sizes.before + sizes.length
    return packed.new_zeros(shape) if sizes.directions == 1 else packed.new_empty(shape)


def _weight_grad(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    rates: Tensor,
    sizes: Sizes,
    grad_weight: Tensor,
    of_taps: bool,
) -> None:
    """Sum left · rightᵀ over positions into grad_weight (N, M, O)."""
    num_rows, device = grad_weight.shape[1], right.device
    width = tile(sizes.order, MAX_ORDER)
    configs: Sequence[tuple[int, int, int]] = WEIGHT_GRAD[device_class(device)]
    # As many for each configuration, so that a sum has as many parts.
    programs = cdiv(num_rows, tile(num_rows, configs[0][0])) * sizes.mlps
    most_splits = cdiv(sizes.length, POSITIONS_PER_SPLIT)
    splits = min(cdiv(BUSY, programs), most_splits)
    multiple = configs[0][1]
    per_split = cdiv(cdiv(sizes.length, splits), multiple) * multiple
    splits = cdiv(sizes.length, per_split)
    partial = grad_weight if splits == 1 else right.new_empty(splits, *grad_weight.shape)

    def run(config: tuple[int, int, int]) -> None:
        rows, positions, num_warps = config
        rows = tile(num_rows, rows)
        launch_kernel(
            filter_weight_grad_kernel,
            (cdiv(num_rows, rows), sizes.mlps, splits),
            left,
            right,
            scale,
            rates,
            partial,
            sizes.length,
            num_rows,
            sizes.before,
            _padded(sizes.length),
            per_split,
            DIRECTIONS=sizes.directions,
            OF_TAPS=of_taps,
            ORDER=sizes.order,
            WIDTH=width,
            ROWS=rows,
            POSITIONS=positions,
            PRECISION=precision(),
            num_warps=fitting_warps(num_warps, rows, width),
        )

    configs = by_programs(configs, programs * splits)
    name = f"{OP} gradient of {'the last' if of_taps else 'hidden'} weights"
    run(tuning.best(name, (num_rows, *shape_class(sizes)), configs, run, device))
    if splits > 1:
        torch.sum(partial, 0, out=grad_weight)


def _pairs(weight: Tensor) -> Tensor:
    """Transpose weights (N, M, O) and split them into pairs of TF32 numbers, (2, N, O, M)."""
    number, num_rows, order = weight.shape
    pairs = weight.new_empty(2, number, order, num_rows)
    rows = tile(num_rows, PAIRS_ROWS)
    launch_kernel(
        pairs_kernel,
        (cdiv(num_rows, rows), number),
        weight,
        pairs,
        num_rows,
        ORDER=order,
        WIDTH=tile(order, MAX_ORDER),
        ROWS=rows,
        num_warps=4,
    )
    return pairs


def _layer_grad(
    layer: int,
    w: Packed,
    scale: Tensor,
    rates: Tensor,
    sizes: Sizes,
    w_mod: float,
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    grad_z: Tensor,
) -> Tensor:
    """Launch `layer_grad_kernel`; return its partial sums, added up, (N, rows, O)."""
    positions, chunk, num_warps, num_stages = LAYER_GRAD[device_class(x.device)]
    positions, width = tile(sizes.length, positions), tile(sizes.order, MAX_ORDER)
    tiles = cdiv(sizes.length, positions)
    rows = 2 + (sizes.emb_dim if layer == 1 else 0)
    pairs = _pairs(weight)
    partial = x.new_empty(sizes.mlps, tiles, rows, sizes.order)

    launch_kernel(
        layer_grad_kernel,
        (tiles, sizes.mlps),
        w.z,
        w.freq,
        w.w1,
        w.b1,
        pairs,
        scale,
        rates,
        grad,
        x,
        partial,
        grad_z,
        w_mod,
        sizes.length,
        weight.shape[1],
        sizes.before,
        _padded(sizes.length),
        DIRECTIONS=sizes.directions,
        LAYER=layer,
        EMB_DIM=sizes.emb_dim,
        ORDER=sizes.order,
        WIDTH=width,
        POSITIONS=positions,
        CHUNK=tile(weight.shape[1], chunk),
        PARTS=2 if width > MAX_ORDER // 2 else 1,
        PRECISION="ieee" if interpreted() else "tf32",
        num_warps=fitting_warps(num_warps, positions, width),
        num_stages=num_stages,
    )
    return partial[:, 0] if tiles == 1 else partial.sum(1)


def _backward(
    grad: Tensor, packed: Tensor, scale: Tensor, rates: Tensor, sizes: Sizes, w_mod: float
) -> Tensor:
    grad = grad.contiguous()
    w = unpack(packed, sizes)
    result = torch.empty_like(packed)
    grads = unpack(result, sizes)
    hidden = packed.new_empty(5, sizes.mlps, sizes.order, _padded(sizes.length))
    grad_z = packed.new_empty(sizes.mlps, sizes.length, sizes.emb_dim)
    h1, h2, h3, x2, x3 = hidden
    halves = _halves(packed)

    def run(config: Config) -> None:
        _launch_taps(packed, halves, scale, rates, sizes, w_mod, None, hidden, config)

    configs = HIDDEN[device_class(packed.device)]
    run(tuning.best(f"{OP} hidden layers", shape_class(sizes), configs, run, packed.device))
    rest = w, scale, rates, sizes, w_mod
    sums3 = _layer_grad(3, *rest, grad, w.out, x3, grad_z)
    sums2 = _layer_grad(2, *rest, x3, w.w3, x2, grad_z)  # x3 is now a gradient; now x2, too
    sums1 = _layer_grad(1, *rest, x2, w.w2, h1, grad_z)
    _weight_grad(grad, h3, scale, rates, sizes, grads.out, True)
    _weight_grad(x3, h2, scale, rates, sizes, grads.w3, False)
    _weight_grad(x2, h1, scale, rates, sizes, grads.w2, False)
    grads.b1.copy_(sums1[:, 0])
    grads.b2.copy_(sums2[:, 0])
    grads.b3.copy_(sums3[:, 0])
    grads.w1.copy_(sums1[:, 2:].mT)
    freq = sums1[:, 1] + sums2[:, 1] + sums3[:, 1]
    torch.sum(freq.unflatten(0, (sizes.filters, sizes.directions)), 1, out=grads.freq)
    torch.sum(grad_z.unflatten(0, (sizes.filters, sizes.directions)), 1, out=grads.z)
    grads.skip.copy_(grad[:, :, sizes.before])
    return result


# --- torch.library --------------------------------------------------------------------------------


def _torch_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, rates: Tensor, sizes: Sizes, w_mod: float
) -> Tensor:
    packed = packed.detach().requires_grad_()
    with torch.enable_grad():
        taps = hyena_filters_torch(packed, scale, rates, sizes, w_mod)
    return torch.autograd.grad(taps, packed, grad)[0]


@kernel_op("m2_plugin::hyena_filters")
def hyena_filters_op(
    packed: Tensor, scale: Tensor, rates: Tensor, sizes: list[int], w_mod: float, strict: bool
) -> Tensor:
    """Map packed weights, fp32, to taps (G, D, before + L); `sizes` are those of `Sizes`."""
    args = packed, scale, rates, Sizes(*sizes), w_mod
    return run_kernel(OP, strict, compute_taps, hyena_filters_torch, *args)


@hyena_filters_op.register_fake
def _(packed: Tensor, scale: Tensor, rates: Tensor, sizes: list[int], *_: Any) -> Tensor:
    return new_taps(packed, Sizes(*sizes))


@kernel_op("m2_plugin::hyena_filters_backward")
def backward_op(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    rates: Tensor,
    sizes: list[int],
    w_mod: float,
    strict: bool,
) -> Tensor:
    """Return the gradient of the packed weights."""
    args = grad, packed, scale, rates, Sizes(*sizes), w_mod
    return run_kernel(OP, strict, _backward, _torch_backward, *args)


@backward_op.register_fake
def _(grad: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(packed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, scale, rates, *ctx.rest = inputs
    ctx.save_for_backward(packed, scale, rates)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return backward_op(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


hyena_filters_op.register_autograd(_autograd, setup_context=_setup_context)


@register(OP, always_fp32=True)
def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Compare filters of the published order, and odd causal ones with several partial sums.

    The sines' arguments reach about 30, with a frequency that hardly amplifies errors.
    """
    normal = draws(dtype)
    for sizes in (Sizes(1, 2, 70, 48, 5, 128, 69), Sizes(2, 1, 300, 17, 3, 20, 299)):
        narrow = sizes.order**-0.5
        deviations = (narrow, narrow, narrow, 1.0, 3.0, 1.0, 1.0, 0.5, 1.0, 1.0)
        shapes = packed_shapes(sizes)
        parts = Packed(*(normal(*s, scale=d) for s, d in zip(shapes, deviations, strict=True)))
        packed = torch.cat([t.flatten() for t in parts._replace(freq=parts.freq + 3)])
        scale = torch.linspace(0, 1, sizes.length, dtype=dtype)
        rates = torch.linspace(3, 15, sizes.channels, dtype=dtype)
        args = packed, scale, rates, sizes, 1.0
        name = f"of order {sizes.order}"
        yield Case(f"forward {name}", compute_taps, hyena_filters_torch, args)
        grad = normal(sizes.filters, sizes.channels, sizes.before + sizes.length)
        yield Case(f"backward {name}", _backward, _torch_backward, (grad, *args))
