# ruff: noqa: T201
"""Conversion to MDS: ours with one and two workers, and llm-foundry's converter.

    python tests/benchmarks/bench_conversion.py CORPUS.jsonl [--repetitions 3] [--older FOLDER]
    python tests/benchmarks/bench_conversion.py --slice

`--older` adds the converter of another commit, in a `git worktree` of it, with the measurement that
lies there. `--slice` measures what C4 costs, on its sample in data_prep/quickstart, packed as C4 is
and repeated: CPU seconds for a MB of text, and what reading alone takes. Those of a small file are
subtracted from those of a larger one, so that no start is counted.

Every run is a process of its own, as a user's is. `start` is the time before the first document
(interpreter, imports, workers), `convert` is the rest. Contenders take turns, so that a busy
machine slows all of them; `others` is the share of the cores that other processes used during the
run.
"""

import argparse
import gzip
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
OLDER = ("older, 1 worker", "older, 2 workers")
SLICE = ROOT / "data_prep" / "quickstart" / "c4-sample.json.gz"
# Each file is read by one worker, as those of C4 are, if there are 4 or more for each worker.
FILES = 8
COPIES = {"text": (2, 10), "tokens": (1, 3)}  # of the sample, in each file
# C4 en, training split, on the hub.
C4_FILES, C4_GB = 1024, 305


# --- one run, in a process of its own ---


def run_ours(corpus: Path, out: Path, mode: str, workers: int) -> dict[str, float]:
    from m2_plugin.executor import open_workers
    from m2_plugin.foundry.conversion import Job, Recipe, convert, sources
    from m2_plugin.foundry.conversion.sources import choose_block_bytes, input_files
    from m2_plugin.foundry.conversion.worker import check_recipe

    tokens: dict[str, Any] = {}
    modules = []
    if mode == "tokens":
        tokens = {"tokenizer": str(TOKENIZER), "concat_tokens": LENGTH}
        modules = ["transformers.models.auto.tokenization_auto"]
    files = input_files([str(corpus)])
    if corpus.is_dir():  # a slice of C4, whose files are large enough for a stream each
        sources.STREAM_BYTES = 0
    block_bytes = choose_block_bytes(sum(f.text_bytes for f in files), tokens.get("concat_tokens"))
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


def run_reader(corpus: Path) -> dict[str, float]:
    """Decompress and parse the files, and do nothing with the texts."""
    from m2_plugin.data.rows import read_rows

    began = time.time()
    count = sum(1 for path in sorted(corpus.iterdir()) for _ in read_rows(str(path)))
    return {"began": began, "samples": count}


def child(contender: str, corpus: Path, out: Path, mode: str) -> None:
    if contender == "llm-foundry":
        result = run_llm_foundry(corpus, out, mode)
    elif contender == "reading":
        result = run_reader(corpus)
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


def measure(
    contender: str, corpus: Path, mode: str, memory: bool = False, older: Path | None = None
) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        # llm-foundry copies its input into the cache of `datasets` first: start without a cache.
        environment = dict(os.environ, HF_DATASETS_CACHE=f"{scratch}/cache")
        script = Path(__file__)
        name = contender
        if contender in OLDER and older is not None:
            script = older.resolve() / script.relative_to(ROOT)
            name = contender.replace("older", "ours")
            environment["PYTHONPATH"] = str(older.resolve())
        command = [sys.executable, str(script), str(corpus), "--child", name, mode, str(out)]
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
        "whole_s": result["ended"] - began,
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


def times(
    corpus: Path, modes: list[str], repetitions: int, patience: float, older: Path | None
) -> dict[str, Any]:
    results = {}
    contenders = CONTENDERS + (OLDER if older else ())
    for mode in modes:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(repetitions):
            for name in contenders:
                wait_until_quiet(patience)
                runs[name].append(measure(name, corpus, mode, older=older))
        results[mode] = {name: summary(runs[name]) for name in contenders}
        ours, theirs = (results[mode][name]["samples"] for name in CONTENDERS[1:])
        # Each of our blocks drops what is left after its last sample of tokens.
        assert 0 <= theirs - ours < 0.001 * theirs
        show(mode, results[mode], corpus)
    return results


