"""Triton kernels of the mixer's core for short sequences: long convolutions as Toeplitz products.

Dimension key: B batch, L sequence, D channels, T = 2L − 1 taps of a two-sided filter.

`ops/README.md` explains the method. One program computes one channel and keeps everything between
p, u and y on the chip. Positions are contiguous in memory, as the input projection can write them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.gates import (
    Gradients,
    Inputs,
    add_sums,
    adjoint_octets,
    conv_octets,
    conv_tile,
    gated_tile,
    in_units,
    load,
    multiply_octets,
    next_octets,
    split_octets,
    store_sums,
    unit_of,
    unmasked,
)
from m2_plugin.ops.kernels.launch import (
    cdiv,
    dot_precision,
    empty_sequence_last,
    fitting_warps,
    launch_kernel,
    next_power_of_2,
    sequence_last,
    tile,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one launch."""

    batch: int
    positions: int
    step: int  # of the inner loop over positions
    num_warps: int
    num_stages: int


# By launch, bytes per element, and what the launch's addresses are like: "one" if the length is a
# multiple of 8 and fits in one tile of this configuration, "many" if it takes more, "any" if 8 does
# not divide it. The first of each spills no registers (`tests/ops/aot.py`). A second spills a few,
# and was faster on an H200 (in the order below, 248 µs instead of 326 at 128 positions, 866 instead
# of 1,355 and 334 instead of 583 at 512): tuning times both.
CONFIGS = {
    ("forward", 2, "one"): (Config(64, 128, 64, num_warps=8, num_stages=1),),
    ("forward", 2, "many"): (Config(64, 128, 64, num_warps=8, num_stages=1),),
    ("forward", 2, "any"): (Config(64, 64, 64, num_warps=8, num_stages=1),),
    ("backward", 2, "one"): (
        Config(64, 128, 64, num_warps=8, num_stages=1),
        Config(64, 128, 64, num_warps=4, num_stages=1),
    ),
    ("backward", 2, "many"): (
        Config(64, 64, 64, num_warps=8, num_stages=1),
        Config(64, 128, 64, num_warps=8, num_stages=1),
    ),
    ("backward", 2, "any"): (Config(32, 32, 32, num_warps=4, num_stages=1),),
    ("taps", 2, "one"): (Config(128, 128, 64, num_warps=8, num_stages=1),),
    ("taps", 2, "many"): (
        Config(64, 128, 64, num_warps=8, num_stages=1),
        Config(32, 128, 64, num_warps=4, num_stages=1),
    ),
    ("taps", 2, "any"): (Config(32, 64, 64, num_warps=8, num_stages=1),),
    ("taps_res", 2, "one"): (Config(128, 128, 64, num_warps=8, num_stages=3),),
    ("taps_res", 2, "many"): (Config(64, 64, 64, num_warps=4, num_stages=2),),
    ("taps_res", 2, "any"): (Config(32, 64, 64, num_warps=8, num_stages=1),),
}
for _kernel in ("forward", "backward", "taps", "taps_res"):  # fp32
    _warps = 8 if _kernel == "backward" else 4
    for _kind in ("one", "many"):
        CONFIGS[_kernel, 4, _kind] = (Config(16, 32, 32, num_warps=_warps, num_stages=1),)
    CONFIGS[_kernel, 4, "any"] = (Config(16, 16, 16, num_warps=_warps, num_stages=1),)


