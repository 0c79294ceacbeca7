"""The ops one by one: kernel, PyTorch, torch.compile, and what each replaces, side by side.

    python tests/benchmarks/bench_ops.py                 # every length, on the GPU
    python tests/benchmarks/bench_ops.py --lengths 128   # one

Prints a table and writes tests/benchmarks/results/ops_<device>.json after every row. Providers
alternate within a run; a figure is the median. `floor` is in `floors.py`; the rates that it
needs are measured first, by a copy and by a large matrix product. The error is that of the forward
pass against fp64, relative, on a slice of the batch and channels.

Times are CUDA events round as many calls in a row as fill the queue: some of these kernels are
shorter than the time to launch them, and waiting for each would measure the launch. Inputs are
larger than the L2 cache, so nothing has to clear it between calls.

`rfft` and `fft` are what one writes by hand: the gates, and both filters in the frequency
domain, zero-padded to 2·L, in fp32. `hyena_filters` is the generation of both filters of a
layer, once for a batch, to be seen beside `gated_long_conv`.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import floors
import torch
import torch.nn.functional as F
from bench_model import EVENT_S, free, seconds
from report import RESULTS
from torch import Tensor

from m2_plugin.layers.long_conv import LongConv
from m2_plugin.ops import backend
from m2_plugin.ops.backend import failures
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.monarch_mlp import monarch_mlp
from m2_plugin.ops.short_conv import short_conv

# The lengths that the targets name come first, in case time runs out.
LENGTHS = (512, 4096, 128, 2048, 8192, 32768, 1024, 16384)
CROSSOVER = (512, 1024, 2048)  # where both algorithms of the kernel are timed
COMPILED = (512, 4096)  # torch.compile takes longer than all else of a row
SLICE = 64  # channels, or rows, of which errors are computed
Run = Callable[[], Tensor]


@contextlib.contextmanager
def toeplitz_up_to(length: int) -> Iterator[None]:
    """Moves the length from which the FFT kernel runs, measured or not."""
    usual = backend.MAX_TOEPLITZ_LENGTH
    backend.MAX_TOEPLITZ_LENGTH = length
    try:
        with unittest.mock.patch.dict(os.environ, {"M2_PLUGIN_AUTOTUNE": "0"}):
            yield
    finally:
        backend.MAX_TOEPLITZ_LENGTH = usual


def algorithm(provider: str, length: int) -> str:
    """Which algorithm a provider of the mixer runs: toeplitz or fft."""
    if provider == "triton":
        return "toeplitz" if length <= backend.MAX_TOEPLITZ_LENGTH else "fft"
    return provider.removeprefix("triton (").removesuffix(")")


def side_by_side(
    runs: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, dict[str, Any]]:
    """Median, smallest and largest milliseconds of each; an error instead where one cannot run."""
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                run()
            once = seconds(run, device)
            calls[name] = max(1, round(EVENT_S / 40 / once)) if device == "cuda" else 1
        except Exception as problem:
            results[name] = {"error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
            free(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, count in calls.items():
            times[name].append(1e3 * seconds(runs[name], device, count))
    for name, values in times.items():
        results[name] = {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
        }
    return {name: results[name] for name in runs}


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes per second of a copy and operations per second of a matrix product."""
    n = 1 << (28 if device == "cuda" else 24)
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = side_by_side({"copy": partial(target.copy_, source)}, device, 10)["copy"]
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    product = side_by_side({"product": partial(torch.mm, a, b)}, device, 10)["product"]
    return 2e3 * n / copy["median_ms"], 2e3 * size**3 / product["median_ms"]


