"""Triton kernels of the Monarch MLP: one launch forward; the activation stays in registers.

Dimension key: N rows, D hidden, F intermediate, K blocks, Q = D/K and P = F/K block widths.

`ops/README.md` says which blocks meet. One program computes one output block of a tile of rows: it
holds its two input blocks, walks over P in chunks, and adds each chunk's contribution to the output
in registers.

The sides of Triton's tiles are powers of two, so a block width is cut into two of them, Q1 ≥ Q2
(192 = 128 + 64). Padding it to one would waste a quarter of the products at the published sizes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from m2_plugin.ops.backend import interpreted
from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.block_diagonal_linear import (
    batched_product,
    batched_weight_grad,
    load_tile,
)
from m2_plugin.ops.kernels.check import Case, draws, register
from m2_plugin.ops.kernels.launch import (
    cdiv,
    device_class,
    dot_precision,
    fitting_warps,
    launch_kernel,
    major_capability,
    rows_contiguous,
    tile,
    torch_gradients,
)
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import run_kernel
from m2_plugin.ops.reference.block_diagonal_linear import block_diagonal_linear_torch
from m2_plugin.ops.reference.monarch_mlp import monarch_mlp_torch

OP = "monarch_mlp"

# The backward pass stores activations and their gradients for this many rows at a time.
BACKWARD_ROWS = 1 << 16


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one launch, for block widths up to `max_width`."""

    max_width: int
    rows: int
    chunk: int
    num_warps: int
    num_stages: int
    ahead: bool = False  # start the products of the next chunk before the arithmetic of this one


# By device class and bytes per element. Entries of one width are alternatives. The first is the
# default: the largest tiles that spill no registers and fit the shared memory, by ahead-of-time
# compilation (`tests/ops/aot.py`), and for blocks of 192 those that were measured on an H200. The
# forward kernel's order of work with `ahead` has not been: tuning times it. Wider blocks than these
# go to the block-diagonal kernel, which is efficient for them: here chunks of 32 columns would
# spill, and those of 16 are too narrow (`fitting_warps`).
FORWARD_CONFIGS = {
    ("large", 2): (
        Config(128, rows=128, chunk=64, num_warps=8, num_stages=3),
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=3),
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=3, ahead=True),
        Config(128, rows=64, chunk=32, num_warps=4, num_stages=3),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=3),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=3, ahead=True),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(192, rows=64, chunk=16, num_warps=4, num_stages=3),
        Config(256, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(256, rows=128, chunk=16, num_warps=8, num_stages=2),
        Config(256, rows=128, chunk=32, num_warps=8, num_stages=2, ahead=True),
    ),
    ("small", 2): (
        Config(128, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(128, rows=32, chunk=32, num_warps=4, num_stages=2),
        Config(256, rows=64, chunk=16, num_warps=8, num_stages=2),
        Config(256, rows=32, chunk=16, num_warps=4, num_stages=2),
    ),
    ("large", 4): (Config(128, rows=32, chunk=16, num_warps=4, num_stages=1),),
    ("small", 4): (Config(128, rows=32, chunk=16, num_warps=4, num_stages=1),),
}
BACKWARD_CONFIGS = {
    ("large", 2): (
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=2, ahead=True),
        Config(128, rows=64, chunk=32, num_warps=4, num_stages=2),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=2, ahead=True),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(192, rows=64, chunk=16, num_warps=4, num_stages=2),
        Config(256, rows=64, chunk=32, num_warps=4, num_stages=2),
        Config(256, rows=64, chunk=32, num_warps=4, num_stages=2, ahead=True),
    ),
    ("small", 2): (
        Config(256, rows=32, chunk=32, num_warps=8, num_stages=1),
        Config(256, rows=32, chunk=16, num_warps=4, num_stages=1),
    ),
    ("large", 4): (Config(128, rows=16, chunk=16, num_warps=8, num_stages=2),),
    ("small", 4): (Config(128, rows=16, chunk=16, num_warps=8, num_stages=2),),
}


