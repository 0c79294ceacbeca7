# ruff: noqa: T201
"""Conversion to MDS: ours with one and two workers, and llm-foundry's converter.

    python tests/benchmarks/bench_conversion.py CORPUS.jsonl [--repetitions 3]

Every run is a process of its own, as a user's is. `start` is the time before the first document
(interpreter, imports, workers), `convert` is the rest. Contenders take turns, so that a busy
machine slows all of them; `others` is the share of the cores that other processes used during the
run.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "data_prep" / "quickstart" / "tokenizer"
LENGTH = 128
CONTENDERS = ("ours, 1 worker", "ours, 2 workers", "llm-foundry")


# --- one run, in a process of its own ---


def run_ours(corpus: Path, out: Path, mode: str, workers: int) -> dict[str, float]:
    from m2_plugin.executor import open_workers
    from m2_plugin.foundry.conversion import Job, Recipe, convert
    from m2_plugin.foundry.conversion.sources import choose_block_bytes, input_files
    from m2_plugin.foundry.conversion.worker import check_recipe

    tokens: dict[str, Any] = {}
    modules = []
    if mode == "tokens":
        tokens = {"tokenizer": str(TOKENIZER), "concat_tokens": LENGTH}
        modules = ["transformers.models.auto.tokenization_auto"]
    files = input_files([str(corpus)])
    block_bytes = choose_block_bytes(corpus.stat().st_size, tokens.get("concat_tokens"))
    job = Job(out / "train", files=tuple(files), recipe=Recipe(block_bytes=block_bytes, **tokens))
    with open_workers(workers, preload=modules) as pool:
        list(pool.run(check_recipe, [job.recipe] * workers))  # each worker starts
        began = time.time()
        samples = convert(job, pool)
    return {"began": began, "samples": samples}


def run_llm_foundry(corpus: Path, out: Path, mode: str) -> dict[str, float]:
    import llmfoundry.command_utils  # noqa: F401

    module = sys.modules["llmfoundry.command_utils.data_prep.convert_dataset_json"]
    began = time.time()
    length, tokenizer = (LENGTH, str(TOKENIZER)) if mode == "tokens" else (None, None)
    module.convert_dataset_json(str(corpus), str(out), None, length, "train", tokenizer=tokenizer)
    index = json.loads((out / "index.json").read_text())
    return {"began": began, "samples": sum(shard["samples"] for shard in index["shards"])}


def child(contender: str, corpus: Path, out: Path, mode: str) -> None:
    if contender == "llm-foundry":
        result = run_llm_foundry(corpus, out, mode)
    else:
        result = run_ours(corpus, out, mode, int(contender.split()[1]))
    result["ended"] = time.time()
    (out / "result.json").write_text(json.dumps(result))


# --- measuring it ---


def tree(process: psutil.Process, seconds: dict[int, float], memory: bool) -> float:
    """Note the CPU seconds of a process and its descendants; return their MB.

    Workers are children of a server of processes, so nobody waits for them and sums their times.
    Shared pages count once (PSS).
    """
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        try:
            times = member.cpu_times()
            seconds[member.pid] = times.user + times.system
            total += member.memory_full_info().pss / 1e6 if memory else 0
        except psutil.Error:
            continue
    return total


def wait_until_quiet(seconds: float) -> None:
    """Wait, at most so long, for a moment in which nobody else works on the machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and psutil.cpu_percent(interval=1.0) > 10:
        pass


