"""The mixer's core as torch.library ops, which choose a kernel or fall back to PyTorch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2_plugin.ops import backend
from m2_plugin.ops.fixed import is_reused
from m2_plugin.ops.kernels import monarch_conv, toeplitz_conv, tuning
from m2_plugin.ops.kernels.check import Case, WrongKernelError, draws, register
from m2_plugin.ops.kernels.gates import Gradients, Inputs
from m2_plugin.ops.kernels.launch import empty_sequence_last, next_power_of_2, torch_gradients
from m2_plugin.ops.kernels.monarch_plan import has_largest
from m2_plugin.ops.kernels.op import kernel_op
from m2_plugin.ops.kernels.run import kernel_problem, run_kernel
from m2_plugin.ops.reference.gated_long_conv import gated_long_conv_torch

OP = "gated_long_conv"


class Algorithm(NamedTuple):
    """A way to compute the op and its gradients."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Gradients]


ALGORITHMS = {
    "toeplitz": Algorithm(toeplitz_conv.forward, toeplitz_conv.backward),
    "fft": Algorithm(monarch_conv.forward, monarch_conv.backward),
    "largest fft": Algorithm(
        partial(monarch_conv.forward, largest=True), partial(monarch_conv.backward, largest=True)
    ),
}
# Lengths at which Toeplitz products or FFTs may be faster; at others, their operations decide. At
# 1,024 FFTs took a third of the time on an H200.
CROSSOVER = range(257, 1025)


def _candidates(x: Tensor) -> list[str]:
    """Return the algorithms that may be fastest for sequences x, the usual one first."""
    length = x.shape[1]
    found = ["fft", "toeplitz"] if length > backend.MAX_TOEPLITZ_LENGTH else ["toeplitz", "fft"]
    if has_largest(x):
        return ["fft", "largest fft"]
    return found if length in CROSSOVER and x.dtype != torch.float32 else found[:1]


def algorithm(
    direction: str, inputs: Inputs, causal: bool, run: Callable[[Algorithm, Inputs], object]
) -> Algorithm:
    """Choose an algorithm by the sequences' length, or by measurement if several may be fastest.

    Args:
        direction: `forward` or `backward`.
        inputs: The op's tensors.
        causal: Whether the kernels may leave out half of the work.
        run: A function that runs an algorithm on such inputs; all compute the same.

    Raises:
        WrongKernelError: If the kernels did not pass their comparison with PyTorch.
    """
    x = inputs.p
    batch_size, length, channels = x.shape
    usual, *_ = names = _candidates(x)
    problems = {n: kernel_problem(f"{OP} by {n}", x) for n in names}
    names = [n for n in names if problems[n] is None]
    if not names:
        raise WrongKernelError(problems[usual])
    if len(names) == 1:
        return ALGORITHMS[names[0]]
    rows = tuning.row_class(batch_size * length)
    reused = is_reused(inputs.taps)  # then the spectra are there

    def timed(name: str) -> None:
        run(ALGORITHMS[name], inputs if reused else _as_new(inputs))

    given = inputs.u is not None, inputs.mask is not None, causal, reused
    key = (usual, rows, next_power_of_2(length), channels, x.dtype, *given)
    name = tuning.best(
        f"gated_long_conv {direction}",
        key,
        names,
        timed,
        x.device,
        launches_only=False,  # spectra of fixed taps are kept
    )
    return ALGORITHMS[name]


def _as_new(inputs: Inputs) -> Inputs:
    """Return inputs whose taps nobody has declared fixed."""
    res_taps = inputs.res_taps
    res_taps = None if res_taps is None else res_taps.view_as(res_taps)
    return inputs._replace(taps=inputs.taps.view_as(inputs.taps), res_taps=res_taps)


def _forward(inputs: Inputs, causal: bool) -> Tensor:
    def run(by: Algorithm, inputs: Inputs) -> Tensor:
        return by.forward(inputs, causal)

    return run(algorithm("forward", inputs, causal, run), inputs)


def _backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    def run(by: Algorithm, inputs: Inputs) -> tuple[Tensor, ...]:
        return by.backward(grad, inputs)

    return run(algorithm("backward", inputs, False, run), inputs)