class Inputs:
    """Draws tensors in a dtype, the same ones each time; or the same values in fp64."""

    def __init__(self, device: str, dtype: torch.dtype, exact: bool):
        self.device, self.dtype, self.exact = device, dtype, exact
        self.generator = torch.Generator(device).manual_seed(0)
        self.drawn: list[Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        x = x.to(dtype or self.dtype)
        return self.keep(x.double() if self.exact else x)

    def keep(self, x: Tensor) -> Tensor:
        self.drawn.append(x.requires_grad_())
        return x


def by_hand(p: Tensor, u: Tensor, short: Sequence[Tensor], taps: Sequence[Tensor], real: bool):
    """The mixer's core with torch.fft, real or complex."""
    length = p.shape[1]
    to, back = (torch.fft.rfft, torch.fft.irfft) if real else (torch.fft.fft, torch.fft.ifft)

    def conv(x: Tensor, k: Tensor) -> Tensor:
        future, past = k[:, : length - 1], k[:, length - 1 :]
        k = torch.cat([past, torch.zeros_like(k[:, :1]), future], dim=1)  # by lag, circular
        y = back(to(x.float().transpose(1, 2), n=2 * length) * to(k, n=2 * length), n=2 * length)
        return y.real[..., :length].transpose(1, 2) if not real else y[..., :length].transpose(1, 2)

    x1, x2, v = short_conv(p, *short).chunk(3, dim=-1)
    return (x2 * conv(v * x1, taps[0]) + conv(u, taps[1])).to(p.dtype)


def providers(
    op: str, length: int, batch: int, hidden: int, normal: Inputs
) -> tuple[dict[str, Run], floors.Work]:
    """What is timed on inputs drawn from `normal`, and the work of a forward pass."""
    size, tokens, width = 4 * hidden, batch * length, normal.dtype.itemsize
    runs: dict[str, Run] = {}

    def paths(fn: Callable[[str], Tensor]) -> None:
        runs["torch"] = partial(fn, "torch")
        if length in COMPILED and not normal.exact:
            runs["torch.compile"] = partial(torch.compile(fn), "torch")
        runs["triton"] = partial(fn, "triton")

    if op == "hyena_filters":
        convs = [LongConv(hidden, length, order=128).to(normal.device) for _ in range(2)]
        normal.drawn += [p for conv in convs for p in conv.parameters()]

        def taps_of_both() -> Tensor:
            return torch.stack([conv.taps(length) for conv in convs])

        runs["torch"] = taps_of_both
        if length in COMPILED:
            runs["torch.compile"] = torch.compile(taps_of_both)
        return runs, floors.hyena_filters(hidden, length)
    if op == "gated_long_conv":
        p = normal(3 * hidden, batch, length).detach().permute(1, 2, 0)  # sequence last in memory
        normal.drawn.clear()
        p, u = normal.keep(p), normal(batch, length, hidden)
        fp32 = partial(normal, dtype=torch.float32)
        short = fp32(3 * hidden, 3, scale=0.5), fp32(3 * hidden, scale=0.5)
        taps = [fp32(hidden, 2 * length - 1, scale=length**-0.5) for _ in range(2)]

        def conv(backend: str) -> Tensor:
            return gated_long_conv(p, *short, taps[0], u, taps[1], backend=backend)

        paths(conv)
        if length in CROSSOVER:
            for name in ("triton (toeplitz)", "triton (fft)"):
                runs[name] = runs["triton"]
            del runs["triton"]
        runs["rfft"] = partial(by_hand, p, u, short, taps, real=True)
        runs["fft"] = partial(by_hand, p, u, short, taps, real=False)
        q = normal(3, batch, hidden // 64, length, 64)
        runs["sdpa"] = lambda: F.scaled_dot_product_attention(*q.unbind())
        return runs, floors.gated_long_conv(tokens, hidden, width)
    x, bias = normal(tokens, hidden), normal(hidden, scale=0.1)
    if op == "monarch_mlp":
        up = normal(*block_shape(hidden, 2 * size, 4), scale=hidden**-0.5)
        down = normal(*block_shape(size, hidden, 4), scale=size**-0.5)
        dense_up, dense_down = normal(size, hidden), normal(hidden, size)
        paths(lambda backend: monarch_mlp(x, up, down, bias, size, backend=backend))
        runs["dense GELU MLP"] = lambda: F.linear(F.gelu(F.linear(x, dense_up)), dense_down, bias)
        weights = floors.mlp_weights(hidden)
    else:
        weight, dense = normal(*block_shape(hidden, hidden, 4)), normal(hidden, hidden)
        paths(lambda backend: block_diagonal_linear(x, weight, bias, backend=backend))
        runs["nn.Linear"] = lambda: F.linear(x, dense, bias)
        weights = weight.numel()
    return runs, floors.block_maps(tokens, hidden, weights, width)


def with_backward(run: Run, inputs: list[Tensor]) -> Callable[[], object]:
    def both() -> object:
        y = run()
        return torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)

    return both


def at_threshold(provider: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """Lets a run take the algorithm that its name says."""
    if provider not in ("triton (toeplitz)", "triton (fft)"):
        return run

    def chosen() -> Any:
        with toeplitz_up_to(1 << 30 if provider == "triton (toeplitz)" else 0):
            return run()

    return chosen


def errors(op: str, length: int, hidden: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of each provider that computes the same, on a slice."""
    found: dict[str, float] = {}
    if op == "hyena_filters":
        return found
    # The MLP and the linear map see tokens only.
    sizes = (length, 1, min(hidden, SLICE)) if op == "gated_long_conv" else (1, SLICE, hidden)
    with torch.no_grad():
        exact = providers(op, *sizes, Inputs(device, dtype, exact=True))[0]["torch"]()
        for name, run in providers(op, *sizes, Inputs(device, dtype, exact=False))[0].items():
            if name not in ("torch", "rfft", "fft") and not name.startswith("triton"):
                continue
            try:
                y = at_threshold(name, run)()
            except Exception:  # its row of times says why
                continue
            found[name] = ((y.double() - exact).norm() / exact.norm()).item()
    return found


def measure(op: str, length: int, what: str, rate: tuple[float, float], args: argparse.Namespace):
    """One row: times of all providers, and how near the floor they are."""
    hidden, device, dtype = args.hidden_size, args.device, args.dtype
    batch = max(1, args.tokens // length)
    inputs = Inputs(device, dtype, exact=False)
    runs, work = providers(op, length, batch, hidden, inputs)
    timed: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        both = with_backward(run, inputs.drawn)
        timed[name] = at_threshold(name, both if what == "step" else run)
    with torch.set_grad_enabled(what == "step"):
        times = side_by_side(timed, device, args.repeats)
    row = {"op": op, "length": length, "batch": batch, "what": what, "times": times}
    if what == "step":
        return row
    floor = 1e3 * work.seconds(*rate)
    row |= {"floor_ms": floor, "bytes": work.bytes}
    wrong = errors(op, length, hidden, device, dtype)
    for name, value in times.items():
        if name in wrong:
            value["error_fp64"] = wrong[name]
        if "median_ms" not in value or name in ("sdpa", "nn.Linear", "dense GELU MLP"):
            continue  # these do other work
        took = 1e-3 * value["median_ms"]
        value |= {"gb_per_s": 1e-9 * work.bytes / took, "of_floor": floor / value["median_ms"]}
        operations = work.operations
        if op == "gated_long_conv" and algorithm(name, length) == "toeplitz":
            operations = floors.toeplitz_operations(batch * length, hidden, length)
        if operations:
            value["tflop_per_s"] = 1e-12 * operations / took
    return row


def show(row: dict[str, Any]) -> None:
    for name, value in row["times"].items():
        text = value.get("error") or f"{value['median_ms']:>10.3f}"
        for key, form in (("gb_per_s", "{:>8.0f}"), ("tflop_per_s", "{:>8.1f}")):
            text += form.format(value[key]) if key in value else " " * 8
        text += f"{value['of_floor']:>8.0%}" if "of_floor" in value else " " * 8
        text += f"{value['error_fp64']:>10.1e}" if "error_fp64" in value else ""
        place = f"{row['op']:<23}{row['length']:>6}{row['batch']:>5} {row['what']:<9}"
        print(f"{place}{name:<20}{text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--tokens", type=int, default=1 << 16, help="in a batch")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=1e9, help="start no row after so many s")
    parser.add_argument("--compiled", nargs="*", type=int, help="lengths to torch.compile at")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.compiled is not None:
        global COMPILED
        COMPILED = tuple(args.compiled)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    deadline = time.monotonic() + args.limit
    rate = rates(args.device, args.dtype)
    report = {
        "benchmark": "ops",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": str(args.dtype).removeprefix("torch."),
        "hidden_size": args.hidden_size,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "bytes_per_second": rate[0],
        "operations_per_second": rate[1],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"ops_{args.device}.json"
    rows: list[dict[str, Any]] = []
    print(f"memory {rate[0] / 1e9:.0f} GB/s, matrix products {rate[1] / 1e12:.1f} TFLOP/s")
    place = f"{'op':<23}{'L':>6}{'B':>5} {'what':<9}"
    print(f"{place}{'provider':<20}{'ms':>10}{'GB/s':>8}{'TFLOP/s':>8}{'floor':>8}{'error':>10}")
    first, *others = args.lengths
    # The MLP and the linear map see tokens only, whatever the length.
    jobs = [("gated_long_conv", first), ("monarch_mlp", first), ("block_diagonal_linear", first)]
    for length in others:
        jobs.append(("gated_long_conv", length))
    jobs += [("hyena_filters", length) for length in args.lengths]
    for what, (op, length) in itertools.product(("forward", "step"), jobs):
        if time.monotonic() > deadline:
            print(f"{op} {length} {what}: left out, no time")
            continue
        rows.append(measure(op, length, what, rate, args))
        free(args.device)
        show(rows[-1])
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(report | {"fallbacks": failures(), "rows": rows}, indent=1))
        whole.replace(path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
