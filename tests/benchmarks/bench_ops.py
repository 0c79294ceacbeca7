"""The ops one by one: kernel, PyTorch, torch.compile, and what each replaces, side by side.

    python tests/benchmarks/bench_ops.py                 # every length, on the GPU
    python tests/benchmarks/bench_ops.py --lengths 128   # one

Prints a table and writes tests/benchmarks/results/ops_<device>.json. Providers alternate within a
run; a figure is the median. ``floor`` is the larger of two times: that to move the op's inputs and
output once at the device's memory bandwidth, and that of its operations at its matrix rate. Both
rates are measured first, by a copy and by a large matrix product.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_model import seconds
from torch import Tensor

from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape
from m2_plugin.ops.gated_long_conv import MAX_TOEPLITZ_LENGTH, gated_long_conv
from m2_plugin.ops.monarch_mlp import monarch_mlp

RESULTS = Path(__file__).parent / "results"
LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
Run = Callable[[], Tensor]


def side_by_side(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict:
    """Median, smallest and largest milliseconds of each; an error instead where one cannot run."""
    results: dict = {}
    for name, run in list(runs.items()):
        try:
            for _ in range(3):
                run()
        except Exception as problem:
            results[name] = {"error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
            del runs[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(1e3 * seconds(run, device))
    for name, values in times.items():
        results[name] = {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
        }
    return results


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


def providers(op: str, length: int, batch: int, hidden: int, device: str, dtype: torch.dtype):
    """What is timed, its inputs, and the bytes and operations of a forward pass."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    size, tokens = 4 * hidden, batch * length
    width = torch.empty((), dtype=dtype).element_size()
    runs: dict[str, Run] = {}
    if op == "gated_long_conv":
        p = normal(3 * hidden, batch, length).detach().permute(1, 2, 0).requires_grad_()
        u = normal(batch, length, hidden)
        short = normal(3 * hidden, 3, dtype=torch.float32), normal(3 * hidden, dtype=torch.float32)
        taps = [normal(hidden, 2 * length - 1, dtype=torch.float32) for _ in range(2)]
        inputs = [p, u, *short, *taps]

        def conv(backend: str) -> Tensor:
            return gated_long_conv(p, *short, taps[0], u, taps[1], backend=backend)

        runs["torch"] = partial(conv, "torch")
        runs["torch.compile"] = partial(torch.compile(conv), "torch")
        if length <= MAX_TOEPLITZ_LENGTH:
            runs["triton"] = partial(conv, "triton")
        q = normal(3, batch, hidden // 64, length, 64)
        runs["sdpa"] = lambda: F.scaled_dot_product_attention(*q.unbind())
        inputs.append(q)
        return runs, inputs, 5 * tokens * hidden * width, 4 * length * tokens * hidden
    x, bias = normal(tokens, hidden), normal(hidden)
    if op == "monarch_mlp":
        up = normal(*block_shape(hidden, 2 * size, 4))
        down = normal(*block_shape(size, hidden, 4))
        dense_up, dense_down = normal(size, hidden), normal(hidden, size)
        inputs = [x, up, down, bias, dense_up, dense_down]

        def mlp(backend: str) -> Tensor:
            return monarch_mlp(x, up, down, bias, size, backend=backend)

        runs["torch"] = partial(mlp, "torch")
        runs["torch.compile"] = partial(torch.compile(mlp), "torch")
        runs["triton"] = partial(mlp, "triton")
        runs["dense GELU MLP"] = lambda: F.linear(F.gelu(F.linear(x, dense_up)), dense_down, bias)
        weights = up.numel() + down.numel()
    else:
        weight, dense = normal(*block_shape(hidden, hidden, 4)), normal(hidden, hidden)
        inputs = [x, weight, bias, dense]

        def linear(backend: str) -> Tensor:
            return block_diagonal_linear(x, weight, bias, backend=backend)

        runs["torch"] = partial(linear, "torch")
        runs["torch.compile"] = partial(torch.compile(linear), "torch")
        runs["triton"] = partial(linear, "triton")
        runs["nn.Linear"] = lambda: F.linear(x, dense, bias)
        weights = weight.numel()
    return runs, inputs, (2 * tokens * hidden + weights) * width, 2 * tokens * weights


def with_backward(run: Run, inputs: list[Tensor]) -> Callable[[], object]:
    def both() -> object:
        y = run()
        return torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--tokens", type=int, default=1 << 16, help="in a batch")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    device, hidden = args.device, args.hidden_size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth, flops = rates(device, dtype)
    rows = []
    print(f"memory {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.1f} TFLOP/s")
    print(f"{'op':<23}{'L':>6}{'B':>5} {'what':<9}{'provider':<16}{'ms':>9}{'of floor':>10}")
    # The MLP and the linear map see tokens only, whatever the length.
    jobs = [("gated_long_conv", length) for length in args.lengths]
    jobs += [("monarch_mlp", args.lengths[0]), ("block_diagonal_linear", args.lengths[0])]
    for op, length in jobs:
        batch = max(1, args.tokens // length)
        for what in ("forward", "step"):
            runs, inputs, num_bytes, operations = providers(
                op, length, batch, hidden, device, dtype
            )
            timed: dict[str, Callable[[], object]] = dict(runs)
            if what == "step":
                timed = {name: with_backward(run, inputs) for name, run in runs.items()}
            with torch.set_grad_enabled(what == "step"):
                times = side_by_side(timed, device, args.repeats)
            floor = 1e3 * max(num_bytes / bandwidth, operations / flops)
            row = {"op": op, "length": length, "batch": batch, "what": what, "times": times}
            if what == "forward":
                row |= {"floor_ms": floor, "bytes": num_bytes, "operations": operations}
            rows.append(row)
            for name, value in times.items():
                took = value.get("median_ms")
                share = f"{floor / took:.0%}" if took and what == "forward" else ""
                text = f"{took:.3f}" if took else value["error"]
                print(f"{op:<23}{length:>6}{batch:>5} {what:<9}{name:<16}{text:>9}{share:>10}")
    report = {
        "benchmark": "ops",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": hidden,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "bytes_per_second": bandwidth,
        "operations_per_second": flops,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"ops_{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
