"""Run all that needs a GPU: tests, doctor, and the benchmarks of the ops and the model.

    python tests/benchmarks/gpu.py                       # all, within ten minutes
    python tests/benchmarks/gpu.py --only ops model      # parts
    python tests/benchmarks/gpu.py --only ops --scale 3  # in three times the time

Needs torch, Triton and transformers; neither this package nor llm-foundry has to be installed.
pytest and ncu are used if they are there. Each part is a process with a time limit. If a part
fails, the rest still runs, and the exit code is 1. Logs and JSON go to $OUT (default
tests/benchmarks/results); the end of each log is shown.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = Path(__file__).parent
TAIL_LINES = 60
# What each part may take, of 9.5 minutes in all. A benchmark stops by itself a little before, and
# has written what it measured.
SECONDS = {"doctor": 60, "ops": 160, "model": 210, "tests": 100, "counters": 40}
LAST_ROW_S = 35  # a row that has begun may take so long
# Multiprocessor and memory rates of our kernels' launches.
NCU = [
    "env",
    "M2_PLUGIN_AUTOTUNE=0",
    "ncu",
    "--section=SpeedOfLight",
    "--section=MemoryWorkloadAnalysis",
    "--section=Occupancy",
    "--kernel-name=regex:product|weight_grad|mlp_forward|activation_grad|toeplitz|monarch|conv",
    "--launch-count=16",
]


def parts(out: Path, device: str, scale: float) -> dict[str, list[str]]:
    """The command of each part; none where what it needs is not there."""
    python = sys.executable
    limits = {name: str(max(1.0, s * scale - LAST_ROW_S)) for name, s in SECONDS.items()}
    target = ["--device", device, "--out", str(out)]
    commands = {"doctor": [python, "-m", "m2_plugin.cli", "doctor"]}
    if importlib.util.find_spec("pytest"):
        options = ["-q", "--maxfail=20", "-p", "no:cacheprovider"]
        # Compilation ahead of time needs no GPU, and minutes.
        options += ["--deselect=tests/ops/test_kernels_compile.py"]
        if not importlib.util.find_spec("pytest_timeout"):
            options += ["-o", "addopts=--import-mode=importlib"]
        commands["tests"] = [python, "-m", "pytest", *options, "tests/ops", "tests/layers"]
    commands["ops"] = [python, str(BENCHMARKS / "bench_ops.py"), *target, "--limit", limits["ops"]]
    commands["model"] = [python, str(BENCHMARKS / "bench_model.py"), *target]
    commands["model"] += ["--limit", limits["model"], "--row-seconds", "4"]
    if device == "cpu":  # to try this script: the smallest sizes
        commands["ops"] += ["--lengths", "128", "--tokens", "256", "--hidden-size", "64"]
        commands["ops"] += ["--repeats", "2"]
        commands["model"] += ["--scales", "quickstart", "--lengths", "128", "--repeats", "2"]
    if shutil.which("ncu") and device == "cuda":
        commands["counters"] = [*NCU, *commands["doctor"]]
    return commands


def run(name: str, command: list[str], out: Path, limit: float) -> str:
    """Runs one part, writes its log, and says how it ended."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    path, begin = out / f"{name}.log", time.monotonic()
    with path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            end = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"stopped after {limit:.0f} s"
    lines = path.read_text(errors="replace").splitlines()
    print(f"\n=== {name} ===", *lines[-TAIL_LINES:], sep="\n", flush=True)
    return f"{end}, {time.monotonic() - begin:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the time limits")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", BENCHMARKS / "results")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    commands = parts(out, args.device, args.scale)
    ends = {}
    for name in args.only:
        if name in commands:
            ends[name] = run(name, commands[name], out, SECONDS[name] * args.scale)
        else:
            ends[name] = "left out: " + ("no pytest" if name == "tests" else "no ncu")
    print("\n" + "\n".join(f"{name:<10}{end}" for name, end in ends.items()))
    return 0 if all(end.startswith(("done", "left out")) for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
