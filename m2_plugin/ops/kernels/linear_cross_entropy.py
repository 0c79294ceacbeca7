"""Cross-entropy of a linear map's outputs: the logits become their gradients in place.

Dimension key: M rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2_plugin.ops.kernels.check import Case, draws, register
from m2_plugin.ops.kernels.launch import (
    launch_kernel,
    next_power_of_2,
    torch_gradients,
)
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import run_kernel
from m2_plugin.ops.reference.linear_cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy_torch,
)

OP = "linear_cross_entropy"

# Logits are held for so many bytes at a time. Each further chunk reads and writes the gradient of
# the weight once more, and smaller products are slower.
CHUNK_BYTES = 1 << 28
COLUMNS = 8192  # of a row, at a time


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    size,  # V
    IGNORE: tl.constexpr,
    GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the loss of one row of logits, and their gradient over them."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counts = label != IGNORE
    start = logits_ptr + row * size
    cols = tl.arange(0, COLUMNS)
    peak = float("-inf")
    total = 0.0  # of exp(z − peak)
    for first in range(0, size, COLUMNS):
        at = first + cols
        z = tl.load(start + at, mask=at < size, other=float("-inf")).to(tl.float32)
        new = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - new) + tl.sum(tl.exp(z - new), 0)
        peak = new
    norm = peak + tl.log(total)
    known = (label >= 0) & (label < size)
    chosen = tl.load(start + tl.where(known, label, 0)).to(tl.float32)
    chosen = tl.where(known, chosen, float("nan"))  # the loss says that a label is wrong
    tl.store(loss_ptr + row, tl.where(counts, norm - chosen, 0.0))
    if GRAD:
        tl.debug_barrier()  # the chosen logit is read before it is overwritten
        for first in range(0, size, COLUMNS):
            at = first + cols
            z = tl.load(start + at, mask=at < size, other=0.0).to(tl.float32)
            grad = tl.exp(z - norm) - tl.where(at == label, 1.0, 0.0)
            grad = tl.where(counts, grad, 0.0)
            tl.store(start + at, grad.to(logits_ptr.dtype.element_ty), mask=at < size)


def _losses(logits: Tensor, labels: Tensor, needs_grad: bool) -> Tensor:
    """Return the loss of each row (M,) in fp32; overwrite the logits (M, V) with its gradient."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    launch_kernel(
        cross_entropy_kernel,
        (logits.shape[0],),
        logits,
        labels,
        losses,
        logits.shape[1],
        IGNORE=IGNORE_INDEX,
        GRAD=needs_grad,
        COLUMNS=min(COLUMNS, next_power_of_2(logits.shape[1])),
        num_warps=8,
    )
    return losses


def chunks(rows: int, vocabulary: int, element_size: int) -> int:
    """Return the rows of a chunk: equal parts, a multiple of 128, within `CHUNK_BYTES`."""
    most = max(CHUNK_BYTES // (vocabulary * element_size), 128)
    parts = -(-rows // most)
    return -(-rows // (parts * 128)) * 128


Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs_grad: bool
) -> Results:
    w = weight.to(x.dtype)
    b = None if bias is None else bias.to(x.dtype)
    labels = labels.contiguous()
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x, grad_weight, grad_bias = _empty(x, weight, bias, needs_grad)
    if needs_grad:
        # In fp32 they neither overflow nor lose what a chunk adds.
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
        grad_b = torch.zeros(w.shape[0], dtype=torch.float32, device=x.device)
    step = chunks(x.shape[0], w.shape[0], x.element_size())
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        logits = x[part] @ w.t() if b is None else torch.addmm(b, x[part], w.t())
        total += _losses(logits, labels[part], needs_grad).sum()
        if needs_grad:
            torch.mm(logits, w, out=grad_x[part])
            grad_w += logits.t() @ x[part]
            if bias is not None:
                grad_b += logits.sum(0, dtype=torch.float32)
        del logits  # before the next chunk's are made
    if needs_grad:
        grad_weight = grad_w.to(weight.dtype)
        grad_bias = grad_bias if bias is None else grad_b.to(bias.dtype)
    return total, grad_x, grad_weight, grad_bias


def _empty(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradients; an empty tensor for one that is not needed."""
    return (
        x.new_empty(x.shape if needs_grad else 0),
        weight.new_empty(weight.shape if needs_grad else 0),
        weight.new_empty(0) if bias is None or not needs_grad else torch.empty_like(bias),
    )


def _torch_compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs_grad: bool
) -> Results:
    def loss(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        b = None if bias is None else bias.to(x.dtype)
        return linear_cross_entropy_torch(x, weight.to(x.dtype), b, labels)

    total = loss(x, weight, bias)
    if not needs_grad:
        return total, *_empty(x, weight, bias, False)
    grads = torch_gradients(loss, (x, weight, bias), torch.ones_like(total))
    return total, grads[0], grads[1], weight.new_empty(0) if bias is None else grads[2]


# --- torch.library --------------------------------------------------------------------------------


@kernel_op("m2_plugin::linear_cross_entropy")
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    needs_grad: bool,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses (fp32 or wider) and its gradients of x, weight and bias.

    x is (M, D) in the dtype of the products, weight (V, D) and bias (V,) in their own; labels (M,).
    """
    return run_kernel(OP, strict, _compute, _torch_compute, x, weight, bias, labels, needs_grad)


@linear_cross_entropy_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs_grad: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty((), dtype=torch.float32, device=x.device)
    return total, *_empty(x, weight, bias, needs_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(*output[1:])


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    given = ctx.needs_input_grad[:3]

    def scaled(g: Tensor) -> Tensor:
        # `grad`, 1/M times the scale of the loss, would be rounded to the dtype of g.
        return (g.to(torch.promote_types(g.dtype, grad.dtype)) * grad).to(g.dtype)

    grads = [scaled(g) if need else None for g, need in zip(ctx.saved_tensors, given, strict=True)]
    return *grads, None, None, None


linear_cross_entropy_op.register_autograd(_autograd, setup_context=_setup_context)


@register(OP)
def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Compare a vocabulary of two tiles with an odd rest, and rows without a label."""
    normal = draws(dtype)
    rows, width, size = 48, 64, 9001
    x = normal(rows, width)
    weight, bias = (normal(*s, scale=0.3, dtype=torch.float32) for s in ((size, width), (size,)))
    labels = torch.arange(rows) * 191  # the last is in the second tile
    labels[::5] = IGNORE_INDEX
    yield Case("loss and gradients", _compute, _torch_compute, (x, weight, bias, labels, True))
    yield Case("loss", _compute, _torch_compute, (x, weight, None, labels, False))
