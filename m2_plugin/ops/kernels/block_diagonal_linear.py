"""Triton kernels of the block-diagonal linear map: forward, and the gradients of x, weight, bias.

Dimension key: N rows, K blocks, I inputs per block, O outputs per block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.check import Case, draws, register
from m2_plugin.ops.kernels.launch import (
    cdiv,
    dot_precision,
    fitting_warps,
    launch_kernel,
    rows_contiguous,
    tile,
    torch_gradients,
)
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import run_kernel
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


# Sizes and the strides of weights are compile-time constants: no mask is left where tiles divide
# the blocks, and the addresses of a tile are one base and constants.
@triton.jit
def load_tile(
    ptr, row, row_stride, row_end, col, col_stride, col_end,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):  # fmt: skip
    """Load the tile of rows `row` and columns `col`; what lies at or beyond the ends, as zeros."""
    ptrs = ptr + row[:, None] * row_stride + col[None, :] * col_stride
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=(row < row_end)[:, None] & (col < col_end)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=(row < row_end)[:, None], other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=(col < col_end)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    stride_x,
    K: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    STRIDE_K: tl.constexpr,
    STRIDE_O: tl.constexpr,
    STRIDE_I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y[n, k·O + o] = Σ_i x[n, k·I + i] · w[k, o, i] + bias[k·O + o], fp32 accumulation."""
    k = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    outs = tl.arange(0, COLS)
    # How many of the tile's columns, and of the block's inputs, there are.
    num_outs = tl.minimum(O, OUT_FEATURES - k * O) - first
    num_ins = tl.minimum(I, IN_FEATURES - k * I)
    MASK_OUTS: tl.constexpr = O % COLS != 0 or OUT_FEATURES != K * O
    MASK_INS: tl.constexpr = I % DEPTH != 0 or IN_FEATURES != K * I
    x_ptr += k * I
    w_ptr += k * STRIDE_K + first * STRIDE_O
    ins = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, I, DEPTH):
        end = num_ins - start
        x = load_tile(x_ptr + start, rows, stride_x, num_rows, ins, 1, end, True, MASK_INS)
        w = load_tile(
            w_ptr + start * STRIDE_I,
            *(ins, STRIDE_I, end),
            *(outs, STRIDE_O, num_outs),
            *(MASK_INS, MASK_OUTS),
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    cols = k * O + first + outs
    out_mask = outs < num_outs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * OUT_FEATURES + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & out_mask[None, :],
    )


@triton.jit
def weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    num_rows,
    stride_grad,
    stride_x,
    ROWS_PER_SPLIT: tl.constexpr,
    K: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[s, k, o, i] = Σ_{n in split s} grad[n, k·O + o] · x[n, k·I + i], fp32."""
    k = tl.program_id(1)
    split = tl.program_id(2)
    TILES: tl.constexpr = (I + COLS - 1) // COLS
    first_out = tl.program_id(0) // TILES * ROWS
    first_in = tl.program_id(0) % TILES * COLS
    outs, ins = tl.arange(0, ROWS), tl.arange(0, COLS)
    num_outs = tl.minimum(O, OUT_FEATURES - k * O) - first_out
    num_ins = tl.minimum(I, IN_FEATURES - k * I) - first_in
    MASK_OUTS: tl.constexpr = O % ROWS != 0 or OUT_FEATURES != K * O
    MASK_INS: tl.constexpr = I % COLS != 0 or IN_FEATURES != K * I
    first = split.to(tl.int64) * ROWS_PER_SPLIT
    num = tl.minimum(ROWS_PER_SPLIT, num_rows - first).to(tl.int32)
    grad_ptr += first * stride_grad + k * O + first_out
    x_ptr += first * stride_x + k * I + first_in
    rows = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num, DEPTH):
        end = num - start
        grad = load_tile(
            grad_ptr, *(outs, 1, num_outs), *(rows, stride_grad, end), *(MASK_OUTS, True)
        )
        x = load_tile(x_ptr, *(rows, stride_x, end), *(ins, 1, num_ins), *(True, MASK_INS))
        acc = tl.dot(grad, x, acc, input_precision=PRECISION)
        grad_ptr += DEPTH * stride_grad
        x_ptr += DEPTH * stride_x
    out_ptr += (split * K + k).to(tl.int64) * (O * I)
    outs += first_out
    ins += first_in
    tl.store(
        out_ptr + outs[:, None] * I + ins[None, :],
        acc,
        mask=(outs < O)[:, None] & (ins < I)[None, :],
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
        grid = (cdiv(num_rows, rows), cdiv(block_out, cols), num_blocks)
        launch_kernel(
            product_kernel,
            grid,
            x,
            weight,
            x if bias is None else bias,
            y,
            num_rows,
            x.stride(0),
            num_blocks,
            in_features,
            out_features,
            block_in,
            block_out,
            *weight.stride(),
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype),
            ROWS=rows,
            COLS=cols,
            DEPTH=tile(block_in, config.depth),
            num_warps=fitting_warps(config.num_warps, rows, cols),
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
    grad, x = rows_contiguous(grad), rows_contiguous(x)
    splits = cdiv(num_rows, ROWS_PER_SPLIT)
    partial = x.new_empty((splits, *block_shape), dtype=torch.float32)

    def launch(config: Config) -> None:
        rows, cols = tile(block_out, config.rows), tile(block_in, config.cols)
        grid = (cdiv(block_out, rows) * cdiv(block_in, cols), num_blocks, splits)
        launch_kernel(
            weight_grad_kernel,
            grid,
            grad,
            x,
            partial,
            num_rows,
            grad.stride(0),
            x.stride(0),
            ROWS_PER_SPLIT,
            num_blocks,
            x.shape[1],
            grad.shape[1],
            block_in,
            block_out,
            PRECISION=dot_precision(x.dtype),
            ROWS=rows,
            COLS=cols,
            DEPTH=tile(num_rows, config.depth),
            num_warps=fitting_warps(config.num_warps, rows, cols),
            num_stages=config.num_stages,
        )

    key = (tuning.row_class(num_rows), *block_shape, x.dtype)
    launch(tuning.best("weight_grad", key, WEIGHT_GRAD_CONFIGS[x.element_size()], launch, x.device))
    return partial[0] if splits == 1 else partial.sum(0)


# PyTorch's batched products read and write strided blocks without copies, if the features fill
# whole blocks. In bfloat16 on an H200 (32,768 rows, base size) they take 134 µs for the gradient of
# the Monarch MLP's input where `product` takes 241, and 94 and 169 for the gradients of its weights
# where `weight_grad` takes 114 and 189.


def batched_product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Multiply rows (N, K·I), with consecutive columns, by blocks (K, O, I) into `out` (N, K·O)."""
    num_blocks = weight.shape[0]
    blocks = x.view(len(x), num_blocks, -1).transpose(0, 1)
    into = out.view(len(x), num_blocks, -1).transpose(0, 1)
    torch.bmm(blocks, weight.transpose(1, 2), out=into)
    return out


