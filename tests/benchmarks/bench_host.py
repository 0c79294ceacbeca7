"""What the host takes for a pass: M2-BERT beside transformers' BERT, on a GPU that does nothing.

    python tests/benchmarks/bench_host.py

If the host needs longer than the GPU for a pass, the GPU waits for it. Here the GPU is not there
(`null_gpu.py`): what is timed is Python, PyTorch and Triton up to the calls of CUDA's libraries,
whose own time is left out (some microseconds for each launch). The passes are those of
`bench_model.py`. The time is that of the process's CPU; the models take turns.

Prints a table and writes results/host.json. It needs what `null_gpu.py` needs, and no GPU.
"""

import null_gpu

if __name__ == "__main__":
    null_gpu.in_null_process({})

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_model
import torch
import triton

from m2_plugin.ops.backend import failures
from m2_plugin.ops.kernels import check, tuning

MODELS = ("m2_bert", "bert_sdpa")


def nothing_is_measured() -> None:
    """Let kernels pass as compared with PyTorch and as timed, as on a machine that they ran on."""
    check._compare = lambda *_: None  # type: ignore[assignment]
    check.cache.add = lambda *_: None  # type: ignore[assignment]
    check.cache.load = lambda *_: {}  # type: ignore[assignment]
    tuning._measure = lambda name, candidates, run: (candidates[0], {})  # type: ignore[assignment]
    tuning.compile_together = lambda run: None  # type: ignore[assignment]


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(scale: str, what: str, length: int, tokens: int, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"scale": scale, "what": what, "length": length}
    runs = {}
    for model in MODELS:
        batch = max(1, tokens // length)
        runs[model] = bench_model.setup(model, scale, length, batch, what, "cuda", None)
        for _ in range(3):
            runs[model]()
    times: dict[str, list[float]] = {model: [] for model in MODELS}
    gc.collect()
    for _ in range(repeats):
        for model, run in runs.items():
            times[model].append(seconds(run))
    if failures():
        raise RuntimeError(f"PyTorch took the place of kernels: {failures()}")
    for model, run in runs.items():
        before = null_gpu.launches()
        run()
        row[model] = {
            "launches": null_gpu.launches() - before,
            "median_ms": 1e3 * statistics.median(times[model]),
            "min_ms": 1e3 * min(times[model]),
            "max_ms": 1e3 * max(times[model]),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", nargs="+", default=["base"], choices=list(bench_model.SCALES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=1 << 15, help="in a batch")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=bench_model.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    nothing_is_measured()
    rows = []
    for scale in args.scales:
        for length in args.lengths:
            for what in ("forward", "step"):
                row = measure(scale, what, length, args.tokens, args.repeats)
                rows.append(row)
                for model in MODELS:
                    found = row[model]
                    print(
                        f"{scale:<12}{what:<9}{length:>6}  {model:<11}{found['launches']:>6} "
                        f"launches{found['median_ms']:>9.2f} ms "
                        f"({found['min_ms']:.2f}-{found['max_ms']:.2f})",
                        flush=True,
                    )
    report = {
        "benchmark": "host",
        "date": datetime.date.today().isoformat(),
        "cpu": bench_model._cpu_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": bench_model.transformers.__version__,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "host.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