def measure(contender: str, corpus: Path, mode: str, memory: bool = False) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        # llm-foundry copies its input into the cache of `datasets` first: start without a cache.
        environment = dict(os.environ, HF_DATASETS_CACHE=f"{scratch}/cache")
        command = [sys.executable, __file__, str(corpus), "--child", contender, mode, str(out)]
        machine, began, peak = psutil.cpu_times(), time.time(), 0.0
        seconds: dict[int, float] = {}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            try:
                peak = max(peak, tree(psutil.Process(process.pid), seconds, memory))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
        if process.wait():
            raise RuntimeError(f"failed: {command}")
        wall, own = time.time() - began, sum(seconds.values())
        busy = sum(psutil.cpu_times()[:3]) - sum(machine[:3])
        result = json.loads((out / "result.json").read_text())
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {
        "start_s": result["began"] - began,
        "convert_s": result["ended"] - result["began"],
        "cpu_s": own,
        "others": max(0.0, busy - own) / wall / (os.cpu_count() or 1),
        "peak_mb": peak,
        "samples": result["samples"],
        "output_mb": size / 1e6,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    result: dict[str, Any] = {"repetitions": len(runs)}
    for key in runs[0]:
        values = [round(run[key], 3) for run in runs]
        result[key] = statistics.median(values)
        result[f"{key}_range"] = [min(values), max(values)]
    return result


def times(corpus: Path, modes: list[str], repetitions: int, patience: float) -> dict[str, Any]:
    results = {}
    for mode in modes:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(repetitions):
            for name in CONTENDERS:
                wait_until_quiet(patience)
                runs[name].append(measure(name, corpus, mode))
        results[mode] = {name: summary(runs[name]) for name in CONTENDERS}
        ours, theirs = (results[mode][name]["samples"] for name in CONTENDERS[1:])
        # Each of our blocks drops what is left after its last sample of tokens.
        assert 0 <= theirs - ours < 0.001 * theirs
        show(mode, results[mode], corpus)
    return results


def show(mode: str, results: dict[str, Any], corpus: Path) -> None:
    megabytes = corpus.stat().st_size / 1e6
    print(f"\n{mode}: {megabytes:.0f} MB, {results[CONTENDERS[0]]['samples']:.0f} samples")
    print(
        f"{'':18}{'convert s':>10}{'range':>16}{'MB/s':>8}{'start s':>9}{'cpu s':>8}{'others':>8}"
    )
    for name, r in results.items():
        low, high = r["convert_s_range"]
        rate = megabytes / r["convert_s"]
        print(
            f"{name:18}{r['convert_s']:10.2f}{low:9.2f}-{high:6.2f}{rate:8.1f}"
            f"{r['start_s']:9.2f}{r['cpu_s']:8.1f}{r['others']:8.0%}"
        )
    one, two, theirs = (results[name]["convert_s"] for name in CONTENDERS)
    print(f"two workers over one: {one / two:.2f}x; over llm-foundry: {theirs / one:.2f}x with one")


def memory_use(corpus: Path, modes: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for times_over in (1, 2, 4):
        with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
            larger = Path(scratch) / "corpus.jsonl"
            with larger.open("wb") as file:
                for _ in range(times_over):
                    with corpus.open("rb") as source:
                        shutil.copyfileobj(source, file)
            for mode in modes:
                peak = measure("ours, 2 workers", larger, mode, memory=True)["peak_mb"]
                results.setdefault(mode, {})[f"{times_over}x"] = round(peak, 1)
    print(f"\npeak memory of the process tree, two workers, MB (PSS): {json.dumps(results)}")
    return results


def versions() -> dict[str, str]:
    names = ("llm-foundry", "mosaicml-streaming", "datasets", "tokenizers", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="a .jsonl file with the key text")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["text", "tokens"])
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds to wait for a quiet machine, per run"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--no_memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        contender, mode, out = arguments.child
        return child(contender, arguments.corpus, Path(out), mode)
    megabytes = arguments.corpus.stat().st_size / 1e6
    results = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "corpus": arguments.corpus.name,
        "corpus_mb": megabytes,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions(),
        "sequence_length": LENGTH,
        "times": times(
            arguments.corpus, arguments.modes, arguments.repetitions, arguments.patience
        ),
        "peak_memory_mb_two_workers": None
        if arguments.no_memory
        else memory_use(arguments.corpus, arguments.modes),
    }
    path = (
        Path(__file__).parent
        / "results"
        / f"conversion_{'_'.join(arguments.modes)}_{round(megabytes)}mb.json"
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
