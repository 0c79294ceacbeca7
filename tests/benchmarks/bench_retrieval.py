# ruff: noqa: T201
"""The small retrieval recipe on held-out pairs of real text, and what each of its choices changes.

    make quickstart
    python tests/benchmarks/bench_retrieval.py --wikipedia enwiki_sample.jsonl.xz

trains by `yamls/finetune/retrieval/m2-bert-quickstart.yaml`, each run on one core, and ranks for
each query of a test split all its passages by `m2-plugin retrieval`: nDCG@10, with BM25's. A query
is a piece of text of 300 characters and more, its passage the piece after it. The sets of pairs:
the quickstart's, whose test split is of web pages of C4; the same without the novels; and the first
two pieces of articles of Wikipedia (--wikipedia: JSON lines with `title` and `text`).

On Wikipedia, whose test split is the largest, the recipe runs again for a third of the batches,
as it is and with one choice changed. One is to start from the quickstart's model, which is
pretrained on the novels. Two are of the pairs to train on: a negative mined by BM25 for each, and
as many pairs more, of a title and the first piece. What is finished below --out is not run again.
"""

import argparse
import datetime
import hashlib
import json
import lzma
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import OmegaConf
from report import main as write_tables

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "results" / "retrieval.json"
YAML = ROOT / "yamls/finetune/retrieval/m2-bert-quickstart.yaml"
PAIRS = ROOT / "data_prep" / "quickstart" / "pairs.py"
BIN = Path(sys.executable).parent
WIKIPEDIA = {"val": 600, "test": 1000, "train": 20_000}  # articles, at most
MEASURE, TOP = "nDCG@10", 10
SHORT = 3  # a changed recipe has so many times fewer batches
SMALL_BATCH = 32


# --- pairs ---


def write_wikipedia(source: Path, out: Path) -> None:
    """The first two pieces of articles, the title's own line left out."""
    if (out / "train.jsonl").exists():
        return
    pieces = runpy.run_path(str(PAIRS))["pieces"]
    with lzma.open(source, "rt", encoding="utf-8") as file:
        articles = {row["title"]: row["text"].partition("\n")[2] for row in map(json.loads, file)}
    titles = iter(sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest()))
    out.mkdir(parents=True, exist_ok=True)
    for split, count in WIKIPEDIA.items():
        rows, titled = [], []
        while len(rows) < count and (title := next(titles, None)):
            first = list(islice(pieces(articles[title]), 2))
            if len(first) == 2:
                rows.append({"query": first[0], "passage": first[1]})
                titled.append({"query": title, "passage": first[0]})
        write(out / f"{split}.jsonl", rows)
        if split == "train":
            write(out / "train, titles.jsonl", rows + titled)
    mine = [sys.executable, "data_prep/mine_negatives.py", "--num_negatives", "1"]
    run(*mine, "--pairs", out / "train.jsonl", "--out", out / "train, negatives.jsonl")


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def leave_out_novels(quickstart: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(quickstart.glob("*.jsonl")):
        with file.open() as lines:
            pages = [line for line in lines if json.loads(line)["source"].startswith("http")]
        (out / file.name).write_text("".join(pages))


def run(*command: object) -> float:
    """Run a command on one core; returns its minutes of CPU, which other programs do not change."""
    words = [str(part) for part in command]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return (used.ru_utime + used.ru_stime) / 60


# --- changes of the recipe ---


def pretrained(start: Path) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "hyena_filter_order")
        for key in (*sizes, "use_positional_encodings"):
            del config.model.config_overrides[key]
        for key in ("max_position_embeddings", "long_conv_l_max"):
            del config.model.config_overrides[key]  # those of the model
        config.model.pretrained = True
        config.model.pretrained_model_name_or_path = str(start)

    return change


def overrides(**values: Any) -> Callable[[Any], None]:
    return lambda config: config.model.config_overrides.update(values)


def small_batches(config: Any) -> None:
    """As many pairs, in batches of 32."""
    ratio = config.global_train_batch_size // SMALL_BATCH
    config.global_train_batch_size = config.device_train_microbatch_size = SMALL_BATCH
    config.max_duration = f"{int(config.max_duration.removesuffix('ba')) * ratio}ba"