@torch.compiler.assume_constant_result
def takes_blocks(width: int, size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the fused kernels take blocks of widths Q and P on a device in a dtype.

    Tiles fill the blocks exactly: Q is Q1 or Q1 + Q2, and 64 divides P. Kernels with tiles that
    blocks fill in part gave wrong results and memory errors on an H200 with Triton 3.6.
    """
    widest = FORWARD_CONFIGS[device_class(device), dtype.itemsize][-1].max_width
    return width <= widest and sum(split_width(width)) == width and size % 64 == 0


TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@torch.compiler.assume_constant_result
def works_ahead(device: torch.device) -> bool:
    """Return whether kernels with `ahead` are compiled as they are meant for a device.

    They need Hopper's asynchronous products, and a `ptxas` of CUDA 12.8: that of Triton 3.3 lets
    each product wait for the one before.
    """
    return interpreted() or (major_capability(device) == 9 and TRITON_VERSION >= (3, 4))


def choices(backward: bool, x: Tensor, width: int, glu: bool) -> list[Config]:
    """Return the configurations for a block width: those with the least `max_width` that fits."""
    kind = device_class(x.device), x.element_size()
    return _choices(backward, kind, width, glu and works_ahead(x.device))


@functools.cache
def _choices(backward: bool, kind: tuple[str, int], width: int, ahead: bool) -> list[Config]:
    table = (BACKWARD_CONFIGS if backward else FORWARD_CONFIGS)[kind]
    least = min(config.max_width for config in table if width <= config.max_width)
    return [c for c in table if c.max_width == least and (ahead or not c.ahead)]


def shape_class(x: Tensor, down: Tensor, glu: bool, p: float) -> tuple[Any, ...]:
    """Return what the fastest configuration depends on."""
    return tuning.row_class(x.shape[0]), *down.shape, x.dtype, glu, p > 0


def split_width(width: int) -> tuple[int, int]:
    """Cut a block width into Q1 and Q2 (0 if not needed), powers of two from 16 up."""
    q1 = max(16, 1 << (width.bit_length() - 1))
    rest = width - q1
    if rest <= 0:
        return q1, 0
    q2 = tile(rest, q1)
    return (2 * q1, 0) if q1 == 16 else (q1, q2)


def dropout_threshold(p: float) -> tuple[int, float]:
    """Return the number of 65,536 values of a random number that drop, and dropout's factor."""
    dropped = round(p * 65536)
    if dropped == 65536:
        return 65535, 0.0
    return dropped, 65536 / (65536 - dropped)


def dropout_mask(seed: Tensor, num_rows: int, num_blocks: int, size: int, threshold: int) -> Tensor:
    """Return which activations the kernels keep, (N, K·P) of bool: `_kept` in PyTorch."""

    def signed(number: int) -> int:  # int32 with the bits of an unsigned number
        return number - (1 << 32 if number >> 31 else 0)

    def shifted(bits: Tensor, places: int) -> Tensor:  # to the right, filled with zeros
        return (bits >> places) & ((1 << (32 - places)) - 1)

    def mix(bits: Tensor) -> Tensor:
        bits = (bits ^ shifted(bits, 16)) * signed(0x7FEB352D)
        bits = (bits ^ shifted(bits, 15)) * signed(0x846CA68B)
        return bits ^ shifted(bits, 16)

    def numbers(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=seed.device)

    by_row = mix(numbers(num_rows) ^ mix(seed.to(torch.int32)))
    by_pair = mix(numbers(num_blocks * ((size + 1) // 2)) * signed(0x9E3779B9) + signed(0x7F4A7C15))
    bits = (by_row[:, None] ^ by_pair) * signed(0x2C1B3C6D)
    bits = (bits ^ shifted(bits, 15)) * signed(0x297A2D39)
    kept = torch.stack((shifted(bits, 16), bits & 0xFFFF), -1) >= threshold
    return kept.view(num_rows, num_blocks, -1)[..., :size].reshape(num_rows, -1)


# Triton's interpreter has no inline assembly; there PyTorch's exact functions stand in.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _exp2(x):
    """2^x by the special function unit: relative error 2e-7, and 0 for results below 1e-38."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _reciprocal(x):
    """1/x by the special function unit: relative error 1e-7, and 0 for x above 1e38."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _add_now(x, y):
    """Add x and y before the next matrix products start, which reuse their registers."""
    if INTERPRETED:
        return x + y
    else:
        return tl.inline_asm_elementwise(
            "add.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=False, pack=1
        )


@triton.jit
def _fence(num_rows):
    """Keep the compiler from moving instructions across this place: a branch that is never taken.

    Without it, `ptxas` starts the products of the next chunk after the arithmetic of this one.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ge.s32 %p, $1, 0; @%p bra D;"
            " L: nanosleep.u32 64; bra L; D: mov.b32 $0, $1; }",
            "=r,r",
            [num_rows],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """Φ(x), the distribution function of the standard normal distribution.

    `tl.erf` takes about 30 instructions, more time than the matrix products. The approximation
    takes 8: the logarithm of the odds Φ(x)/(1 − Φ(x)) is x times a polynomial in x² (our own fit,
    for the least error of x·Φ). Its error of the GELU is at most 2.6e-5 and, in the negative tail
    down to x = −5, 4% of the value. That is a tenth of the rounding error of 16-bit numbers near 1,
    and less than the error from rounding x to bfloat16, as unfused PyTorch does.
    """
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        square = tl.minimum(x * x, 40.0)  # beyond, Φ is 0 or 1 in fp32, and the polynomial turns
        log_odds = x * (2.30112134 + square * (0.106775726 + square * -0.00101426330))
        return _reciprocal(1.0 + _exp2(-log_odds))


@triton.jit
def _gelu_grad(x, cdf):
    """The derivative of x·Φ(x), from x and Φ(x)."""
    return cdf + (x * 0.3989422804014327) * _exp2(x * x * -0.7213475204444817)


@triton.jit
def _mix(x):
    """Hash 32 bits to 32 bits (constants: C. Wellons, lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, rows, block, start, cols, threshold, SIZE: tl.constexpr):
    """Return which activations dropout keeps: those whose 16 random bits reach `threshold`.

    `dropout_mask` is the same in PyTorch. Triton's own generator, ten rounds of Philox, would take
    longer than the matrix products. Here the numbers of a row and of a pair of columns are each
    hashed well; together they are hashed once more for each pair, 16 bits for either column.
    The columns are `start + cols` of an activation block; `start` is even. The expression does not
    say that the two columns of a pair share a hash: the compiler sees it, if a thread holds both.
    """
    by_row = _mix(rows.to(tl.uint32) ^ _mix(seed.to(tl.uint32)))
    pairs = (cols >> 1).to(tl.uint32) + ((start >> 1) + block * ((SIZE + 1) // 2))
    bits = by_row[:, None] ^ _mix(pairs * 0x9E3779B9 + 0x7F4A7C15)[None, :]
    bits *= 0x2C1B3C6D
    bits ^= bits >> 15
    bits *= 0x297A2D39
    bits <<= ((cols & 1) * 16).to(tl.uint32)[None, :]
    return bits >= (threshold << 16)


@triton.jit
def _halves(
    ptr, rows, stride, num_rows, first,
    Q: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """Load the block of Q columns that begins at column `first`, in parts of Q1 and Q2."""
    cols = tl.arange(0, Q1)
    left = load_tile(ptr + first, rows, stride, num_rows, cols, 1, Q, True, Q1 > Q)
    right = left
    if Q2 > 0:
        cols = Q1 + tl.arange(0, Q2)
        right = load_tile(ptr + first, rows, stride, num_rows, cols, 1, Q, True, Q1 + Q2 > Q)
    return left, right


@triton.jit
def _into_part(
    x, ptr, q_stride, c_stride, count,
    MASK: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    Q: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Multiply x (rows, SIZE) by rows FIRST … FIRST + SIZE of the (Q, CHUNK) weights at `ptr`.

    Of the weights' columns, `count` exist.
    """
    q, c = FIRST + tl.arange(0, SIZE), tl.arange(0, CHUNK)
    w = load_tile(ptr, q, q_stride, Q, c, c_stride, count, FIRST + SIZE > Q, MASK)
    return tl.dot(x, w, input_precision=PRECISION)


@triton.jit
def _into_chunk(
    x1, x2, ptr, q_stride, c_stride, count,
    MASK: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    Q: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """Multiply (rows, Q) by the (Q, CHUNK) weights at `ptr`, of whose columns `count` exist."""
    h = _into_part(x1, ptr, q_stride, c_stride, count, MASK, PRECISION, CHUNK, Q, 0, Q1)
    if Q2 > 0:
        h += _into_part(x2, ptr, q_stride, c_stride, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
    return h


@triton.jit
def _activation(
    gate, lift, seed, rows, block, start, cols, threshold,
    GLU: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """GELU(gate) ⊙ lift with dropout, but without its factor."""
    h = gate * _normal_cdf(gate, EXACT)
    if DROPOUT:
        h = tl.where(_kept(seed, rows, block, start, cols, threshold, P), h, 0.0)
    if GLU:
        h *= lift
    return h


# The sizes of the blocks are compile-time constants: then the addresses of a chunk's weights are
# one base and constants, and no mask is left where the tiles divide the sizes.
@triton.jit
def mlp_forward_kernel(
    x_ptr,
    up_ptr,
    down_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    num_rows,
    stride_x,
    threshold,
    scale,
    K: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    GLU: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
):
    """Compute output block j of one tile of rows."""
    # Programs for one tile of rows are neighbours, so that they share its x in the L2 cache.
    j = tl.program_id(0) % K
    rows = (tl.program_id(0) // K).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtype = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    CHUNKS: tl.constexpr = (P + CHUNK - 1) // CHUNK
    MASK: tl.constexpr = P % CHUNK != 0
    R2: tl.constexpr = Q2 if Q2 > 0 else 16
    gate_in = j
    if GLU:
        gate_in = j // 2
    gate_ptr = up_ptr + j * (P * Q)
    lift_ptr = up_ptr + (K + j) * (P * Q)
    down_ptr += j * (Q * P)

    xg1, xg2 = _halves(x_ptr, rows, stride_x, num_rows, gate_in * Q, Q, Q1, Q2)
    xl1, xl2 = xg1, xg2
    if GLU:
        xl1, xl2 = _halves(x_ptr, rows, stride_x, num_rows, (K + j) // 2 * Q, Q, Q1, Q2)
    acc1 = tl.zeros((ROWS, Q1), tl.float32)
    acc2 = tl.zeros((ROWS, R2), tl.float32)
    c = tl.arange(0, CHUNK)
    out1 = tl.arange(0, Q1)
    out2 = Q1 + tl.arange(0, R2)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # With AHEAD, step s does the arithmetic of chunk s − 2, completes the products into chunk s − 1
    # and starts those into chunk s and out of chunk s − 2. They run during the arithmetic of step
    # s + 1, for which the weights of chunk s + 1 arrive, with room for two chunks of them.
    if AHEAD:
        gate = tl.zeros((ROWS, CHUNK), tl.float32)
        lift = gate
        g1 = gate
        g2 = gate
        l1 = gate
    for step in range(CHUNKS + 2 * AHEAD):
        if AHEAD:
            start = tl.maximum(step - 2, 0) * CHUNK
        else:
            start = step * CHUNK
            count = P - start
            w = gate_ptr + start * Q
            gate = _into_chunk(xg1, xg2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
            lift = gate
            if GLU:
                w = lift_ptr + start * Q
                lift = _into_chunk(xl1, xl2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
        h = _activation(gate, lift, seed, rows, j, start, c, threshold, GLU, DROPOUT, EXACT, P).to(
            dtype
        )
        if AHEAD:
            _fence(num_rows)
            middle = tl.minimum(tl.maximum(step - 1, 0), CHUNKS - 1) * CHUNK
            follow = tl.minimum(step, CHUNKS - 1) * CHUNK
            count, rest = P - middle, P - follow
            w, then = lift_ptr + middle * Q, lift_ptr + follow * Q
            if Q2 > 0:
                lift = _into_part(xl2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
                lift = _add_now(lift, l1)
                gate = _add_now(g1, g2)
                l1 = _into_part(xl1, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, 0, Q1)
            else:
                lift = _into_part(xl1, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, 0, Q1)
                gate = _add_now(g1, 0.0)
            then = gate_ptr + follow * Q
            g1 = _into_part(xg1, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, 0, Q1)
            if Q2 > 0:
                g2 = _into_part(xg2, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, Q1, Q2)
        count = P - start
        w1 = load_tile(down_ptr + start, c, 1, count, out1, P, Q, MASK, Q1 > Q)
        acc1 = tl.dot(h, w1, acc1, input_precision=PRECISION)
        if Q2 > 0:
            w2 = load_tile(down_ptr + start, c, 1, count, out2, P, Q, MASK, Q1 + Q2 > Q)
            acc2 = tl.dot(h, w2, acc2, input_precision=PRECISION)

    if DROPOUT:
        acc1 *= scale
        acc2 *= scale
    y = y_ptr + rows[:, None] * (K * Q) + j * Q
    bias_ptr += j * Q
    row_mask = (rows < num_rows)[:, None]
    if HAS_BIAS:
        acc1 += tl.load(bias_ptr + out1, mask=out1 < Q, other=0.0).to(tl.float32)[None, :]
    tl.store(y + out1[None, :], acc1.to(dtype), mask=row_mask & (out1 < Q)[None, :])
    if Q2 > 0:
        if HAS_BIAS:
            acc2 += tl.load(bias_ptr + out2, mask=out2 < Q, other=0.0).to(tl.float32)[None, :]
        tl.store(y + out2[None, :], acc2.to(dtype), mask=row_mask & (out2 < Q)[None, :])


@triton.jit
def activation_grad_kernel(
    grad_ptr,
    x_ptr,
    up_ptr,
    down_ptr,
    act_ptr,
    grad_up_ptr,
    bias_ptr,
    seed_ptr,
    first_row,
    num_rows,
    stride_grad,
    stride_x,
    threshold,
    scale,
    K: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    GLU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
):
    """Write the activation (N, F), computed again, and the gradient of the up-projection's output.

    The activation lacks dropout's factor `scale`. `bias_ptr` receives the sum of the gradient over
    each tile of rows, (tiles, D) in fp32. `first_row` is the number of the pointers' first row in
    the whole batch, which dropout needs.
    """
    j = tl.program_id(0) % K
    tile = tl.program_id(0) // K
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtype = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    CHUNKS: tl.constexpr = (P + CHUNK - 1) // CHUNK
    MASK: tl.constexpr = P % CHUNK != 0
    WIDTH: tl.constexpr = K * P  # F
    gate_in = j
    if GLU:
        gate_in = j // 2
    gate_ptr = up_ptr + j * (P * Q)
    lift_ptr = up_ptr + (K + j) * (P * Q)
    down_ptr += j * (Q * P)

    xg1, xg2 = _halves(x_ptr, rows, stride_x, num_rows, gate_in * Q, Q, Q1, Q2)
    xl1, xl2 = xg1, xg2
    if GLU:
        xl1, xl2 = _halves(x_ptr, rows, stride_x, num_rows, (K + j) // 2 * Q, Q, Q1, Q2)
    grad1, grad2 = _halves(grad_ptr, rows, stride_grad, num_rows, j * Q, Q, Q1, Q2)
    bias_ptr += tile * (K * Q) + j * Q
    in1 = tl.arange(0, Q1)
    tl.store(bias_ptr + in1, tl.sum(grad1.to(tl.float32), 0), mask=in1 < Q)
    if Q2 > 0:
        in2 = Q1 + tl.arange(0, Q2)
        tl.store(bias_ptr + in2, tl.sum(grad2.to(tl.float32), 0), mask=in2 < Q)
    c = tl.arange(0, CHUNK)
    act_ptr += rows[:, None] * WIDTH + (j * P + c)[None, :]
    if GLU:
        grad_up_ptr += rows[:, None] * (2 * WIDTH) + (j * P + c)[None, :]
    else:
        grad_up_ptr += rows[:, None] * WIDTH + (j * P + c)[None, :]
    row_mask = (rows < num_rows)[:, None]
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # With AHEAD, step s does the arithmetic of chunk s − 2, completes the products of chunk s − 1
    # and starts those of chunk s. In this order the weights of chunk s + 1 are on their way during
    # the arithmetic of chunk s − 1, with room for two chunks of them.
    if AHEAD:
        gate = tl.zeros((ROWS, CHUNK), tl.float32)
        lift = gate
        grad_act = gate
        g1 = gate
        g2 = gate
        l1 = gate
        b1 = gate
        b2 = gate
    for step in range(CHUNKS + 2 * AHEAD):
        if AHEAD:
            start = tl.maximum(step - 2, 0) * CHUNK
        else:
            start = step * CHUNK
            count = P - start
            w = down_ptr + start
            grad_act = _into_chunk(grad1, grad2, w, P, 1, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
            w = gate_ptr + start * Q
            gate = _into_chunk(xg1, xg2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
            lift = gate
            if GLU:
                w = lift_ptr + start * Q
                lift = _into_chunk(xl1, xl2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
        num_cols = P - start
        if AHEAD:
            num_cols = tl.minimum(num_cols, (step - 1) * P)  # none in steps 0 and 1
        mask = row_mask & (c < num_cols)[None, :]
        cdf = _normal_cdf(gate, EXACT)
        act = gate * cdf
        if DROPOUT:
            kept = _kept(seed, first_row + rows, j, start, c, threshold, P)
            grad_act = tl.where(kept, grad_act * scale, 0.0)
        if GLU:
            tl.store(grad_up_ptr + (WIDTH + start), (grad_act * act).to(dtype), mask=mask)
            grad_act *= lift
            act *= lift
        tl.store(grad_up_ptr + start, (grad_act * _gelu_grad(gate, cdf)).to(dtype), mask=mask)
        if DROPOUT:
            act = tl.where(kept, act, 0.0)
        tl.store(act_ptr + start, act.to(dtype), mask=mask)
        if AHEAD:
            _fence(num_rows)
            start = tl.minimum(tl.maximum(step - 1, 0), CHUNKS - 1) * CHUNK
            follow = tl.minimum(step, CHUNKS - 1) * CHUNK
            count, rest = P - start, P - follow
            w, then = lift_ptr + start * Q, lift_ptr + follow * Q
            if Q2 > 0:
                lift = _into_part(xl2, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, Q1, Q2)
                lift = _add_now(lift, l1)
                gate = _add_now(g1, g2)
                grad_act = _add_now(b1, b2)
                l1 = _into_part(xl1, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, 0, Q1)
            else:
                lift = _into_part(xl1, w, 1, Q, count, MASK, PRECISION, CHUNK, Q, 0, Q1)
                gate = _add_now(g1, 0.0)
                grad_act = _add_now(b1, 0.0)
            then = gate_ptr + follow * Q
            g1 = _into_part(xg1, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, 0, Q1)
            if Q2 > 0:
                g2 = _into_part(xg2, then, 1, Q, rest, MASK, PRECISION, CHUNK, Q, Q1, Q2)
            then = down_ptr + follow
            b1 = _into_part(grad1, then, P, 1, rest, MASK, PRECISION, CHUNK, Q, 0, Q1)
            if Q2 > 0:
                b2 = _into_part(grad2, then, P, 1, rest, MASK, PRECISION, CHUNK, Q, Q1, Q2)


def _grid(config: Config, x: Tensor, down: Tensor) -> tuple[int]:
    return (cdiv(x.shape[0], tile(x.shape[0], config.rows)) * down.shape[0],)


def _constants(config: Config, x: Tensor, down: Tensor, glu: bool, p: float) -> dict[str, Any]:
    """Return the arguments that both kernels have, but for tensors and their strides."""
    num_blocks, width, size = down.shape
    q1, q2 = split_width(width)
    rows, chunk = tile(x.shape[0], config.rows), tile(size, config.chunk)
    threshold, scale = dropout_threshold(p)
    return {
        "threshold": threshold,
        "scale": scale,
        "K": num_blocks,
        "Q": width,
        "P": size,
        "GLU": glu,
        "DROPOUT": p > 0,
        "PRECISION": dot_precision(x.dtype),
        "AHEAD": config.ahead,
        "ROWS": rows,
        "CHUNK": chunk,
        "Q1": q1,
        "Q2": q2,
        "num_warps": fitting_warps(config.num_warps, rows, chunk),
        "num_stages": config.num_stages,
    }


def _forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    glu: bool,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    width = down.shape[1]
    up, down = up.contiguous(), down.contiguous()
    x = rows_contiguous(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)

    def launch(config: Config) -> None:
        launch_kernel(
            mlp_forward_kernel,
            _grid(config, x, down),
            x,
            up,
            down,
            x if bias is None else bias,
            y,
            x if seed is None else seed,
            x.shape[0],
            x.stride(0),
            HAS_BIAS=bias is not None,
            **_constants(config, x, down, glu, p),
        )

    key = shape_class(x, down, glu, p)
    launch(tuning.best(OP, key, choices(False, x, width, glu), launch, x.device))
    return y


def _activation_grad(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    glu: bool,
    p: float,
    seed: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `activation_grad_kernel`.

    Returns:
        The activation (N, F) without dropout's factor, the gradient of the up-projection's output
        (N, 2F), and the sum of `grad` over the rows, (D,) in fp32.
    """
    num_rows, hidden = x.shape
    num_blocks, width, size = down.shape
    act = x.new_empty(num_rows, num_blocks * size)
    grad_up = x.new_empty(num_rows, num_blocks * size * (2 if glu else 1))

    def launch(config: Config) -> Tensor:
        grid = _grid(config, x, down)
        sums = x.new_empty(grid[0] // num_blocks, hidden, dtype=torch.float32)
        launch_kernel(
            activation_grad_kernel,
            grid,
            grad,
            x,
            up,
            down,
            act,
            grad_up,
            sums,
            x if seed is None else seed,
            first_row,
            num_rows,
            grad.stride(0),
            x.stride(0),
            **_constants(config, x, down, glu, p),
        )
        return sums

    key = shape_class(x, down, glu, p)
    op = "monarch_mlp_backward"
    sums = launch(tuning.best(op, key, choices(True, x, width, glu), launch, x.device))
    return act, grad_up, sums.sum(0)


def _backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, glu: bool, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    up, down, grad = up.contiguous(), down.contiguous(), grad.contiguous()
    x = rows_contiguous(x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_blocks, scale = down.shape[0], dropout_threshold(p)[1]
    parts = []
    for first in range(0, x.shape[0], BACKWARD_ROWS):
        part = slice(first, first + BACKWARD_ROWS)
        act, grad_up, grad_bias = _activation_grad(
            grad[part], x[part], up, down, glu, p, seed, first
        )
        batched_product(grad_up, up.transpose(1, 2), grad_x[part])
        grad_up_weight = batched_weight_grad(grad_up, x[part], num_blocks)
        grad_down_weight = batched_weight_grad(grad[part], act, num_blocks, scale)
        parts.append((grad_up_weight, grad_down_weight, grad_bias))
    if len(parts) == 1:
        grad_up_weight, grad_down_weight, grad_bias = parts[0]
    else:  # in fp32
        sums = [torch.stack([t.float() for t in same]).sum(0) for same in zip(*parts, strict=True)]
        grad_up_weight, grad_down_weight, grad_bias = sums
    return (
        grad_x,
        grad_up_weight.to(x.dtype),
        grad_down_weight.to(x.dtype),
        grad_bias.to(x.dtype),
    )


# --- torch.library --------------------------------------------------------------------------------


def _torch_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    glu: bool,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    num_blocks, _, size = down.shape
    intermediate = num_blocks * size
    if seed is None:
        return monarch_mlp_torch(x, up, down, bias, intermediate, glu)
    # With the kernel's own mask, so that the two directions agree if only one of them falls back.
    h = block_diagonal_linear_torch(x, up)
    h = F.gelu(h[:, :intermediate]) * h[:, intermediate:] if glu else F.gelu(h)
    threshold, scale = dropout_threshold(p)
    h = h * dropout_mask(seed, x.shape[0], num_blocks, size, threshold) * scale
    return block_diagonal_linear_torch(h, down, bias)


def _torch_backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, glu: bool, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return _torch_forward(x, up, down, None, glu, p, seed)

    grad_x, grad_up, grad_down = torch_gradients(mlp, (x, up, down), grad)
    return grad_x, grad_up, grad_down, grad.sum(0)


@kernel_op("m2_plugin::monarch_mlp")
def monarch_mlp_op(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    glu: bool,
    dropout_p: float,
    strict: bool,
) -> Tensor:
    """Map x (N, D); up (K, 2P or P, Q), down (K, Q, P), bias (D,) of its dtype; seed (1,)."""
    args = (x, up, down, bias, glu, dropout_p, seed)
    return run_kernel(OP, strict, _forward, _torch_forward, *args)


@monarch_mlp_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("m2_plugin::monarch_mlp_backward")
def backward_op(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    seed: Tensor | None,
    glu: bool,
    dropout_p: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, up, down and bias."""
    args = (grad, x, up, down, glu, dropout_p, seed)
    return run_kernel(OP, strict, _backward, _torch_backward, *args)


@backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=like),
        torch.empty_like(up, memory_format=like),
        torch.empty_like(down, memory_format=like),
        grad.new_empty(grad.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, up, down, bias, seed, ctx.glu, ctx.dropout_p, ctx.strict = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, up, down, seed)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, up, down, seed = ctx.saved_tensors
    grads = backward_op(grad, x, up, down, seed, ctx.glu, ctx.dropout_p, ctx.strict)
    return *grads[:3], grads[3] if ctx.has_bias else None, None, None, None, None


monarch_mlp_op.register_autograd(_autograd, setup_context=_setup_context)


@register(OP)
def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Compare the blocks of the base size, if they fit in this dtype, and small ones."""
    normal = draws(dtype)
    base = 192 if dtype.itemsize == 2 else 96
    for rows, width, size, glu in ((128, base, 256, True), (70, 32, 64, False)):
        x, grad, bias = normal(rows, 2 * width), normal(rows, 2 * width), normal(2 * width)
        up = normal(2, size * (2 if glu else 1), width, scale=width**-0.5)
        down = normal(2, width, size, scale=size**-0.5)
        name = f"of blocks of {width}"
        forward = x, up, down, bias, glu, 0.0, None
        yield Case(f"forward {name}", _forward, _torch_forward, forward)
        backward = grad, x, up, down, glu, 0.0, None
        yield Case(f"backward {name}", _backward, _torch_backward, backward)
