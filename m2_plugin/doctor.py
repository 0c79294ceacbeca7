"""Check the installation: which operations run here, with what error and how fast."""

import argparse
import importlib
import importlib.metadata
import pkgutil
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m2_plugin.ops.backend import failures, why_no_kernel
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.linear_cross_entropy import linear_cross_entropy
from m2_plugin.ops.monarch_mlp import monarch_mlp

PACKAGES = ("torch", "triton", "transformers", "llm-foundry", "mosaicml", "mosaicml-streaming")
# Allowed error of a kernel, as a multiple of plain PyTorch's in the same dtype.
ALLOWED_ERROR_RATIO = 1.5


@dataclass(frozen=True)
class Case:
    """An op and inputs for it.

    Args:
        name: The op's name.
        run: A function that maps the inputs and a backend to the output.
        activations: Inputs that are cast to the dtype of the run.
        parameters: Inputs that stay in fp32 in a bf16 run.
    """

    name: str
    run: Callable[..., Tensor]
    activations: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()


def cases(batch: int, length: int, hidden: int) -> list[Case]:
    """Build the ops' inputs at the sizes of a model, in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    size, rows = 4 * hidden, batch * length
    x, bias = normal(rows, hidden), normal(hidden)
    up = normal(*block_shape(hidden, 2 * size, 4), scale=hidden**-0.5)
    down = normal(*block_shape(size, hidden, 4), scale=size**-0.5)
    square = normal(*block_shape(hidden, hidden, 4), scale=hidden**-0.5)
    p, u = normal(batch, length, 3 * hidden), normal(batch, length, hidden)
    short = normal(3 * hidden, 3, scale=0.5), normal(3 * hidden, scale=0.5)
    taps = normal(2, hidden, 2 * length - 1, scale=length**-0.5).unbind()
    words = normal(40 * hidden, hidden, scale=hidden**-0.5), normal(40 * hidden)
    labels = torch.arange(-(-rows // 4)) % (40 * hidden)  # a quarter of the tokens is masked

    def mixer(p: Tensor, u: Tensor, w: Tensor, b: Tensor, *taps: Tensor, backend: str) -> Tensor:
        return gated_long_conv(p, w, b, taps[0], u, taps[1], backend=backend)

    def mlp(x: Tensor, up: Tensor, down: Tensor, bias: Tensor, backend: str) -> Tensor:
        return monarch_mlp(x, up, down, bias, size, backend=backend)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return linear_cross_entropy(x, weight, bias, labels.to(x.device), backend=backend)

    return [
        Case("block_diagonal_linear", block_diagonal_linear, (x, square, bias)),
        Case("monarch_mlp", mlp, (x, up, down, bias)),
        Case("gated_long_conv", mixer, (p, u), (*short, *taps)),
        Case("linear_cross_entropy", loss, (x[: len(labels)],), words),
    ]


def evaluate(case: Case, backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the output, and the gradient of its mean square for every input."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [t.to(device, dtype).requires_grad_() for t in case.activations]
    inputs += [t.to(device, wide).requires_grad_() for t in case.parameters]
    y = case.run(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum() / y.numel(), inputs)]


def error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error among an output and its gradients."""
    return max(
        ((a.double() - e).norm() / e.norm()).item() for a, e in zip(results, exact, strict=True)
    )


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """Return the median time of 10 calls, in milliseconds, after 3 calls to warm up."""
    times = []
    for i in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Compare all kernels with PyTorch anew and keep the verdicts; return what is wrong with each.

    A run does the same before a kernel's first use, and then trusts the verdict.
    """
    from m2_plugin.ops import kernels
    from m2_plugin.ops.kernels import check, launch

    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)  # which registers its cases
    return {op: check.recheck(op, device, dtype, launch.allows_tf32()) for op in check.registered()}


def versions() -> list[str]:
    """Return a line for Python and one for each package in `PACKAGES`."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin doctor`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0 if all backends run, and no kernel has a larger error than allowed; else 1.
    """
    parser = argparse.ArgumentParser(prog="m2-plugin doctor", description=__doc__)
    parser.add_argument("--batch", type=int, help="sequences (default: 32 on a GPU, 2 on a CPU)")
    parser.add_argument("--length", type=int, default=128, help="positions (default: 128)")
    parser.add_argument("--hidden-size", type=int, default=768, help="channels (default: 768)")
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for line in versions():
        say(line)
    say(f"device: {torch.cuda.get_device_name() if device == 'cuda' else 'CPU, no CUDA device'}")
    reason = why_no_kernel(torch.device(device), dtype)
    backends = ("torch",) if reason else ("torch", "triton")
    say(f"kernels: {f'none, plain PyTorch runs: {reason}' if reason else 'Triton'}\n")
    broken = []
    if device == "cuda" and not reason:
        where = torch.device(device, torch.cuda.current_device())
        say(
            "compared with PyTorch on small inputs (before a kernel's first use, runs do the same):"
        )
        for op, problem in compare(where, dtype).items():
            say(f"{op:32}{problem or 'right'}")
            broken += [op] if problem else []
        say("")
    batch = args.batch or (32 if device == "cuda" else 2)
    say(f"B {batch}, L {args.length}, D {args.hidden_size}, {str(dtype).removeprefix('torch.')}")
    say(f"{'op':24}{'backend':10}{'error vs fp64':>14}{'forward + backward':>20}")
    for case in cases(batch, args.length, args.hidden_size):
        exact = evaluate(case, "torch", device, torch.float64)
        errors = {}
        for backend in backends:
            try:
                errors[backend] = error(evaluate(case, backend, device, dtype), exact)
            except Exception as failure:
                say(f"{case.name:24}{backend:10}{type(failure).__name__}: {failure}")
                broken.append(case.name)
                continue
            took = milliseconds(partial(evaluate, case, backend, device, dtype), device)
            say(f"{case.name:24}{backend:10}{errors[backend]:>14.1e}{took:>17.2f} ms")
        if errors.get("triton", 0.0) > ALLOWED_ERROR_RATIO * errors.get("torch", float("inf")):
            say(f"{case.name}: the kernel has a larger error than PyTorch. Set `backend: torch`.")
            broken.append(case.name)
    broken += [f"{op} ({why})" for op, why in failures().items()]
    say(f"\n{'broken: ' + ', '.join(broken) if broken else 'everything works'}")
    return 1 if broken else 0