def batched_weight_grad(grad: Tensor, x: Tensor, num_blocks: int, scale: float = 1.0) -> Tensor:
    """Sum the outer products of grad (N, K·O) and x (N, K·I) in each block.

    Returns:
        (K, O, I) in the dtype of `x`, times `scale`.
    """
    outs = grad.view(len(grad), num_blocks, -1).permute(1, 2, 0)
    ins = x.view(len(x), num_blocks, -1).transpose(0, 1)
    if scale == 1.0:
        return torch.bmm(outs, ins)
    return torch.baddbmm(x.new_empty(1, 1, 1), outs, ins, beta=0, alpha=scale)


# --- torch.library --------------------------------------------------------------------------------


@kernel_op("m2_plugin::block_diagonal_linear")
def block_diagonal_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, strict: bool
) -> Tensor:
    """Map x (N, in_features); weight (K, O, I) and bias (out_features,) have its dtype."""
    args = x, weight, bias, out_features
    return run_kernel(OP, strict, product, block_diagonal_linear_torch, *args)


@block_diagonal_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@kernel_op("m2_plugin::block_diagonal_linear_backward")
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
    num_blocks, block_out, block_in = weight.shape
    whole = grad.shape[1] == num_blocks * block_out and x.shape[1] == num_blocks * block_in
    if whole:
        grad, x = rows_contiguous(grad), rows_contiguous(x)
    if needs[0]:
        back = weight.transpose(1, 2)
        if whole:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            grad_x = batched_product(grad, back, out)
        else:
            grad_x = product(grad, back, None, x.shape[1])
    if needs[1] and whole:
        grad_weight = batched_weight_grad(grad, x, num_blocks)
    elif needs[1]:
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


@register(OP)
def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Compare the blocks of the base size, and odd ones that are cut off."""
    normal = draws(dtype)
    for rows, (blocks, outputs, inputs), cut in ((200, (2, 384, 192), 0), (70, (3, 35, 21), 2)):
        x, weight = normal(rows, blocks * inputs - cut), normal(blocks, outputs, inputs, scale=0.1)
        bias, grad = normal(blocks * outputs - cut), normal(rows, blocks * outputs - cut)
        args = x, weight, bias, grad.shape[1]
        yield Case(f"forward of {blocks} blocks", product, block_diagonal_linear_torch, args)
        backward = grad, x, weight, [True, True, True]
        yield Case(f"backward of {blocks} blocks", _backward, _torch_backward, backward)
