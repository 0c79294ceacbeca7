"""Triton kernels of the Monarch MLP: one launch forward; the activation stays in registers.

Dimension key: N rows, D hidden, F intermediate, K blocks, Q = D/K and P = F/K block widths.

`ops/README.md` says which blocks meet. One program computes one output block of a tile of rows: it
holds its two input blocks, walks over P in chunks, and adds each chunk's contribution to the output
in registers.

The sides of Triton's tiles are powers of two, so a block width is cut into two of them, Q1 ≥ Q2
(192 = 128 + 64). Padding it to one would waste a quarter of the products at the published sizes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.backend import run_kernel
from m2_plugin.ops.kernels import tuning
from m2_plugin.ops.kernels.block_diagonal_linear import product, weight_grad
from m2_plugin.ops.kernels.launch import device_class, dot_precision, tile, torch_gradients
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


# By device class and bytes per element. Entries of one width are alternatives. The first is the
# default: the largest tiles that spill no registers and fit the shared memory, by ahead-of-time
# compilation (`tests/ops/aot.py`). Wider blocks than these go to the block-diagonal kernel, which
# is efficient for them.
FORWARD_CONFIGS = {
    ("large", 2): (
        Config(128, rows=128, chunk=64, num_warps=8, num_stages=3),
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=3),
        Config(128, rows=64, chunk=32, num_warps=4, num_stages=3),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(192, rows=128, chunk=16, num_warps=8, num_stages=3),
        Config(192, rows=64, chunk=16, num_warps=4, num_stages=3),
        Config(256, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(256, rows=128, chunk=16, num_warps=8, num_stages=2),
        Config(256, rows=64, chunk=16, num_warps=8, num_stages=2),
        Config(512, rows=64, chunk=16, num_warps=8, num_stages=2),
    ),
    ("small", 2): (
        Config(128, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(128, rows=32, chunk=32, num_warps=4, num_stages=2),
        Config(256, rows=64, chunk=16, num_warps=8, num_stages=2),
        Config(256, rows=32, chunk=32, num_warps=4, num_stages=2),
    ),
    ("large", 4): (Config(128, rows=32, chunk=16, num_warps=8, num_stages=1),),
    ("small", 4): (Config(128, rows=32, chunk=16, num_warps=8, num_stages=1),),
}
BACKWARD_CONFIGS = {
    ("large", 2): (
        Config(128, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(128, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(128, rows=64, chunk=32, num_warps=4, num_stages=2),
        Config(192, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(192, rows=128, chunk=32, num_warps=8, num_stages=2),
        Config(192, rows=64, chunk=16, num_warps=4, num_stages=2),
        Config(256, rows=64, chunk=32, num_warps=8, num_stages=2),
        Config(256, rows=64, chunk=32, num_warps=8, num_stages=1),
        Config(384, rows=64, chunk=16, num_warps=8, num_stages=2),
        Config(512, rows=32, chunk=16, num_warps=8, num_stages=2),
    ),
    ("small", 2): (
        Config(256, rows=32, chunk=32, num_warps=8, num_stages=1),
        Config(256, rows=32, chunk=16, num_warps=4, num_stages=1),
    ),
    ("large", 4): (Config(128, rows=16, chunk=16, num_warps=8, num_stages=1),),
    ("small", 4): (Config(128, rows=16, chunk=16, num_warps=8, num_stages=1),),
}


@torch.compiler.assume_constant_result
def max_block_width(device: torch.device, dtype: torch.dtype) -> int:
    """Return the widest block Q that the fused kernels take on a device in a dtype."""
    return FORWARD_CONFIGS[device_class(device), dtype.itemsize][-1].max_width


def choices(
    configs: dict[tuple[str, int], tuple[Config, ...]], x: Tensor, width: int
) -> list[Config]:
    """Return the configurations for a block width: those with the least `max_width` that fits."""
    table = configs[device_class(x.device), x.element_size()]
    least = min(config.max_width for config in table if width <= config.max_width)
    return [config for config in table if config.max_width == least]


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


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_grad(x):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _mix(x):
    """Hash 32 bits to 32 bits (constants: C. Wellons, lowbias32).

    Triton's own generator, ten rounds of Philox, would take longer than the matrix products.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep_scale(seed, rows, cols, p):
    """Return dropout's factor of each activation: 0 with probability p, else 1/(1 − p)."""
    by_row = _mix(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    bits = _mix(by_row[:, None] + cols.to(tl.uint32)[None, :] * 0x9E3779B9)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / (1 << 24))
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def _load_rows(ptr, rows, row_mask, stride, first, width, offset, SIZE: tl.constexpr):
    """Load columns offset … offset + SIZE of the block that begins at column `first`."""
    cols = offset + tl.arange(0, SIZE)
    return tl.load(
        ptr + rows[:, None] * stride + first + cols[None, :],
        mask=row_mask & (cols < width)[None, :],
        other=0.0,
    )


