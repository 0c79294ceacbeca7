"""The mixer's core as torch.library ops, which choose a kernel or fall back to PyTorch."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from m2_plugin.ops import backend
from m2_plugin.ops.backend import run_kernel
from m2_plugin.ops.kernels import monarch_conv, toeplitz_conv, tuning
from m2_plugin.ops.kernels.gates import Inputs
from m2_plugin.ops.kernels.launch import empty_sequence_last, torch_gradients
from m2_plugin.ops.reference.gated_long_conv import gated_long_conv_torch

OP = "gated_long_conv"


ALGORITHMS: dict[str, ModuleType] = {"toeplitz": toeplitz_conv, "fft": monarch_conv}
# Lengths at which either may be faster. Outside this range the number of operations decides.
CROSSOVER = range(257, 4097)


def algorithm(direction: str, x: Tensor, run: Callable[[ModuleType], object]) -> ModuleType:
    """Choose kernels for sequences x (B, L, D): by length, or by measurement within `CROSSOVER`.

    Args:
        direction: `forward` or `backward`.
        run: A function that runs one of the two modules; both compute the same.
    """
    batch_size, length, channels = x.shape
    usual, other = "toeplitz", "fft"
    if length > backend.MAX_TOEPLITZ_LENGTH:
        usual, other = other, usual
    close = length in CROSSOVER and x.dtype != torch.float32
    rows = tuning.row_class(batch_size * length)
    key = (usual, rows, triton.next_power_of_2(length), channels, x.dtype)
    name = tuning.best(
        f"gated_long_conv {direction}",
        key,
        (usual, other) if close else (usual,),
        lambda name: run(ALGORITHMS[name]),
        x.device,
    )
    return ALGORITHMS[name]


def _forward(inputs: Inputs, causal: bool) -> Tensor:
    def run(kernels: ModuleType) -> Tensor:
        y: Tensor = kernels.forward(inputs, causal)
        return y

    return run(algorithm("forward", inputs.p, run))


def _backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    def run(kernels: ModuleType) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = kernels.backward(grad, inputs)
        return grads

    return run(algorithm("backward", grad, run))


def _torch_forward(inputs: Inputs, causal: bool) -> Tensor:
    return gated_long_conv_torch(*inputs)  # without `causal`, which only saves work


def _torch_backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    fn = partial(gated_long_conv_torch, mask=inputs.mask)
    return tuple(torch_gradients(fn, inputs[:-1], grad))


@torch.library.custom_op("m2_plugin::gated_long_conv", mutates_args=())
def gated_long_conv_op(
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    res_taps: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    strict: bool,
) -> Tensor:
    """Map p (B, L, 3D) and u (B, L, D), of one dtype, to (B, L, D).

    weight (3D, 3), bias (3D,), taps and res_taps (D, 2L − 1) are fp32; mask (B, L) has p's dtype.
    """
    inputs = Inputs(p, u, weight, bias, taps, res_taps, mask)
    return run_kernel(OP, strict, _forward, _torch_forward, inputs, causal)


@gated_long_conv_op.register_fake
def _(p: Tensor, *_: Any) -> Tensor:
    return empty_sequence_last(p, p.shape[2] // 3)


@torch.library.custom_op("m2_plugin::gated_long_conv_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    res_taps: Tensor | None,
    mask: Tensor | None,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of p, u, weight, bias, taps and res_taps; empty for one not given."""
    inputs = Inputs(p, u, weight, bias, taps, res_taps, mask)
    return run_kernel(OP, strict, _backward, _torch_backward, grad, inputs)


@backward_op.register_fake
def _(
    grad: Tensor,
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    res_taps: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_sequence_last(p, p.shape[2]),
        p.new_empty(0) if u is None else empty_sequence_last(u, u.shape[2]),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(taps),
        taps.new_empty(0) if res_taps is None else torch.empty_like(res_taps),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.strict = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = backward_op(grad, *tensors, ctx.strict)
    given = [None if t is None else g for t, g in zip(tensors, grads, strict=False)]
    return *given, None, None, None


gated_long_conv_op.register_autograd(_autograd, setup_context=_setup_context)
