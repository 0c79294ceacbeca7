"""What limits our kernels on a GPU: hardware counters of a training step of one layer.

    python tests/benchmarks/bench_counters.py

Needs Nsight Compute (`ncu`), which measures each launch by itself several times, with cold caches.
Its times are therefore longer than those of `bench_profile.py`; the shares of each unit's highest
rate are what this is for. Writes tests/benchmarks/results/counters_cuda.json.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_model import SCALES, setup
from report import RESULTS

LENGTHS = (128, 8192)
TOKENS = 1 << 15
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
# Those that take most of a step; the names of torch's and cuBLAS's kernels are unlike these.
KERNELS = (
    "mlp_forward",
    "activation_grad",
    "toeplitz_forward",
    "toeplitz_backward",
    "taps_grad",
    "add_layer_norm",
    "add_layer_norm_grad",
    "monarch_conv",
    "cyclic_conv",
    "fold",
    "unfold",
    "gates_grad",
    "correlation",
    "taps",
    "layer_grad",
    "filter_weight_grad",
)
OURS = f"regex:^({'|'.join(KERNELS)})_kernel$"
MOST_LAUNCHES = 30
PERCENT = ".avg.pct_of_peak_sustained_"
# What is written of a launch, by ncu's names; those that a GPU does not have are left out.
METRICS = {
    "ms": ("gpu__time_duration.sum",),
    "dram": (
        f"gpu__dram_throughput{PERCENT}elapsed",
        f"dram__throughput{PERCENT}elapsed",
    ),
    "l2": (f"lts__t_sectors{PERCENT}elapsed",),
    "l1": (f"l1tex__throughput{PERCENT}active",),
    "warps": (f"sm__warps_active{PERCENT}active",),
    "registers": ("launch__registers_per_thread",),
}
STALL = "smsp__average_warps_issue_stalled_"
NANOSECONDS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0}


def step(length: int) -> None:
    """Run a training step of one layer; ncu sees the last of three."""
    SCALES["layer"] = {"m2_bert": SCALES["base"]["m2_bert"] | {"num_hidden_layers": 1}}
    run = setup("m2_bert", "layer", length, TOKENS // length, "step", "cuda", None)
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def number(text: str) -> float:
    return float(text.replace(",", ""))


def read(table: str, length: int) -> list[dict[str, Any]]:
    """Return one row for each launch in what ncu prints as CSV."""
    lines = table.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    units, *launches = csv.DictReader(lines[first:])
    rows = []
    for launch in launches:
        row: dict[str, Any] = {"length": length, "kernel": launch["Kernel Name"].split("(")[0]}
        for name, columns in METRICS.items():
            column = next((c for c in columns if launch.get(c)), None)
            if column is not None:
                row[name] = number(launch[column])
                if name == "ms":
                    row[name] *= NANOSECONDS[units[column]]
        stalls = {
            name.removeprefix(STALL).split("_per_issue_active")[0]: number(value)
            for name, value in launch.items()
            if name.startswith(STALL) and "per_issue_active" in name and value
        }
        # Warps that wait for their turn are there to spare: no reason to be slow.
        waits = {k: v for k, v in stalls.items() if k not in ("selected", "not_selected")}
        if waits:
            row["waits"] = dict(sorted(waits.items(), key=lambda item: -item[1])[:3])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--step", type=int, help="run under ncu: one step at this length")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.step:
        step(args.step)
        return
    if shutil.which("ncu") is None:
        sys.exit("ncu (Nsight Compute) is not installed")
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "benchmark": "counters",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "rows": [],
    }
    for length in args.lengths:
        command = ["ncu", "--csv", "--page=raw", "--profile-from-start=off"]
        command += ["--clock-control=none", f"--kernel-name={OURS}"]
        command += [f"--launch-count={MOST_LAUNCHES}", *(f"--section={s}" for s in SECTIONS)]
        command += [sys.executable, __file__, "--step", str(length)]
        env = os.environ | {"M2_PLUGIN_AUTOTUNE": os.environ.get("M2_PLUGIN_AUTOTUNE", "0")}
        lines = []
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as ncu:
            assert ncu.stdout is not None
            for line in ncu.stdout:
                lines.append(line)
                if line.startswith("=="):  # what it does now
                    print(line, end="", flush=True)
        if ncu.returncode:
            sys.exit("".join(["ncu failed:\n", *lines[-20:]]))
        rows = read("".join(lines), length)
        print("".join(lines), *rows, sep="\n", flush=True)
        report["rows"] += rows
        path = args.out / "counters_cuda.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