@triton.jit
def _load_up(ptr, first_row, chunk, chunk_mask, width, offset, SIZE: tl.constexpr):
    """Load rows of an up-projection half-block, transposed: (SIZE, chunk)."""
    cols = offset + tl.arange(0, SIZE)
    return tl.load(
        ptr + (first_row + chunk)[None, :] * width + cols[:, None],
        mask=(cols < width)[:, None] & chunk_mask[None, :],
        other=0.0,
    )


@triton.jit
def _up_product(
    x1, x2, ptr, first_row, chunk, chunk_mask, width,
    PRECISION: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    h = tl.dot(
        x1,
        _load_up(ptr, first_row, chunk, chunk_mask, width, 0, Q1),
        input_precision=PRECISION,
    )
    if Q2 > 0:
        w2 = _load_up(ptr, first_row, chunk, chunk_mask, width, Q1, Q2)
        h = tl.dot(x2, w2, h, input_precision=PRECISION)
    return h


@triton.jit
def mlp_forward_kernel(
    x_ptr,
    up_ptr,
    down_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    num_rows,
    num_blocks,
    width,  # Q
    size,  # P
    stride_x,
    dropout_p,
    GLU: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
):
    """Compute output block j of one tile of rows."""
    # Programs for one tile of rows are neighbours, so that they share its x in the L2 cache.
    j = tl.program_id(0) % num_blocks
    rows = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows[:, None] < num_rows
    dtype = x_ptr.dtype.element_ty
    gate_first = j * size  # rows of the up-projection
    up_first = (num_blocks + j) * size
    gate_in = j * width
    if GLU:
        gate_in = (j // 2) * width
    up_in = ((num_blocks + j) // 2) * width

    xg1 = _load_rows(x_ptr, rows, row_mask, stride_x, gate_in, width, 0, Q1)
    xg2 = xg1
    xu1 = xg1
    xu2 = xg1
    if Q2 > 0:
        xg2 = _load_rows(x_ptr, rows, row_mask, stride_x, gate_in, width, Q1, Q2)
    if GLU:
        xu1 = _load_rows(x_ptr, rows, row_mask, stride_x, up_in, width, 0, Q1)
        if Q2 > 0:
            xu2 = _load_rows(x_ptr, rows, row_mask, stride_x, up_in, width, Q1, Q2)
    acc1 = tl.zeros((ROWS, Q1), tl.float32)
    acc2 = tl.zeros((ROWS, Q2 if Q2 > 0 else 16), tl.float32)
    out1 = tl.arange(0, Q1)
    out2 = Q1 + tl.arange(0, Q2 if Q2 > 0 else 16)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for start in range(0, size, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        chunk_mask = chunk < size
        h = _gelu(
            _up_product(xg1, xg2, up_ptr, gate_first, chunk, chunk_mask, width, PRECISION, Q1, Q2)
        )
        if GLU:
            h *= _up_product(
                xu1, xu2, up_ptr, up_first, chunk, chunk_mask, width, PRECISION, Q1, Q2
            )
        if DROPOUT:
            h *= _keep_scale(seed, rows, j * size + chunk, dropout_p)
        h = h.to(dtype)
        down = down_ptr + j * width * size + chunk[:, None]
        w1 = tl.load(
            down + out1[None, :] * size,
            mask=chunk_mask[:, None] & (out1 < width)[None, :],
            other=0.0,
        )
        acc1 = tl.dot(h, w1, acc1, input_precision=PRECISION)
        if Q2 > 0:
            w2 = tl.load(
                down + out2[None, :] * size,
                mask=chunk_mask[:, None] & (out2 < width)[None, :],
                other=0.0,
            )
            acc2 = tl.dot(h, w2, acc2, input_precision=PRECISION)

    y = y_ptr + rows[:, None] * (num_blocks * width) + j * width
    if HAS_BIAS:
        bias = bias_ptr + j * width
        acc1 += tl.load(bias + out1, mask=out1 < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + out1[None, :], acc1.to(dtype), mask=row_mask & (out1 < width)[None, :])
    if Q2 > 0:
        if HAS_BIAS:
            acc2 += tl.load(bias + out2, mask=out2 < width, other=0.0).to(tl.float32)[None, :]
        tl.store(y + out2[None, :], acc2.to(dtype), mask=row_mask & (out2 < width)[None, :])


@triton.jit
def activation_grad_kernel(
    grad_ptr,
    x_ptr,
    up_ptr,
    down_ptr,
    act_ptr,
    grad_up_ptr,
    seed_ptr,
    first_row,
    num_rows,
    num_blocks,
    width,
    size,
    stride_grad,
    stride_x,
    dropout_p,
    GLU: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
):
    """Write the activation (N, F), computed again, and the gradient of the up-projection's output.

    `first_row` is the number of the pointers' first row in the whole batch, which dropout needs.
    """
    j = tl.program_id(0) % num_blocks
    rows = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows[:, None] < num_rows
    dtype = x_ptr.dtype.element_ty
    gate_first = j * size
    up_first = (num_blocks + j) * size
    gate_in = j * width
    if GLU:
        gate_in = (j // 2) * width
    up_in = ((num_blocks + j) // 2) * width
    intermediate = num_blocks * size

    xg1 = _load_rows(x_ptr, rows, row_mask, stride_x, gate_in, width, 0, Q1)
    xg2 = xg1
    xu1 = xg1
    xu2 = xg1
    g1 = _load_rows(grad_ptr, rows, row_mask, stride_grad, j * width, width, 0, Q1)
    g2 = g1
    if Q2 > 0:
        xg2 = _load_rows(x_ptr, rows, row_mask, stride_x, gate_in, width, Q1, Q2)
        g2 = _load_rows(grad_ptr, rows, row_mask, stride_grad, j * width, width, Q1, Q2)
    if GLU:
        xu1 = _load_rows(x_ptr, rows, row_mask, stride_x, up_in, width, 0, Q1)
        if Q2 > 0:
            xu2 = _load_rows(x_ptr, rows, row_mask, stride_x, up_in, width, Q1, Q2)
    in1 = tl.arange(0, Q1)
    in2 = Q1 + tl.arange(0, Q2 if Q2 > 0 else 16)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for start in range(0, size, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        chunk_mask = chunk < size
        mask = row_mask & chunk_mask[None, :]
        down = down_ptr + j * width * size + chunk[None, :]
        w1 = tl.load(
            down + in1[:, None] * size, mask=chunk_mask[None, :] & (in1 < width)[:, None], other=0.0
        )
        grad_act = tl.dot(g1, w1, input_precision=PRECISION)
        if Q2 > 0:
            w2 = tl.load(
                down + in2[:, None] * size,
                mask=chunk_mask[None, :] & (in2 < width)[:, None],
                other=0.0,
            )
            grad_act = tl.dot(g2, w2, grad_act, input_precision=PRECISION)
        gate = _up_product(
            xg1, xg2, up_ptr, gate_first, chunk, chunk_mask, width, PRECISION, Q1, Q2
        )
        act = _gelu(gate)
        if DROPOUT:
            keep = _keep_scale(seed, first_row + rows, j * size + chunk, dropout_p)
            grad_act *= keep
        cols = j * size + chunk
        if GLU:
            up = _up_product(
                xu1, xu2, up_ptr, up_first, chunk, chunk_mask, width, PRECISION, Q1, Q2
            )
            out = grad_up_ptr + rows[:, None] * (2 * intermediate) + cols[None, :]
            tl.store(out + intermediate, (grad_act * act).to(dtype), mask=mask)
            grad_act *= up
            act *= up
        else:
            out = grad_up_ptr + rows[:, None] * intermediate + cols[None, :]
        tl.store(out, (grad_act * _gelu_grad(gate)).to(dtype), mask=mask)
        if DROPOUT:
            act *= keep
        tl.store(act_ptr + rows[:, None] * intermediate + cols[None, :], act.to(dtype), mask=mask)


def _grid(config: Config, x: Tensor, down: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0], tile(x.shape[0], config.rows)) * down.shape[0],)


def _constants(config: Config, x: Tensor, down: Tensor, glu: bool, p: float) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels have."""
    _, width, size = down.shape
    q1, q2 = split_width(width)
    return {
        "GLU": glu,
        "DROPOUT": p > 0,
        "PRECISION": dot_precision(x.dtype),
        "ROWS": tile(x.shape[0], config.rows),
        "CHUNK": tile(size, config.chunk),
        "Q1": q1,
        "Q2": q2,
        "num_warps": config.num_warps,
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
    num_rows = x.shape[0]
    num_blocks, width, size = down.shape
    up, down = up.contiguous(), down.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)

    def launch(config: Config) -> None:
        mlp_forward_kernel[_grid(config, x, down)](
            x,
            up,
            down,
            x if bias is None else bias,
            y,
            x if seed is None else seed,
            num_rows,
            num_blocks,
            width,
            size,
            x.stride(0),
            p,
            HAS_BIAS=bias is not None,
            **_constants(config, x, down, glu, p),
        )

    key = shape_class(x, down, glu, p)
    launch(tuning.best(OP, key, choices(FORWARD_CONFIGS, x, width), launch, x.device))
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
) -> tuple[Tensor, Tensor]:
    """Return the activation (N, F) and the gradient of the up-projection's output (N, 2F)."""
    num_rows = x.shape[0]
    num_blocks, width, size = down.shape
    act = x.new_empty(num_rows, num_blocks * size)
    grad_up = x.new_empty(num_rows, num_blocks * size * (2 if glu else 1))

    def launch(config: Config) -> None:
        activation_grad_kernel[_grid(config, x, down)](
            grad,
            x,
            up,
            down,
            act,
            grad_up,
            x if seed is None else seed,
            first_row,
            num_rows,
            num_blocks,
            width,
            size,
            grad.stride(0),
            x.stride(0),
            p,
            **_constants(config, x, down, glu, p),
        )

    key = shape_class(x, down, glu, p)
    op = "monarch_mlp_backward"
    launch(tuning.best(op, key, choices(BACKWARD_CONFIGS, x, width), launch, x.device))
    return act, grad_up


def _backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, glu: bool, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    up, down, grad = up.contiguous(), down.contiguous(), grad.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weights = None
    for first in range(0, x.shape[0], BACKWARD_ROWS):
        part = slice(first, first + BACKWARD_ROWS)
        act, grad_up = _activation_grad(grad[part], x[part], up, down, glu, p, seed, first)
        grad_x[part] = product(grad_up, up.transpose(1, 2), None, x.shape[1])
        new = weight_grad(grad_up, x[part], up.shape), weight_grad(grad[part], act, down.shape)
        if grad_weights is None:
            grad_weights = new
        else:
            grad_weights = grad_weights[0].add_(new[0]), grad_weights[1].add_(new[1])
    assert grad_weights is not None
    grad_up_weight, grad_down_weight = (g.to(x.dtype) for g in grad_weights)
    return grad_x, grad_up_weight, grad_down_weight, grad.sum(0, dtype=torch.float32).to(x.dtype)


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
    size = down.shape[0] * down.shape[2]
    if p > 0:  # the backward pass could not repeat the mask: PyTorch draws others than the kernel
        raise RuntimeError(
            f"The Triton kernel of {OP} failed, and PyTorch cannot draw the kernel's dropout mask. "
            "Start the run again with `backend: torch`."
        )
    return monarch_mlp_torch(x, up, down, bias, size, glu)


def _torch_backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, glu: bool, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return _torch_forward(x, up, down, None, glu, p, seed)

    grad_x, grad_up, grad_down = torch_gradients(mlp, (x, up, down), grad)
    return grad_x, grad_up, grad_down, grad.sum(0)


@torch.library.custom_op("m2_plugin::monarch_mlp", mutates_args=())
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


@torch.library.custom_op("m2_plugin::monarch_mlp_backward", mutates_args=())
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
