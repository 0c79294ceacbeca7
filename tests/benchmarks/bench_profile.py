"""Where a GPU's time goes: M2-BERT-base and BERT-base with SDPA, by kernel.

    python tests/benchmarks/bench_profile.py

Profiles one forward pass and one training step of each model, as bench_model.py runs them, and
writes tests/benchmarks/results/profile_cuda.json. The sum over kernels is the time that a pass
takes if the host is ahead of the GPU, as it is in large batches; bench_model.py measures the time
that passes in a batch of 32,768 tokens.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from bench_model import free, setup
from report import RESULTS
from torch.profiler import ProfilerActivity, profile

LENGTHS = (128, 512, 2048, 8192, 32768)
PROVIDERS = ("m2_bert", "bert_sdpa")
TOKENS = 1 << 15


def measure(provider: str, length: int, what: str) -> dict[str, Any]:
    """Profile one call; milliseconds and launches of each kernel, the longest first."""
    run = setup(provider, "base", length, TOKENS // length, what, "cuda", None)
    for _ in range(3):  # compiles, tunes, allocates
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    kernels = [
        {"name": e.key, "ms": 1e-3 * e.self_device_time_total, "launches": e.count} for e in events
    ]
    return {
        "provider": provider,
        "what": what,
        "length": length,
        "ms": sum(kernel["ms"] for kernel in kernels),
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        for provider in args.providers:
            for what in ("forward", "step"):
                rows.append(measure(provider, length, what))
                free("cuda")
                row = rows[-1]
                print(f"{provider} {what} {length}: {row['ms']:.2f} ms, {row['launches']} launches")
                for kernel in row["kernels"][:12]:
                    print(f"{kernel['ms']:>10.3f} {kernel['launches']:>5}  {kernel['name'][:80]}")
    report = {
        "benchmark": "profile",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "profile_cuda.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