def other_pairs(data: Path, which: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        config.train_loader.dataset.local = str(data / f"mds, {which}")

    return change


def changes(start: Path, data: Path) -> dict[str, Callable[[Any], None]]:
    return {
        "recipe": lambda config: None,
        "quickstart's model": pretrained(start),
        "width 128": overrides(hidden_size=128),
        "two layers": overrides(num_hidden_layers=2),
        "batches of 32": small_batches,
        "a mined negative for each": other_pairs(data, "negatives"),
        "titles as queries, too": other_pairs(data, "titles"),
    }


# --- runs ---


def train(data: Path, name: str, change: Callable[[Any], None], shorter: bool) -> dict[str, float]:
    """Train on the pairs through the launcher and measure; returns the scores and minutes."""
    out = data / "runs" / f"{name}{', short' if shorter else ''}"
    record = out / "record.json"
    if record.exists():
        return json.loads(record.read_text())
    config: Any = OmegaConf.load(YAML)
    config.variables.out = str(out)
    for loader in (config.train_loader, config.eval_loader):
        loader.dataset.local = str(data / "mds")
    if shorter:
        batches = int(config.max_duration.removesuffix("ba")) // SHORT
        config.update(max_duration=f"{batches}ba", eval_interval="1dur", save_interval="1dur")
    change(config)
    config.progress_bar = False
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, out / "recipe.yaml")
    minutes = run(BIN / "composer", "train.py", out / "recipe.yaml")
    folder = out / "run" / "huggingface" / "final"
    command = [BIN / "m2-plugin", "retrieval", data / "test.jsonl", "--model", folder]
    run(*command, "--out", out / "measured")
    (scores,) = json.loads((out / "measured" / "results.json").read_text())["results"].values()
    found = {"model": scores["model"][MEASURE], "bm25": scores["BM25"][MEASURE], "minutes": minutes}
    record.write_text(json.dumps(found))
    print(f"{data.name}, {out.name}: {found}", flush=True)
    return found


def count(file: Path) -> int:
    with file.open() as lines:
        return sum(1 for _ in lines)


def convert(data: Path) -> None:
    """Convert the pairs, and other pairs to train on, each to a folder of MDS."""
    for file in sorted(data.glob("train*.jsonl")):
        out = data / file.stem.replace("train", "mds")
        if not out.exists():
            command = [sys.executable, "data_prep/convert_pairs.py", "--out_root", out]
            run(*command, "--local_files", f"train={file}", f"val={data / 'val.jsonl'}")


def summary(data: Path, whole: dict[str, float]) -> dict[str, Any]:
    passages = count(data / "test.jsonl")
    return {
        "train_pairs": count(data / "train.jsonl"),
        "test_pairs": passages,
        "minutes": whole["minutes"],
        "random": sum(1 / math.log2(rank + 1) for rank in range(1, TOP + 1)) / passages,
        "bm25": whole["bm25"],
        "recipe": whole["model"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    quickstart = ROOT / "quickstart"
    parser.add_argument("--start", type=Path, default=quickstart / "run/huggingface/final")
    parser.add_argument("--out", type=Path, default=quickstart / "bench_retrieval")
    parser.add_argument("--wikipedia", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    wikipedia = out / "wikipedia"
    write_wikipedia(args.wikipedia, wikipedia)
    run(sys.executable, PAIRS, "--out", out / "quickstart")
    leave_out_novels(out / "quickstart", out / "pages")
    sets = {"C4": out / "quickstart", "C4, no novels": out / "pages", "Wikipedia": wikipedia}
    for data in sets.values():
        convert(data)

    named = changes(args.start.resolve(), wikipedia)
    with ThreadPoolExecutor(2) as pool:
        recipe = named["recipe"]
        whole = {n: pool.submit(train, d, "recipe", recipe, False) for n, d in sets.items()}
        short = {n: pool.submit(train, wikipedia, n, change, True) for n, change in named.items()}
        report = {
            "benchmark": "retrieval",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sets": {name: summary(data, whole[name].result()) for name, data in sets.items()},
            "changes": {name: found.result() for name, found in short.items()},
        }
    OUT.write_text(json.dumps(report, indent=1) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