def _torch_forward(inputs: Inputs, causal: bool) -> Tensor:
    return gated_long_conv_torch(*inputs)  # without `causal`, which only saves work


def _torch_backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    def fn(*tensors: Any) -> Tensor:
        return gated_long_conv_torch(*Inputs(*tensors)._replace(mask=inputs.mask))

    # The mask has no gradient.
    grads = Inputs(*torch_gradients(fn, inputs._replace(mask=None), grad))
    return Gradients(*(getattr(grads, name) for name in Gradients._fields))


@kernel_op("m2_plugin::gated_long_conv")
def gated_long_conv_op(
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    p_bias: Tensor | None,
    taps: Tensor,
    res_taps: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    strict: bool,
) -> Tensor:
    """Map p (B, L, 3D) and u (B, L, D), of one dtype, to (B, L, D).

    weight (3D, 3), bias and p_bias (3D,), taps and res_taps (D, 2L − 1) are fp32; mask (B, L) has
    p's dtype.
    """
    inputs = Inputs(p, u, weight, bias, taps, res_taps, mask, p_bias)
    return run_kernel(OP, strict, _forward, _torch_forward, inputs, causal)


@gated_long_conv_op.register_fake
def _(p: Tensor, *_: Any) -> Tensor:
    return empty_sequence_last(p, p.shape[2] // 3)


@kernel_op("m2_plugin::gated_long_conv_backward")
def backward_op(
    grad: Tensor,
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    p_bias: Tensor | None,
    taps: Tensor,
    res_taps: Tensor | None,
    mask: Tensor | None,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `Gradients`."""
    inputs = Inputs(p, u, weight, bias, taps, res_taps, mask, p_bias)
    return tuple(run_kernel(OP, strict, _backward, _torch_backward, grad, inputs))


@backward_op.register_fake
def _(
    grad: Tensor,
    p: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    p_bias: Tensor | None,
    taps: Tensor,
    res_taps: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_sequence_last(p, p.shape[2]),
        p.new_empty(0) if u is None else empty_sequence_last(u, u.shape[2]),
        torch.empty_like(weight),
        torch.empty_like(bias),
        bias.new_empty(0) if p_bias is None else torch.empty_like(p_bias),
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


def _cases(
    kernels: Algorithm, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> Iterator[Case]:
    """Compare batches and lengths: with a residual and a mask, and causal without either."""
    normal = draws(dtype)
    fp32 = {"dtype": torch.float32}
    for i, (batch, length) in enumerate(sizes):
        channels, causal = 3, i % 2 == 1
        p, grad = normal(3 * channels, batch, length).permute(1, 2, 0), normal(batch, length, 3)
        weight, bias = normal(3 * channels, 3, **fp32), normal(3 * channels, **fp32)
        taps, res = (normal(channels, 2 * length - 1, scale=length**-0.5, **fp32) for _ in range(2))
        u, mask = normal(batch, length, channels), torch.ones(batch, length, dtype=dtype)
        mask[0, length // 2 :] = 0
        if causal:
            taps[:, : length - 1] = 0
        inputs = Inputs(p, u, weight, bias, taps, res, mask, normal(3 * channels, **fp32))
        if causal:
            inputs = inputs._replace(u=None, res_taps=None, mask=None, p_bias=None)
        args = inputs, causal
        yield Case(f"forward at length {length}", kernels.forward, _torch_forward, args)
        yield Case(
            f"backward at length {length}", kernels.backward, _torch_backward, (grad, inputs)
        )


# Each kind of launch: whole tiles, a length that 8 does not divide, and several tiles with a rest;
# by FFT one transform of each size, and residue classes. The second and fourth of each are causal.
register(f"{OP} by toeplitz")(
    partial(_cases, ALGORITHMS["toeplitz"], ((16, 128), (5, 113), (5, 272)))
)
register(f"{OP} by fft")(
    partial(_cases, ALGORITHMS["fft"], ((5, 1536), (5, 700), (5, 9000), (5, 300), (5, 3072)))
)
register(f"{OP} by largest fft")(partial(_cases, ALGORITHMS["largest fft"], ((3, 8000), (3, 5000))))
