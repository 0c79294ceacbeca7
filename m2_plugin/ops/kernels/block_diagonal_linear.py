"""Triton kernels of the block-diagonal linear map: forward, and the gradients of x, weight, bias.

Dimension key: N rows, K blocks, I inputs per block, O outputs per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.backend import run_kernel
from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.launch import dot_precision, tile, torch_gradients
from m2_plugin.ops.reference.block_diagonal_linear import block_diagonal_linear_torch

OP = "block_diagonal_linear"


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one launch."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


# For the product (rows × output features) and for the weight's gradient (outputs × inputs), by
# bytes per element. The first is the default. None spills registers (`tests/ops/aot.py`).
PRODUCT_CONFIGS = {
    2: (
        Config(rows=128, cols=128, depth=64, num_warps=8, num_stages=3),
        Config(rows=128, cols=64, depth=64, num_warps=4, num_stages=4),
        Config(rows=256, cols=64, depth=64, num_warps=8, num_stages=3),
    ),
    4: (Config(rows=64, cols=64, depth=32, num_warps=4, num_stages=3),),
}
WEIGHT_GRAD_CONFIGS = {
    2: (
        Config(rows=128, cols=64, depth=64, num_warps=4, num_stages=3),
        Config(rows=64, cols=64, depth=64, num_warps=4, num_stages=4),
        Config(rows=64, cols=128, depth=64, num_warps=4, num_stages=3),
    ),
    4: (Config(rows=64, cols=64, depth=32, num_warps=8, num_stages=3),),
}
# Rows that one program of the weight's gradient sums. The number is fixed, so that results do not
# depend on how many multiprocessors there are.
ROWS_PER_SPLIT = 8192


@triton.jit
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    in_features,
    out_features,
    block_in,
    block_out,
    stride_x,
    stride_wk,
    stride_wo,
    stride_wi,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y[n, k·O + o] = Σ_i x[n, k·I + i] · w[k, o, i] + bias[k·O + o], fp32 accumulation."""
    k = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cols = k * block_out + outs
    row_mask = rows[:, None] < num_rows
    out_mask = (outs < block_out) & (cols < out_features)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, block_in, DEPTH):
        ins = start + tl.arange(0, DEPTH)
        features = k * block_in + ins
        in_mask = (ins < block_in) & (features < in_features)
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + features[None, :],
            mask=row_mask & in_mask[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + k * stride_wk + outs[None, :] * stride_wo + ins[:, None] * stride_wi,
            mask=in_mask[:, None] & out_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * out_features + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=row_mask & out_mask[None, :],
    )


@triton.jit
def weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    num_rows,
    rows_per_split,
    num_blocks,
    in_features,
    out_features,
    block_in,
    block_out,
    stride_grad,
    stride_x,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[s, k, o, i] = Σ_{n in split s} grad[n, k·O + o] · x[n, k·I + i], fp32."""
    k = tl.program_id(1)
    split = tl.program_id(2)
    tiles_in = tl.cdiv(block_in, COLS)
    outs = (tl.program_id(0) // tiles_in) * ROWS + tl.arange(0, ROWS)
    ins = (tl.program_id(0) % tiles_in) * COLS + tl.arange(0, COLS)
    grad_cols = k * block_out + outs
    x_cols = k * block_in + ins
    grad_mask = (outs < block_out) & (grad_cols < out_features)
    x_mask = (ins < block_in) & (x_cols < in_features)
    first = split.to(tl.int64) * rows_per_split
    end = tl.minimum(first + rows_per_split, num_rows)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        grad = tl.load(
            grad_ptr + rows[None, :] * stride_grad + grad_cols[:, None],
            mask=(rows < end)[None, :] & grad_mask[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + x_cols[None, :],
            mask=(rows < end)[:, None] & x_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(grad, x, acc, input_precision=PRECISION)
    where = (split * num_blocks + k).to(tl.int64) * block_out * block_in
    tl.store(
        out_ptr + where + outs[:, None] * block_in + ins[None, :],
        acc,
        mask=(outs < block_out)[:, None] & (ins < block_in)[None, :],
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Multiply rows (N, in_features) by blocks (K, O, I), which may be strided."""
    num_rows, in_features = x.shape
    num_blocks, block_out, block_in = weight.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(num_rows, out_features)

    def launch(config: Config) -> None:
        # Rows are the first dimension of the grid, because the others are limited to 65,535.
        rows, cols = tile(num_rows, config.rows), tile(block_out, config.cols)
        grid = (triton.cdiv(num_rows, rows), triton.cdiv(block_out, cols), num_blocks)
        product_kernel[grid](
            x,
            weight,
            x if bias is None else bias,
            y,
            num_rows,
            in_features,
            out_features,
            block_in,
            block_out,
            x.stride(0),
            *weight.stride(),
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype),
            ROWS=rows,
            COLS=cols,
            DEPTH=tile(block_in, config.depth),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    key = (tuning.row_class(num_rows), *weight.shape, x.dtype, weight.stride(2) == 1)
    launch(tuning.best("product", key, PRODUCT_CONFIGS[x.element_size()], launch, x.device))
    return y


