"""Run all that needs a GPU: the benchmarks of the model, the ops and training, and the tests.

    python tests/benchmarks/gpu.py                       # all, in eight minutes at most
    python tests/benchmarks/gpu.py --only ops model      # parts
    python tests/benchmarks/gpu.py --only ops --scale 3  # in three times the time

Needs torch, Triton and transformers; this package need not be installed. pytest, pytest-xdist and
ncu are used if they are there. Training runs if llm-foundry can be imported and this package's
entry points are installed, or both lie in the folder `--site` (from `pip install --target`); the
other parts do not see that folder. Each part is a process with a time limit. If a part fails, the
rest still runs, and the exit code is 1.

JSON, a picture and logs.tar.gz go to $OUT (default tests/benchmarks/results); the end of each log
is shown.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BENCHMARKS = Path(__file__).parent
TAIL_LINES = 25
# What each part may take. A benchmark stops by itself a little before, and has written what it
# measured; the rows that the targets name come first.
SECONDS = {
    "compile": 85,
    "doctor": 25,
    "model": 100,
    "profile": 40,
    "ops": 45,
    "training": 65,
    "counters": 45,
    "tests": 95,
}
LAST_ROW_S = 20  # a row that has begun may take so long
TRAINING_S = 16  # of each of two models, beside 20 s of imports and the conversion of the text
MOST_WORKERS = 12  # of pytest-xdist: beyond, the GPU is what they wait for
# Those of the tables; the others of bench_model.py are for questions that are asked by hand.
PROVIDERS = ("m2_bert", "bert_sdpa", "modernbert_sdpa")
LENGTHS = ("128", "512", "2048", "8192", "32768", "1024", "4096", "16384")


def there(module: str, site: Path | None = None) -> bool:
    """Whether a package can be imported, here or from a folder."""
    return importlib.util.find_spec(module) is not None or bool(site and (site / module).is_dir())


def parts(out: Path, device: str, scale: float, site: Path | None) -> dict[str, list[str]]:
    """The command of each part; none where what it needs is not there."""
    python = sys.executable
    limits = {name: str(max(1.0, s * scale - LAST_ROW_S)) for name, s in SECONDS.items()}
    target = ["--device", device, "--out", str(out)]
    commands = {"doctor": [python, "-m", "m2_plugin.cli", "doctor"]}
    model = [python, str(BENCHMARKS / "bench_model.py")]
    if device == "cuda":
        # One length on each core, once, so that the next parts find all compiled. Beside it the
        # doctor compares the kernels, whose verdicts are kept; its processes take the other cores.
        # Times taken now are not kept.
        once = [*model, "--device", device, "--providers", "m2_bert", "--repeats", "1", "--out"]
        scratch = 'M2_PLUGIN_KERNEL_CHECK=0 M2_PLUGIN_CACHE="$SCRATCH"'
        each = [f'{scratch} {shlex.join(once)} "$SCRATCH/{n}" --lengths {n}' for n in LENGTHS]
        each.append(f"LOCAL_WORLD_SIZE=2 {shlex.join(commands['doctor'])}")
        commands["compile"] = ["bash", "-c", " & ".join(each) + " & wait"]
    commands["model"] = [*model, *target]
    commands["model"] += ["--limit", limits["model"], "--row-seconds", str(1.5 * scale)]
    if device == "cuda":
        commands["profile"] = [python, str(BENCHMARKS / "bench_profile.py"), "--out", str(out)]
    commands["ops"] = [python, str(BENCHMARKS / "bench_ops.py"), *target, "--limit", limits["ops"]]
    training = [python, str(BENCHMARKS / "bench_training.py"), *target]
    if device == "cpu":  # to try this script: the smallest sizes
        commands["ops"] += ["--lengths", "128", "--tokens", "256", "--hidden-size", "64"]
        commands["ops"] += ["--repeats", "2"]
        commands["model"] += ["--scales", "quickstart", "--lengths", "128", "--repeats", "2"]
        training += ["--seconds", "1"]
    else:
        commands["model"] += ["--providers", *PROVIDERS]
        commands["ops"] += ["--lengths", *LENGTHS, "--repeats", "10", "--compiled"]
        training += ["--seconds", str(TRAINING_S * scale)]
    if there("llmfoundry", site):
        commands["training"] = training
    if there("pytest"):
        # With the names of all tests: the log of a part that is stopped has no summary.
        options = ["-v", "--maxfail=20", "--tb=short", "-p", "no:cacheprovider"]
        if there("xdist"):  # what takes the time is compilation, one core for each worker
            options += ["-n", str(max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2)))]
        # Compilation ahead of time needs no GPU, and minutes.
        ahead = ("test_kernels_compile.py", "test_emulation.py")
        options += [f"--deselect=tests/ops/{name}" for name in ahead]
        if not there("pytest_timeout"):
            options += ["-o", "addopts=--import-mode=importlib"]
        commands["tests"] = [python, "-m", "pytest", *options, "tests/ops", "tests/layers"]
    if shutil.which("ncu") and device == "cuda":
        commands["counters"] = [python, str(BENCHMARKS / "bench_counters.py"), "--out", str(out)]
    return commands


def environment(name: str, scratch: Path, site: Path | None) -> dict[str, str]:
    """The variables of a part's process."""
    folders = [str(ROOT), *([str(site)] if site and name == "training" else [])]
    if others := os.environ.get("PYTHONPATH"):
        folders.append(others)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "compile":
        env["SCRATCH"] = str(scratch / "compiled")
    elif name == "tests":  # many time on one GPU: not to be kept
        env["M2_PLUGIN_CACHE"] = str(scratch / "choices")
        env["CUDA_LAUNCH_BLOCKING"] = "1"  # a launch that fails, fails in its own test
    elif name != "doctor":  # which has compared the kernels
        env["M2_PLUGIN_KERNEL_CHECK"] = "0"
    if name in ("compile", "tests"):  # a process on each core: they shall not start others
        env["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
    if name == "training":  # one process: no network is needed
        env |= {"USE_TF": "0", "USE_FLAX": "0"}
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return env


def run(name: str, command: list[str], env: dict[str, str], path: Path, limit: float) -> str:
    """Runs one part, writes its log, and says how it ended."""
    begin = time.monotonic()
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


def count_tests(log: str) -> dict[str, Any]:
    """Count how tests ended from the log of pytest-xdist; that of a stopped part has no summary."""
    found = re.search(r"workers \[(\d+) items?\]", log)
    ends = re.findall(r"(?m)^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.+?) *$", log)
    names = {end: sorted({test for e, test in ends if e == end}) for end in ("FAILED", "ERROR")}
    return {
        "collected": int(found[1]) if found else len(ends),
        "passed": sum(end == "PASSED" for end, _ in ends),
        "skipped": sum(end == "SKIPPED" for end, _ in ends),
        "failed": names["FAILED"],
        "errors": names["ERROR"],
    }


def write_tests(log: Path, out: Path, device: str) -> None:
    """Write `tests_<device>.json` from the log of the tests."""
    name = device
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    report = {"benchmark": "tests", "date": datetime.date.today().isoformat(), "device": name}
    report |= {package: importlib.metadata.version(package) for package in ("torch", "triton")}
    report |= count_tests(log.read_text(errors="replace"))
    (out / f"tests_{device}.json").write_text(json.dumps(report, indent=1) + "\n")


def pack(logs: Path, archive: Path) -> None:
    """Put all logs into one file, which replaces that of an earlier run."""
    whole = archive.with_suffix(".tmp")
    with tarfile.open(whole, "w:gz") as tar:
        for path in sorted(logs.glob("*.log")):
            tar.add(path, arcname=path.name)
    whole.replace(archive)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the time limits")
    parser.add_argument("--site", type=Path, help="a folder with llm-foundry, for training")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", BENCHMARKS / "results")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = args.site.resolve() if args.site else None
    commands = parts(out, args.device, args.scale, site)
    missing = {"tests": "no pytest", "counters": "no ncu", "training": "no llm-foundry"}
    missing |= dict.fromkeys(("compile", "profile"), "no GPU")
    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in args.only:
            if name not in commands:
                ends[name] = f"left out: {missing[name]}"
                continue
            env, log = environment(name, scratch, site), scratch / f"{name}.log"
            ends[name] = run(name, commands[name], env, log, SECONDS[name] * args.scale)
            if name == "tests":
                write_tests(log, out, args.device)
            pack(scratch, out / "logs.tar.gz")
    print("\n" + "\n".join(f"{name:<10}{end}" for name, end in ends.items()))
    return 0 if all(end.startswith(("done", "left out")) for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
