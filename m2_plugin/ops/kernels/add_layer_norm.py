"""Triton kernels of a sum and its LayerNorm: forward, and the gradients.

Dimension key: N rows (tokens), R rows of the residual (N, or L that repeat), D channels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.check import Case, draws, register
from m2_plugin.ops.kernels.launch import (
    cdiv,
    launch_kernel,
    next_power_of_2,
    rows_contiguous,
)
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import run_kernel
from m2_plugin.ops.reference.add_layer_norm import add_layer_norm_torch

OP = "add_layer_norm"

# Elements that one thread holds of each tensor, and warps: the fastest on an H200. If positions are
# to be contiguous, a program needs more rows.
ROWS_FORWARD, SEQUENCE_LAST_FORWARD, BACKWARD = (32, 4), (64, 8), (32, 4)
# 32 rows of 2 bytes are the 64 bytes that memory transfers at once if rows are contiguous.
MOST_ROWS = 32


@triton.jit
def load_sum(
    x_ptr, residual_ptr, rows, residual_period, cols, stride_x, stride_r, mask,
    HAS_RESIDUAL: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Load a tile of x + residual in fp32; 0 where `mask` is false."""
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_x + cols[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_rows = rows % residual_period if REPEATS else rows
        at = residual_ptr + residual_rows.to(tl.int64)[:, None] * stride_r + cols[None, :]
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    residual_period,
    channels,
    stride_x,
    stride_r,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    REPEATS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SEQUENCE_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Compute ROWS rows of y (N, D), whose memory order is (D, N) if SEQUENCE_LAST."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # fewer than 2³¹, as in the grid
    cols = tl.arange(0, COLS)
    inside = cols < channels
    mask = (rows < num_rows)[:, None] & inside[None, :]
    x = load_sum(
        x_ptr, residual_ptr, rows, residual_period, cols, stride_x, stride_r, mask,
        HAS_RESIDUAL, REPEATS,
    )  # fmt: skip
    mean = tl.sum(x, 1) / channels
    x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / channels + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    y = x * rstd[:, None]
    y *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SEQUENCE_LAST:
        at = y_ptr + cols.to(tl.int64)[None, :] * num_rows + rows[:, None]
    else:
        at = y_ptr + rows.to(tl.int64)[:, None] * channels + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_layer_norm_grad_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    sums_ptr,
    num_rows,
    residual_period,
    channels,
    stride_g,
    stride_x,
    stride_r,
    HAS_RESIDUAL: tl.constexpr,
    REPEATS: tl.constexpr,
    SUMS: tl.constexpr,
    SEQUENCE_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Compute rows of the gradient of x + residual, (N, D), and their sums for weight and bias.

    With h the normed input and g = grad · weight, it is (g − mean(g) − h · mean(g · h)) · rstd.
    sums (programs, 2, D) gets Σ grad · h and Σ grad. `stride_g` is from row to row, or from
    channel to channel if SEQUENCE_LAST.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = cols < channels
    mask = (rows < num_rows)[:, None] & inside[None, :]
    if SEQUENCE_LAST:
        at = grad_ptr + cols.to(tl.int64)[None, :] * stride_g + rows[:, None]
    else:
        at = grad_ptr + rows.to(tl.int64)[:, None] * stride_g + cols[None, :]
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x = load_sum(
        x_ptr, residual_ptr, rows, residual_period, cols, stride_x, stride_r, mask,
        HAS_RESIDUAL, REPEATS,
    )  # fmt: skip
    mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
    h = (x - mean) * rstd  # arbitrary where `mask` is false; there g is 0
    if SUMS:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + cols
        tl.store(sums, tl.sum(g * h, 0), mask=inside)
        tl.store(sums + channels, tl.sum(g, 0), mask=inside)
    g *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean_g = tl.sum(g, 1)[:, None] / channels
    mean_gh = tl.sum(g * h, 1)[:, None] / channels
    g = (g - mean_g - h * mean_gh) * rstd
    at = grad_x_ptr + rows.to(tl.int64)[:, None] * channels + cols[None, :]
    tl.store(at, g.to(grad_x_ptr.dtype.element_ty), mask=mask)


def tile_cols(channels: int) -> int:
    """Return the width of a tile that holds all channels."""
    return max(16, next_power_of_2(channels))


def tile_rows(channels: int, elements: int, warps: int) -> int:
    """Return how many rows of all channels the threads can hold, a power of two."""
    return min(max(1, elements * 32 * warps // tile_cols(channels)), MOST_ROWS)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    sequence_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, channels = x.shape
    x, residual = rows_contiguous(x), None if residual is None else rows_contiguous(residual)
    y = _empty(x, dtype, sequence_last)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    elements, warps = SEQUENCE_LAST_FORWARD if sequence_last else ROWS_FORWARD
    rows = tile_rows(channels, elements, warps)
    launch_kernel(
        add_layer_norm_kernel,
        (cdiv(num_rows, rows),),
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        y,
        mean,
        rstd,
        num_rows,
        num_rows if residual is None else residual.shape[0],
        channels,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        REPEATS=residual is not None and residual.shape[0] < num_rows,
        HAS_BIAS=bias is not None,
        SEQUENCE_LAST=sequence_last,
        ROWS=rows,
        COLS=tile_cols(channels),
        num_warps=warps,
    )
    return y, mean, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, channels = x.shape
    x, residual = rows_contiguous(x), None if residual is None else rows_contiguous(residual)
    sequence_last = grad.stride(1) != 1 and grad.stride(0) == 1
    if not sequence_last:
        grad = rows_contiguous(grad)
    grad_x = _empty(x, _sum_dtype(x, residual), sequence_last=False)
    elements, warps = BACKWARD
    if channels > 1024:  # registers would spill on an A100 (`tests/ops/aot.py`)
        warps *= 2
    rows = tile_rows(channels, elements, warps)
    programs = cdiv(num_rows, rows)
    partial = x.new_empty(programs if sums else 0, 2, channels, dtype=torch.float32)
    launch_kernel(
        add_layer_norm_grad_kernel,
        (programs,),
        grad,
        x,
        x if residual is None else residual,
        weight,
        mean,
        rstd,
        grad_x,
        partial,
        num_rows,
        num_rows if residual is None else residual.shape[0],
        channels,
        grad.stride(1) if sequence_last else grad.stride(0),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        REPEATS=residual is not None and residual.shape[0] < num_rows,
        SUMS=sums,
        SEQUENCE_LAST=sequence_last,
        ROWS=rows,
        COLS=tile_cols(channels),
        num_warps=warps,
    )
    return grad_x, partial.sum(0)


# --- torch.library --------------------------------------------------------------------------------


def _empty(x: Tensor, dtype: torch.dtype, sequence_last: bool) -> Tensor:
    """Return a new (N, D), rows or channels contiguous."""
    num_rows, channels = x.shape
    strides = (1, num_rows) if sequence_last else (channels, 1)
    return torch.empty_strided((num_rows, channels), strides, dtype=dtype, device=x.device)


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _total(x: Tensor, residual: Tensor | None) -> Tensor:
    """Return x + residual in fp32 or fp64."""
    if residual is None:
        return _wide(x)
    return _wide(x) + _wide(residual).repeat(len(x) // len(residual), 1)


def _torch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    sequence_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = _total(x, residual)
    bias = None if bias is None else _wide(bias)
    y = _empty(x, dtype, sequence_last)
    y.copy_(add_layer_norm_torch(total, None, _wide(weight), bias, eps))
    variance, mean = torch.var_mean(total, 1, correction=0)
    return y, mean, torch.rsqrt(variance + eps)


def _torch_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    total = _total(x, residual)
    normed = (total - mean[:, None]) * rstd[:, None]
    grad = _wide(grad)
    g = grad * _wide(weight)
    grad_x = g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True)
    grad_x = (grad_x * rstd[:, None]).to(_sum_dtype(x, residual))
    if not sums:
        return grad_x, grad.new_zeros(2, x.shape[1])
    return grad_x, torch.stack([(grad * normed).sum(0), grad.sum(0)])


@kernel_op("m2_plugin::add_layer_norm")
def add_layer_norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    sequence_last: bool,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (N, D), residual (R, D) with R a divisor of N, to y (N, D), and (N,) mean and 1/σ."""
    args = (x, residual, weight, bias, eps, dtype, sequence_last)
    return run_kernel(OP, strict, _forward, _torch_forward, *args)


@add_layer_norm_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    sequence_last: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    return _empty(x, dtype, sequence_last), mean, rstd


@kernel_op("m2_plugin::add_layer_norm_backward")
def backward_op(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: bool,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x + residual, (N, D), and of weight and bias, (2, D) in fp32."""
    args = (grad, x, residual, weight, mean, rstd, sums)
    return run_kernel(OP, strict, _backward, _torch_backward, *args)


@backward_op.register_fake
def _(grad: Tensor, x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    grad_x = _empty(x, _sum_dtype(x, residual), sequence_last=False)
    return grad_x, x.new_empty(2, x.shape[1], dtype=torch.float32)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, weight, bias, *_, ctx.strict = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # nobody reads the statistics: make no zeros for them
    ctx.save_for_backward(x, residual, weight, *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, residual, weight, mean, rstd = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 8
    if grad is None:
        return tuple(grads)
    needs = ctx.needs_input_grad
    grad_x, sums = backward_op(
        grad, x, residual, weight, mean, rstd, needs[2] or needs[3], ctx.strict
    )
    if needs[0]:
        grads[0] = grad_x.to(x.dtype)
    if needs[1]:
        rows = (
            grad_x if len(residual) == len(x) else grad_x.unflatten(0, (-1, len(residual))).sum(0)
        )
        grads[1] = rows.to(residual.dtype)
    if needs[2]:
        grads[2] = sums[0].to(weight.dtype)
    if needs[3]:
        grads[3] = sums[1].to(ctx.bias_dtype)
    return tuple(grads)


add_layer_norm_op.register_autograd(_autograd, setup_context=_setup_context)


def _compared(
    run: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    last: bool,
) -> Any:
    """Run a forward pass with a result in x's dtype if positions come last, else in fp32 or more.

    This is what they are under autocast.
    """
    dtype = x.dtype if last else torch.promote_types(x.dtype, torch.float32)
    return run(x, residual, weight, bias, 1e-5, dtype, last)


@register(OP)
def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Compare each kind of residual and each order in memory, at the base width and an odd one."""
    normal = draws(dtype)
    for channels, rows, residual_rows, last in (
        (768, 80, 80, True),
        (768, 70, 35, False),
        (45, 70, 0, True),
        (45, 80, 80, False),
    ):
        x = normal(rows, channels)
        residual = normal(residual_rows, channels) if residual_rows else None
        weight = normal(channels, dtype=torch.float32)
        bias = normal(channels, dtype=torch.float32) if residual_rows else None
        name = f"of {channels} channels, {residual_rows} rows to add"
        args = x, residual, weight, bias, last
        forward, plain = partial(_compared, _forward), partial(_compared, _torch_forward)
        yield Case(f"forward {name}", forward, plain, args)
        _, mean, rstd = plain(*args)
        grad = _empty(x, dtype, last).copy_(normal(rows, channels))
        backward = grad, x, residual, weight, mean, rstd, bias is not None
        yield Case(f"backward {name}", _backward, _torch_backward, backward)