def weight_grad(grad: Tensor, x: Tensor, block_shape: Sequence[int]) -> Tensor:
    """Sum the outer products of grad (N, out_features) and x (N, in_features) in each block.

    Returns:
        (K, O, I) in fp32, the same from run to run.
    """
    num_rows = x.shape[0]
    num_blocks, block_out, block_in = block_shape
    grad, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad, x))
    splits = triton.cdiv(num_rows, ROWS_PER_SPLIT)
    partial = x.new_empty((splits, *block_shape), dtype=torch.float32)

    def launch(config: Config) -> None:
        rows, cols = tile(block_out, config.rows), tile(block_in, config.cols)
        grid = (triton.cdiv(block_out, rows) * triton.cdiv(block_in, cols), num_blocks, splits)
        weight_grad_kernel[grid](
            grad,
            x,
            partial,
            num_rows,
            ROWS_PER_SPLIT,
            num_blocks,
            x.shape[1],
            grad.shape[1],
            block_in,
            block_out,
            grad.stride(0),
            x.stride(0),
            PRECISION=dot_precision(x.dtype),
            ROWS=rows,
            COLS=cols,
            DEPTH=tile(num_rows, config.depth),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    key = (tuning.row_class(num_rows), *block_shape, x.dtype)
    launch(tuning.best("weight_grad", key, WEIGHT_GRAD_CONFIGS[x.element_size()], launch, x.device))
    return partial[0] if splits == 1 else partial.sum(0)


# --- torch.library --------------------------------------------------------------------------------


@torch.library.custom_op("m2_plugin::block_diagonal_linear", mutates_args=())
def block_diagonal_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, strict: bool
) -> Tensor:
    """Map x (N, in_features); weight (K, O, I) and bias (out_features,) have its dtype."""
    args = x, weight, bias, out_features
    return run_kernel(OP, strict, product, block_diagonal_linear_torch, *args)


@block_diagonal_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("m2_plugin::block_diagonal_linear_backward", mutates_args=())
def backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; an empty tensor if one is not needed."""
    return run_kernel(OP, strict, _backward, _torch_backward, grad, x, weight, needs)


@backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(weight.shape if needs[1] else 0),
        x.new_empty(grad.shape[1] if needs[2] else 0),
    )


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    grad_x = grad_weight = grad_bias = none
    if needs[0]:
        grad_x = product(grad, weight.transpose(1, 2), None, x.shape[1])
    if needs[1]:
        grad_weight = weight_grad(grad, x, weight.shape).to(x.dtype)
    if needs[2]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(x.dtype)
    return grad_x, grad_weight, grad_bias


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal_linear_torch(x, weight, out_features=grad.shape[1])

    grad_x, grad_weight = torch_gradients(product, (x, weight), grad)
    grad_bias = grad.sum(0) if needs[2] else none
    return grad_x if needs[0] else none, grad_weight if needs[1] else none, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.strict = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = backward_op(grad, x, weight, needs, ctx.strict)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


block_diagonal_linear_op.register_autograd(_autograd, setup_context=_setup_context)
