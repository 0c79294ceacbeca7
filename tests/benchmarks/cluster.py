# ruff: noqa: T201
"""Run commands here, on a Dask cluster, and on one that loses a worker; compare what they write.

    python tests/benchmarks/cluster.py CORPUS.jsonl [--out FILE.json]

The commands: convert the corpus as text and as tokens, embed 20,000 of its texts, and a GLUE sweep
of four jobs with a tiny model. The cluster is a scheduler and two workers on this machine. In the
third run one of them is killed by SIGKILL as soon as `KILL_AFTER` tasks have left their results.
Those results must survive: a worker that repeats them would replace their files.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
BIN = Path(sys.executable).parent
TOKENIZER = ROOT / "data_prep" / "quickstart" / "tokenizer"
GLUE = ROOT / "tests" / "foundry" / "data" / "glue"
TEXTS = 20_000
KILL_AFTER = 2
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
# Times, folders and process numbers are in these.
NOT_COMPARED = ("log.txt", "job.yaml", "sweep.yaml", "report", "result.json", "events")


@dataclass(frozen=True)
class Command:
    """A command, without --cluster; what it writes; and a pattern of what its tasks leave."""

    name: str
    arguments: Callable[[Path], list[str]]
    here: list[str]  # the options for two processes of this machine
    left: str


def commands(corpus: Path, work: Path) -> list[Command]:
    def convert(*options: str) -> Callable[[Path], list[str]]:
        common = ["convert-text", "--splits", "train", "--local_files", str(corpus), *options]
        return lambda out: [*common, "--out_root", str(out)]

    def embed(out: Path) -> list[str]:
        model, vectors = str(work / "model"), str(out / "vectors.npy")
        return ["embed", str(work / "texts.txt"), "--model", model, "--out", vectors]

    def glue(out: Path) -> list[str]:
        sizes = [f"model.config_overrides.{key}={value}" for key, value in TINY.items()]
        seeds = [f"tasks.{task}.seeds=[7]" for task in ("mnli", "cola", "sst2", "rte")]
        short = [f"tasks.{task}.max_duration=1ep" for task in ("mnli", "cola", "sst2", "rte")]
        config = str(ROOT / "yamls" / "finetune" / "glue" / "sweep-m2-bert-base.yaml")
        tasks = ["--tasks", "mnli", "cola", "sst2", "rte"]
        data = [f"variables.glue_path={GLUE}", f"variables.tokenizer={TOKENIZER}"]
        return ["glue", "--config", config, "--out", str(out), *tasks, "model.pretrained=false",
                *sizes, *seeds, *short, *data]  # fmt: skip

    tokens = ("--concat_tokens", "128", "--tokenizer", str(TOKENIZER))
    records = ".train.partial/records-*/0*.json"
    return [
        Command("convert, text", convert(), ["--num_workers", "2"], records),
        Command("convert, tokens", convert(*tokens), ["--num_workers", "2"], records),
        Command("embed", embed, ["--num-workers", "2"], ".vectors.npy.partial/*/[0-9]*"),
        Command("glue, 4 jobs", glue, ["--jobs", "2"], "*/result.json"),
    ]


def inputs(corpus: Path, work: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from m2_plugin.models import M2BertConfig, M2BertForTextEmbedding

    torch.manual_seed(0)
    config = M2BertConfig(**SIZES, mask_padding=True)
    M2BertForTextEmbedding(config).save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(work / "model")
    with corpus.open() as lines, (work / "texts.txt").open("w") as texts:
        count = 0
        for line in lines:
            for text in json.loads(line)["text"].splitlines():
                if len(text) > 40 and count < TEXTS:
                    texts.write(text + "\n")
                    count += 1
    assert count == TEXTS


def new(work: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=work))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that must not depend on where the command ran."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not path.name.startswith(NOT_COMPARED):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(out: Path, command: Command) -> dict[str, tuple[int, int]]:
    """Number and time of each file that a finished task has left."""
    found = {}
    for path in out.glob(command.left):
        try:
            found[path.name + path.parent.name] = path.stat().st_ino, path.stat().st_mtime_ns
        except FileNotFoundError:
            continue  # the command has just ended
    return found


def run(command: Command, out: Path, work: Path, options: list[str], kill: Any = None) -> float:
    """Run a command to its end; return its seconds."""
    out.mkdir()
    began = time.monotonic()
    arguments = [str(BIN / "m2-plugin"), *command.arguments(out), *options]
    with (work / "commands.log").open("a") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT)
        if kill is not None:
            kill(out, process)
        if process.wait():
            raise RuntimeError(f"failed: {' '.join(arguments)}; see {log.name}")
    return time.monotonic() - began


def check(command: Command, work: Path) -> dict[str, Any]:
    from tests.cluster import dask_cluster

    name = command.name.replace(", ", "-").replace(" ", "-")
    here, there, broken = (work / f"{name}-{run}" for run in ("here", "there", "broken"))
    seconds = {"here": run(command, here, work, command.here)}
    with dask_cluster(new(work)) as (file, _):
        seconds["cluster"] = run(command, there, work, ["--cluster", str(file)])
    before: dict[str, tuple[int, int]] = {}
    after: dict[str, tuple[int, int]] = {}
    with dask_cluster(new(work)) as (file, workers):

        def kill(out: Path, process: subprocess.Popen[bytes]) -> None:
            while len(found := stamps(out, command)) < KILL_AFTER:
                assert process.poll() is None, "it ended before a worker could be killed"
                time.sleep(0.02)
            workers[0].send_signal(signal.SIGKILL)
            before.update(found)
            while process.poll() is None:
                after.update(stamps(out, command))
                time.sleep(0.02)

        seconds["a worker killed"] = run(command, broken, work, ["--cluster", str(file)], kill)
    expected = digests(here)
    for found in (digests(there), digests(broken)):
        different = [name for name in expected | found if expected.get(name) != found.get(name)]
        if different:
            print("different:", ", ".join(different))
    return {
        "files": len(expected),
        "same on the cluster": digests(there) == expected,
        "same with a worker killed": digests(broken) == expected,
        "finished before the kill": len(before),
        "repeated": sum(after[key] != value for key, value in before.items()),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("corpus", type=Path, help="a JSON Lines file with the column `text`")
    parser.add_argument("--only", help="the commands whose name begins so")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    corpus, found = args.corpus.resolve(), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        inputs(corpus, work)
        for command in commands(corpus, work):
            if command.name.startswith(args.only or ""):
                found[command.name] = check(command, work)
                print(command.name, json.dumps(found[command.name]), flush=True)
    if args.out is not None:
        from m2_plugin.files import write_json

        size = {"corpus_bytes": corpus.stat().st_size, "texts": TEXTS, "killed_after": KILL_AFTER}
        write_json(args.out, {"date": time.strftime("%Y-%m-%d"), **size, "commands": found})
    good = ("same on the cluster", "same with a worker killed")
    return int(any(not all(row[key] for key in good) or row["repeated"] for row in found.values()))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    sys.exit(main())