def show(mode: str, results: dict[str, Any], corpus: Path) -> None:
    megabytes = corpus.stat().st_size / 1e6
    print(f"\n{mode}: {megabytes:.0f} MB, {results[CONTENDERS[0]]['samples']:.0f} samples")
    print(
        f"{'':18}{'convert s':>10}{'range':>16}{'MB/s':>8}{'start s':>9}{'whole s':>9}{'cpu s':>8}"
        f"{'others':>8}"
    )
    for name, r in results.items():
        low, high = r["convert_s_range"]
        rate = megabytes / r["convert_s"]
        print(
            f"{name:18}{r['convert_s']:10.2f}{low:9.2f}-{high:6.2f}{rate:8.1f}"
            f"{r['start_s']:9.2f}{r['whole_s']:9.2f}{r['cpu_s']:8.1f}{r['others']:8.0%}"
        )
    one, two, theirs = (results[name]["convert_s"] for name in CONTENDERS)
    print(f"two workers over one: {one / two:.2f}x; over llm-foundry: {theirs / one:.2f}x with one")
    for name in set(OLDER) & results.keys():
        ours = results[name.replace("older", "ours")]
        print(
            f"speed over {name}: {results[name]['whole_s'] / ours['whole_s']:.2f}x, start included"
        )


# --- a slice of C4 ---


def packed_files(folder: Path, copies: int) -> Path:
    """Write files of the sample, each so many times over."""
    folder.mkdir()
    for i in range(FILES):
        (folder / f"c4-train.{i:05}-of-{FILES:05}.json.gz").write_bytes(SLICE.read_bytes() * copies)
    return folder


def slice_cost(repetitions: int) -> dict[str, Any]:
    """Measure the CPU seconds of converting a slice of C4; the rest is arithmetic."""
    packed_mb = FILES * SLICE.stat().st_size / 1e6
    with gzip.open(SLICE) as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    text_mb = FILES * sum(map(len, texts)) / 1e6
    result: dict[str, Any] = {"text_mb_per_packed_mb": text_mb / packed_mb, "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for mode, copies in COPIES.items():
            small, large = (packed_files(Path(scratch) / f"{mode}{n}", n) for n in copies)
            names = ("ours, 1 worker", "ours, 2 workers", *(["reading"] if mode == "text" else []))
            for name in names * repetitions:
                runs = [measure(name, corpus, mode) for corpus in (small, large)]
                more = copies[1] - copies[0]
                written = (runs[1]["output_mb"] - runs[0]["output_mb"]) / (more * text_mb)
                one = {
                    "cpu_s_per_text_mb": (runs[1]["cpu_s"] - runs[0]["cpu_s"]) / (more * text_mb),
                    "written_mb_per_text_mb": written,
                    "others": runs[1]["others"],
                }
                print(mode, name, one, flush=True)
                result["runs"].setdefault(f"{mode}, {name}", []).append(one)
            shutil.rmtree(small)
            shutil.rmtree(large)
    return summarised(result)


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """Add the medians of the runs, and the arithmetic for all of C4."""
    result["medians"] = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in result["runs"].items()
    }
    result["c4_arithmetic"] = {
        mode: c4_arithmetic(result, result["medians"][f"{mode}, ours, 1 worker"]) for mode in COPIES
    }
    return result


def c4_arithmetic(result: dict[str, Any], cost: dict[str, float]) -> dict[str, float]:
    """Compute, not measure, what C4 en takes: MB of text, times CPU seconds for each, over cores.

    16 machines of 64 cores are as many as C4 has files; then 4 tasks read each file.
    """
    text_mb = C4_GB * 1000 * result["text_mb_per_packed_mb"]
    cpu_s, written = cost["cpu_s_per_text_mb"], cost["written_mb_per_text_mb"]
    reading = result["medians"]["text, reading"]["cpu_s_per_text_mb"]
    return {
        "text_gb": text_mb / 1000,
        "written_gb": text_mb * written / 1000,
        "core_hours": text_mb * cpu_s / 3600,
        "minutes_a_file": text_mb / C4_FILES * cpu_s / 60,
        "hours_64_cores": text_mb * cpu_s / 3600 / 64,
        "hours_1024_cores": text_mb * (cpu_s + 3 * reading) / 3600 / 1024,
        "written_mb_per_s_64_cores": 64 * written / cpu_s,
    }


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
    parser.add_argument("corpus", type=Path, nargs="?", help="a .jsonl file with the key text")
    parser.add_argument("--older", type=Path, metavar="FOLDER", help="a worktree of another commit")
    parser.add_argument("--slice", action="store_true", help="what C4 costs")
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
    about = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions(),
        "sequence_length": LENGTH,
    }
    if arguments.slice:
        return save("conversion_slice", about | slice_cost(arguments.repetitions))
    if arguments.corpus is None:
        parser.error("give a CORPUS, or --slice")
    megabytes = arguments.corpus.stat().st_size / 1e6
    results = about | {
        "corpus": arguments.corpus.name,
        "corpus_mb": megabytes,
        "times": times(
            arguments.corpus,
            arguments.modes,
            arguments.repetitions,
            arguments.patience,
            arguments.older,
        ),
        "peak_memory_mb_two_workers": None
        if arguments.no_memory
        else memory_use(arguments.corpus, arguments.modes),
    }
    return save("conversion", results)


def save(name: str, results: dict[str, Any]) -> None:
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