@triton.jit
def taps_copies_kernel(
    taps_ptr, res_taps_ptr, out_ptr, length, channels, units, BLOCK: tl.constexpr
):
    """Write 8 copies of a filter's taps, copy j shifted by j: any 8 taps are aligned in one.

    Copy j holds at i the tap at lag i + j − width / 2, and 0 beyond the filter. The output is
    (filters, D, 8, width), where width = 8 · units.
    """
    d = tl.program_id(0).to(tl.int64)
    ptr = taps_ptr
    if tl.program_id(1) == 1:
        ptr = res_taps_ptr
    width = units * 8
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    copy = tl.arange(0, 8)[:, None]
    lag = i + copy - width // 2
    inside = (lag < length) & (lag > -length)
    taps = tl.load(ptr + d * (2 * length - 1) + length - 1 + lag, mask=inside, other=0.0)
    out = out_ptr + (tl.program_id(1) * channels + d) * 8 * width + copy * width + i
    tl.store(out, taps.to(out_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def toeplitz_tile(copies, width, first_s, first_t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the taps at lags t − s as a matrix of s and t. `copies` are those of one filter."""
    start = width // 2 + first_t - first_s - tl.arange(0, ROWS)
    copy = start % 8
    row = tl.multiple_of(copy * width + (start - copy), 8)
    return tl.load(copies + row[:, None] + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def toeplitz_forward_kernel(
    p_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    copies_ptr,
    mask_ptr,
    y_ptr,
    batch_size,
    length_units,
    channels,
    width_units,
    stride_pb,
    stride_pc,
    stride_ub,
    stride_uc,
    stride_yb,
    stride_yc,
    RESIDUAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    FULL: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute y for one channel and a tile of rows and positions t."""
    first_t = tl.program_id(0) * POSITIONS
    d = tl.program_id(2).to(tl.int64)
    batch = (tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]).to(tl.int64)
    in_batch = batch < batch_size
    dtype = p_ptr.dtype.element_ty
    length = length_units * UNIT
    width = width_units * 8
    copies = copies_ptr + d * 8 * width
    stride_pc *= UNIT
    p_rows = batch * (stride_pb * UNIT)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_t + POSITIONS)
    if ONE_TILE:
        end = POSITIONS
    acc = tl.zeros((BATCH, POSITIONS), tl.float32)
    for first in range(0, end, STEP):
        w = gated_tile(
            p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc, p_rows,
            batch, in_batch, first, length, HAS_MASK, HAS_P_BIAS, FULL, BATCH, STEP,
        )  # fmt: skip
        matrix = toeplitz_tile(copies, width, first, first_t, STEP, POSITIONS)
        acc = tl.dot(w.to(dtype), matrix, acc, input_precision=PRECISION)
    x2 = channels + d
    acc *= conv_tile(
        p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, x2, p_rows, in_batch, first_t,
        length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
    )  # fmt: skip
    if RESIDUAL:
        copies += tl.cast(channels, tl.int64) * 8 * width
        u_ptr += d * (stride_uc * UNIT)
        for first in range(0, end, STEP):
            cols = first + tl.arange(0, STEP)[None, :]
            u = unmasked(
                u_ptr, mask_ptr, batch * (stride_ub * UNIT), batch, cols, length,
                in_batch & (cols < length), HAS_MASK, FULL,
            )  # fmt: skip
            matrix = toeplitz_tile(copies, width, first, first_t, STEP, POSITIONS)
            acc = tl.dot(u, matrix, acc, input_precision=PRECISION)
    t = first_t + tl.arange(0, POSITIONS)[None, :]
    y = y_ptr + d * (stride_yc * UNIT) + batch * (stride_yb * UNIT) + t
    tl.store(y, acc.to(dtype), mask=in_batch & (t < length))


@triton.jit
def toeplitz_backward_kernel(
    grad_ptr,
    p_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    copies_ptr,
    mask_ptr,
    grad_p_ptr,
    grad_u_ptr,
    sums_ptr,
    batch_size,
    length_units,
    channels,
    width_units,
    stride_gb,
    stride_gc,
    stride_pb,
    stride_pc,
    stride_ob,
    stride_oc,
    stride_ub,
    stride_uc,
    RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    FULL: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute the gradients of p and u for one channel and a tile of rows, and sums for parameters.

    With g = grad · x2: dx2 = grad · (taps ∗ w), dw[r] = Σ_t taps[t − r] · g[t], dx1 = dw · v and
    dv = dw · x1. du is computed like dw, from grad and the residual taps. The tiles of positions r
    come last to first, because the adjoint of the short convolution looks two positions ahead.
    """
    d = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) * BATCH + tl.arange(0, BATCH)[:, None]).to(tl.int64)
    in_batch = batch < batch_size
    dtype = p_ptr.dtype.element_ty
    length = length_units * UNIT
    width = width_units * 8
    copies = copies_ptr + d * 8 * width
    res_copies = copies + tl.cast(channels, tl.int64) * 8 * width
    stride_pc *= UNIT
    stride_oc *= UNIT
    p_rows = batch * (stride_pb * UNIT)
    out_rows = batch * (stride_ob * UNIT)
    grad_rows = grad_ptr + d * (stride_gc * UNIT) + batch * (stride_gb * UNIT)
    u_rows = grad_u_ptr + d * (stride_uc * UNIT) + batch * (stride_ub * UNIT)
    x2 = channels + d
    v = 2 * channels + d
    offsets = tl.arange(0, POSITIONS)[None, :]
    end = length
    tiles = tl.cdiv(length, POSITIONS)
    if ONE_TILE:
        end = POSITIONS
        tiles = 1
    zero = tl.zeros((BATCH, 1), tl.float32)
    x1_0, x1_1, x2_0, x2_1, v_0, v_1 = zero, zero, zero, zero, zero, zero
    for i in range(0, tiles):
        tile = tiles - 1 - i
        first_r = tile * POSITIONS
        r = first_r + offsets
        inside = in_batch & (r < length)
        sums = sums_ptr + (tl.program_id(0) * tiles + tile) * 15 * tl.cast(channels, tl.int64)

        acc = tl.zeros((BATCH, POSITIONS), tl.float32)
        for first in range(0, end, STEP):
            w = gated_tile(
                p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc, p_rows,
                batch, in_batch, first, length, HAS_MASK, HAS_P_BIAS, FULL, BATCH, STEP,
            )  # fmt: skip
            matrix = toeplitz_tile(copies, width, first, first_r, STEP, POSITIONS)
            acc = tl.dot(w.to(dtype), matrix, acc, input_precision=PRECISION)
        octets = multiply_octets(
            split_octets(acc, BATCH, POSITIONS),
            split_octets(load(grad_rows + r, inside, FULL).to(tl.float32), BATCH, POSITIONS),
        )
        next0, next1, x2_0, x2_1 = next_octets(
            octets[0], octets[1], x2_0, x2_1, BATCH, POSITIONS // 8
        )
        grad_p, sum4, sum_p = adjoint_octets(
            octets, next0, next1, p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, x2,
            p_rows, in_batch, first_r, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
        )  # fmt: skip
        tl.store(grad_p_ptr + x2 * stride_oc + out_rows + r, grad_p.to(dtype), mask=inside)
        store_sums(sums, x2, sum4, sum_p, HAS_P_BIAS)

        acc = tl.zeros((BATCH, POSITIONS), tl.float32)
        for first in range(0, end, STEP):
            cols = first + tl.arange(0, STEP)[None, :]
            grad = load(grad_rows + cols, in_batch & (cols < length), FULL)
            gate = conv_tile(
                p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, x2, p_rows, in_batch,
                first, length, HAS_P_BIAS, FULL, BATCH, STEP,
            )  # fmt: skip
            matrix = tl.trans(toeplitz_tile(copies, width, first_r, first, POSITIONS, STEP))
            acc = tl.dot((grad * gate).to(dtype), matrix, acc, input_precision=PRECISION)
        if not FULL:
            acc = tl.where(inside, acc, 0.0)
        if HAS_MASK:
            kept = load(mask_ptr + batch * length + r, inside, FULL).to(tl.float32)
            acc *= kept
        grad_w = split_octets(acc, BATCH, POSITIONS)
        octets = multiply_octets(
            grad_w,
            conv_octets(
                p_ptr + d * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, d, p_rows, in_batch,
                first_r, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
            ),
        )  # fmt: skip
        next0, next1, v_0, v_1 = next_octets(octets[0], octets[1], v_0, v_1, BATCH, POSITIONS // 8)
        grad_p, sum4, sum_p = adjoint_octets(
            octets, next0, next1, p_ptr + v * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, v,
            p_rows, in_batch, first_r, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
        )  # fmt: skip
        tl.store(grad_p_ptr + v * stride_oc + out_rows + r, grad_p.to(dtype), mask=inside)
        store_sums(sums, v, sum4, sum_p, HAS_P_BIAS)
        octets = multiply_octets(
            grad_w,
            conv_octets(
                p_ptr + v * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, v, p_rows, in_batch,
                first_r, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
            ),
        )  # fmt: skip
        next0, next1, x1_0, x1_1 = next_octets(
            octets[0], octets[1], x1_0, x1_1, BATCH, POSITIONS // 8
        )
        grad_p, sum4, sum_p = adjoint_octets(
            octets, next0, next1, p_ptr + d * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, d,
            p_rows, in_batch, first_r, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
        )  # fmt: skip
        tl.store(grad_p_ptr + d * stride_oc + out_rows + r, grad_p.to(dtype), mask=inside)
        store_sums(sums, d, sum4, sum_p, HAS_P_BIAS)

        if RESIDUAL:
            acc = tl.zeros((BATCH, POSITIONS), tl.float32)
            for first in range(0, end, STEP):
                cols = first + tl.arange(0, STEP)[None, :]
                grad = load(grad_rows + cols, in_batch & (cols < length), FULL)
                matrix = tl.trans(toeplitz_tile(res_copies, width, first_r, first, POSITIONS, STEP))
                acc = tl.dot(grad, matrix, acc, input_precision=PRECISION)
            if HAS_MASK:
                kept = load(mask_ptr + batch * length + r, inside, FULL)
                acc *= kept.to(tl.float32)
            tl.store(u_rows + r, acc.to(dtype), mask=inside)


@triton.jit
def taps_grad_kernel(
    grad_ptr,
    p_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    p_bias_ptr,
    mask_ptr,
    out_ptr,
    batch_size,
    length_units,
    channels,
    stride_gb,
    stride_gc,
    stride_pb,
    stride_pc,
    stride_ub,
    stride_uc,
    GATED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_P_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    FULL: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute Σ_b Σ_s g[b, s + lag] · w[b, s] for the lags between two diagonals of tiles.

    Pairs of tiles of t and s with the same distance have the same lags, so they share one sum of
    outer products, (s, t). Row s is then rotated by s, which puts each diagonal, one lag, into a
    column. With one tile, the output is (D, 2L − 1). With more, it is (D, 2 · tiles − 1, 2, P):
    row j holds this program's share of the lags (j − tiles) · P … (j − tiles + 2) · P − 1.
    """
    d = tl.program_id(1).to(tl.int64)
    length = length_units * UNIT
    stride_pc *= UNIT
    tiles = tl.cdiv(length, POSITIONS)
    apart = tl.program_id(0) - (tiles - 1)  # tile of t minus tile of s
    from_tile, to_tile = tl.maximum(0, -apart), tl.minimum(tiles, tiles - apart)
    if ONE_TILE:
        apart = 0
        from_tile = 0
        to_tile = 1
    dtype = p_ptr.dtype.element_ty
    x2 = channels + d
    acc = tl.zeros((POSITIONS, POSITIONS), tl.float32)
    for first_row in range(0, batch_size, BATCH):
        batch = (first_row + tl.arange(0, BATCH)[:, None]).to(tl.int64)
        in_batch = batch < batch_size
        p_rows = batch * (stride_pb * UNIT)
        for i in range(from_tile, to_tile):
            first_s = i * POSITIONS
            first_t = (i + apart) * POSITIONS
            t = first_t + tl.arange(0, POSITIONS)[None, :]
            grad_rows = grad_ptr + d * (stride_gc * UNIT) + batch * (stride_gb * UNIT)
            grad = load(grad_rows + t, in_batch & (t < length), FULL)
            if GATED:
                gate = conv_tile(
                    p_ptr + x2 * stride_pc, weight_ptr, bias_ptr, p_bias_ptr, x2, p_rows, in_batch,
                    first_t, length, HAS_P_BIAS, FULL, BATCH, POSITIONS,
                )  # fmt: skip
                grad = (grad * gate).to(dtype)
                w = gated_tile(
                    p_ptr, weight_ptr, bias_ptr, p_bias_ptr, mask_ptr, d, channels, stride_pc,
                    p_rows, batch, in_batch, first_s, length, HAS_MASK, HAS_P_BIAS, FULL, BATCH,
                    POSITIONS,
                ).to(dtype)  # fmt: skip
            else:
                s = first_s + tl.arange(0, POSITIONS)[None, :]
                w = unmasked(
                    u_ptr + d * (stride_uc * UNIT), mask_ptr, batch * (stride_ub * UNIT), batch, s,
                    length, in_batch & (s < length), HAS_MASK, FULL,
                )  # fmt: skip
            acc = tl.dot(tl.trans(w), grad, acc, input_precision=PRECISION)
    s = tl.arange(0, POSITIONS)[:, None]
    column = tl.arange(0, POSITIONS)[None, :]
    acc = tl.gather(acc, (s + column) % POSITIONS, 1)
    wraps = s + column >= POSITIONS
    lag = tl.arange(0, POSITIONS)
    high = tl.sum(tl.where(wraps, 0.0, acc), 0)
    low = tl.sum(tl.where(wraps, acc, 0.0), 0)
    if ONE_TILE:
        out_ptr += d * (2 * length - 1) + length - 1
        tl.store(out_ptr + lag, high, mask=lag < length)
        tl.store(out_ptr + lag - POSITIONS, low, mask=lag - POSITIONS > -length)
    else:
        out_ptr += (d * (2 * tiles - 1) + tl.program_id(0)) * 2 * POSITIONS
        tl.store(out_ptr + lag, low)
        tl.store(out_ptr + POSITIONS + lag, high)


@triton.jit
def shared_lags_kernel(out_ptr, taps_ptr, length, tiles, POSITIONS: tl.constexpr):
    """Add what two programs of `taps_grad_kernel` found for a lag: rows (2 · tiles − 1, 2, P).

    The upper half of row j has the lags of the lower half of row j + 1.
    """
    d = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    column = tl.arange(0, POSITIONS)
    lower = out_ptr + (d * (2 * tiles - 1) + row) * (2 * POSITIONS) + column
    total = tl.load(lower, mask=(column >= 0) & (row < 2 * tiles - 1), other=0.0)
    total += tl.load(lower - POSITIONS, mask=(column >= 0) & (row > 0), other=0.0)
    lag = (row - tiles) * POSITIONS + column
    taps = taps_ptr + d * (2 * length - 1) + length - 1 + lag
    tl.store(taps, total, mask=(lag > -length) & (lag < length))


@dataclass(frozen=True)
class _Launch:
    """The tensors of `Inputs` as the kernels take them, and what their launches have in common."""

    p: Tensor
    u: Tensor
    parameters: tuple[Tensor, ...]  # weight, bias and p_bias
    mask: Tensor
    batch_size: int
    length: int
    channels: int
    unit: int  # 8 if 8 divides the length and all strides, else 1
    constants: dict[str, Any]

    def run(self, kernel: str, launch: Callable[[Config, dict[str, Any]], Result]) -> Result:
        """Call `launch` with the configuration of a kernel, and its keyword arguments."""
        size = self.p.element_size()
        configs = _configs(kernel, size, self.unit, self.batch_size, self.length)

        def run(config: Config) -> Result:
            fitted, options = configs[config]
            return launch(fitted, self.constants | options)

        chosen, *others = configs
        if others:
            classes = tuning.row_class(self.batch_size * self.length), next_power_of_2(self.length)
            given = self.channels, self.p.dtype, self.unit, self.u is not self.p
            key = *classes, *given, *self.constants.values()
            chosen = tuning.best(f"toeplitz {kernel}", key, list(configs), run, self.p.device)
        return run(chosen)


@functools.lru_cache(1024)
def _configs(
    kernel: str, size: int, unit: int, batch_size: int, length: int
) -> dict[Config, tuple[Config, dict[str, Any]]]:
    """Return the configurations of a launch, with tiles no larger than the sizes, and constants.

    Lengths with the same next power of two have the same configurations.
    """
    one = length <= CONFIGS[kernel, size, "one"][0].positions
    found = {}
    for config in CONFIGS[kernel, size, "any" if unit == 1 else "one" if one else "many"]:
        fitted = replace(
            config,
            batch=tile(batch_size, config.batch),
            positions=tile(length, config.positions),
            step=tile(length, config.step),
        )
        rows = fitted.positions if kernel.startswith("taps") else fitted.batch  # of its products
        found[config] = (
            fitted,
            {
                "UNIT": unit,
                "FULL": length % fitted.positions == batch_size % fitted.batch == 0,
                "ONE_TILE": length <= fitted.positions,
                "BATCH": fitted.batch,
                "POSITIONS": fitted.positions,
                "STEP": fitted.step,
                "num_warps": fitting_warps(config.num_warps, rows, fitted.positions),
                "num_stages": fitted.num_stages,
            },
        )
    return found


def _launch(inputs: Inputs, *others: Tensor) -> _Launch:
    """Prepare `inputs`; `others` are further sequences (B, L, C) that the kernels will address."""
    p = sequence_last(inputs.p)
    u = p if inputs.u is None else sequence_last(inputs.u)
    p_bias = inputs.bias if inputs.p_bias is None else inputs.p_bias
    batch_size, length, channels = p.shape
    return _Launch(
        p=p,
        u=u,
        parameters=(inputs.weight, inputs.bias, p_bias),
        mask=p if inputs.mask is None else inputs.mask,  # any tensor for a None
        batch_size=batch_size,
        length=length,
        channels=channels // 3,
        unit=unit_of(p, u, *others),
        constants={
            "HAS_MASK": inputs.mask is not None,
            "HAS_P_BIAS": inputs.p_bias is not None,
            "PRECISION": dot_precision(p.dtype),
        },
    )


def _copies(inputs: Inputs, dtype: torch.dtype, positions: int) -> tuple[Tensor, int]:
    """Return the shifted copies of both filters' taps in `dtype`, and their width / 8."""
    taps, res_taps = inputs.taps, inputs.res_taps
    channels, length = taps.shape[0], taps.shape[1] // 2 + 1
    width = 2 * cdiv(length, positions) * positions
    filters = 1 if res_taps is None else 2
    copies = torch.empty(filters, channels, 8, width, dtype=dtype, device=taps.device)
    block = min(next_power_of_2(width), 256)
    launch_kernel(
        taps_copies_kernel,
        (channels, filters, cdiv(width, block)),
        taps,
        taps if res_taps is None else res_taps,
        copies,
        length,
        channels,
        width // 8,
        BLOCK=block,
        num_warps=4,
    )
    return copies, width // 8


def forward(inputs: Inputs, causal: bool) -> Tensor:
    """Compute `gated_long_conv_op`."""
    y = empty_sequence_last(inputs.p, inputs.p.shape[2] // 3)
    launch = _launch(inputs, y)

    def run(config: Config, options: dict[str, Any]) -> Tensor:
        copies, width = _copies(inputs, launch.p.dtype, config.positions)
        grid = (
            cdiv(launch.length, config.positions),
            cdiv(launch.batch_size, config.batch),
            launch.channels,
        )
        launch_kernel(
            toeplitz_forward_kernel,
            grid,
            launch.p,
            launch.u,
            *launch.parameters,
            copies,
            launch.mask,
            y,
            launch.batch_size,
            launch.length // launch.unit,
            launch.channels,
            width,
            *in_units(launch.unit, launch.p, launch.u, y),
            RESIDUAL=inputs.res_taps is not None,
            CAUSAL=causal,
            **options,
        )
        return y

    return launch.run("forward", run)


def _taps_grad(grad: Tensor, launch: _Launch, is_gated: bool) -> Tensor:
    """Return the gradient (D, 2L − 1) of one filter's taps, fp32, bitwise reproducible."""
    length, channels = launch.length, launch.channels

    def run(config: Config, options: dict[str, Any]) -> Tensor:
        positions = config.positions
        tiles = cdiv(length, positions)
        each = (2 * length - 1,) if tiles == 1 else (2 * tiles - 1, 2, positions)
        out = torch.empty(channels, *each, dtype=torch.float32, device=grad.device)
        launch_kernel(
            taps_grad_kernel,
            (2 * tiles - 1, channels),
            grad,
            launch.p,
            launch.u,
            *launch.parameters,
            launch.mask,
            out,
            launch.batch_size,
            length // launch.unit,
            channels,
            *in_units(launch.unit, grad, launch.p, launch.u),
            GATED=is_gated,
            **options,
        )
        return out

    out = launch.run("taps" if is_gated else "taps_res", run)
    if out.ndim == 2:
        return out
    _, rows, _, positions = out.shape
    taps = torch.empty(channels, 2 * length - 1, dtype=torch.float32, device=grad.device)
    launch_kernel(
        shared_lags_kernel,
        (rows + 1, channels),
        out,
        taps,
        length,
        (rows + 1) // 2,
        POSITIONS=positions,
        num_warps=1,
    )
    return taps


def backward(grad: Tensor, inputs: Inputs) -> Gradients:
    """Compute `backward_op`, bitwise reproducibly."""
    grad = sequence_last(grad)
    residual = inputs.res_taps is not None
    grad_p = empty_sequence_last(grad, inputs.p.shape[2])
    grad_u = empty_sequence_last(grad, grad.shape[2]) if residual else grad.new_empty(0)
    given_u = grad_u if residual else grad_p  # any tensor for a None
    launch = _launch(inputs, grad, grad_p, given_u)

    def run(config: Config, options: dict[str, Any]) -> Tensor:
        copies, width = _copies(inputs, launch.p.dtype, config.positions)
        batch_tiles = cdiv(launch.batch_size, config.batch)
        parts = batch_tiles * cdiv(launch.length, config.positions)
        shape = parts, 3 * launch.channels, 5
        sums = torch.empty(shape, dtype=torch.float32, device=grad.device)
        launch_kernel(
            toeplitz_backward_kernel,
            (batch_tiles, launch.channels),
            grad,
            launch.p,
            *launch.parameters,
            copies,
            launch.mask,
            grad_p,
            given_u,
            sums,
            launch.batch_size,
            launch.length // launch.unit,
            launch.channels,
            width,
            *in_units(launch.unit, grad, launch.p, grad_p, given_u),
            RESIDUAL=residual,
            **options,
        )
        return sums

    sums = launch.run("backward", run)
    grad_weight, grad_bias, grad_p_bias = add_sums(sums, inputs.p_bias is not None)
    grad_taps = _taps_grad(grad, launch, is_gated=True)
    grad_res_taps = grad_taps.new_empty(0)
    if residual:
        grad_res_taps = _taps_grad(grad, launch, is_gated=False)
    return Gradients(grad_p, grad_u, grad_weight, grad_bias, grad_p_bias, grad_taps, grad_res_taps)
