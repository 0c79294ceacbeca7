"""Train M2-GPT and llm-foundry's MPT, with equally many parameters, on the quickstart's corpus.

    python tests/benchmarks/bench_gpt.py [--batches 600]

Both run yamls/pretrain/m2-gpt-small.yaml through the composer launcher on one core, with the same
data, order, seed and optimizer. Writes results/gpt.json and gpt.png.
"""

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from m2_plugin.files import write_atomically
from m2_plugin.pictures import LIGHT, drawing, to_png

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
QUICKSTART = ROOT / "data_prep" / "quickstart"
MPT = {
    "attn_config": {"attn_impl": "torch"},
    "ffn_config": {"ffn_type": "mptmlp"},
    "expansion_ratio": 4,
}
MODELS: dict[str, dict] = {"MPT": MPT, "M2-GPT": {}}  # what differs from the YAML's model
LAUNCHER = [sys.executable, "-m", "composer.cli.launcher", "-n", "1"]


def run(command: list[str], log: Path) -> float:
    """Runs a command in the repository, and returns its seconds."""
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
        )
    return time.perf_counter() - start


def train(model: dict, mds: Path, folder: Path, batches: int) -> dict:
    folder.mkdir()
    config = OmegaConf.load(ROOT / "yamls" / "pretrain" / "m2-gpt-small.yaml")
    config.model.vocab_size = 30528  # llm-foundry's default for the MPT is another
    for key, value in model.items():
        config.model[key] = value  # in place of the whole section: the command line merges
    OmegaConf.save(config, folder / "gpt.yaml")
    command = [*LAUNCHER, "train.py", str(folder / "gpt.yaml")]
    every = f"{batches // 3}ba"
    command += [f"variables.out={folder}", f"max_duration={batches}ba", "progress_bar=false"]
    command += [f"{which}_loader.dataset.local={mds}" for which in ("train", "eval")]
    command += [f"eval_interval={every}", f"save_interval={batches}ba"]
    seconds = run(command, folder / "log")
    with open(folder / "m2-gpt" / "loss_curve.csv") as file:
        rows = list(csv.DictReader(file))

    def curve(name: str) -> list:
        return [[int(r["batch"]), float(r["loss"])] for r in rows if r["curve"] == name]

    checkpoint = folder / "m2-gpt" / "latest-rank0.pt"
    weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["state"]["model"]
    parameters = {name: weight.numel() for name, weight in weights.items()}
    return {
        "parameters": sum(parameters.values()),
        "in_layers": sum(n for name, n in parameters.items() if ".blocks." in name),
        "seconds": seconds,
        "train": curve("train"),
        "eval": curve("eval"),
        "unigram_cross_entropy": curve("unigram_cross_entropy")[0][1],
    }


def draw(report: dict, path: Path) -> None:
    span = 10  # batches averaged
    with drawing(height=4.8) as figure:
        axes = figure.add_subplot()
        for (name, found), color in zip(report["models"].items(), LIGHT.series, strict=False):
            batches, losses = zip(*found["train"], strict=True)
            means = [sum(losses[j : j + span]) / span for j in range(len(losses) - span + 1)]
            label = f"{name}, {found['parameters']:,} parameters"
            axes.plot(batches[span - 1 :], means, color=color, label=label)
            batches, losses = zip(*found["eval"], strict=True)
            axes.plot(batches, losses, "o", color=color, label=f"{name}, held-out text")
        unigram = report["unigram_cross_entropy"]
        axes.axhline(unigram, linestyle="--", color=LIGHT.faint, label="word frequencies only")
        axes.set(xlabel="batch", ylabel=f"loss (nats per token, mean of {span})")
        axes.set_ylim(top=8)
        figure.legend(loc="outside lower left")
        write_atomically(path, to_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=600)
    batches = parser.parse_args().batches
    report: dict = {
        "benchmark": "gpt",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "batches": batches,
        "tokens_per_batch": 8 * 128,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        mds = Path(scratch) / "mds"
        convert = [sys.executable, "data_prep/convert_text.py", "--out_root", str(mds)]
        convert += ["--splits", "train", "val", "--val_fraction", "0.05", "--concat_tokens", "128"]
        convert += ["--local_files", str(QUICKSTART / "novels.jsonl.gz")]
        run([*convert, "--tokenizer", str(QUICKSTART / "tokenizer")], Path(scratch) / "log")
        for name, model in MODELS.items():
            found = train(model, mds, Path(scratch) / name, batches)
            report["unigram_cross_entropy"] = found.pop("unigram_cross_entropy")
            report["models"][name] = found
            print(name, f"{found['parameters']:,}", f"{found['seconds']:.0f} s", found["eval"])
    (RESULTS / "gpt.json").write_text(json.dumps(report) + "\n")
    draw(report, RESULTS / "gpt.png")


if __name__ == "__main__":
    main()
