"""Adapt the quickstart's model, which has read novels, to WikiText-2 by `data_prep/adapt.sh`.

    make quickstart
    python tests/benchmarks/bench_adapt.py --texts wiki.valid.raw wiki.test.raw

An article of the raw files is a text. The script holds some out, and says its loss on them before
and after. Its labelled file are the web pages of the quickstart: three kinds, a small and hard
task, with a fine-tuning from the unadapted model beside it. Writes results/adapt.json.
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "adapt.json"
TITLE = re.compile(r"^ = [^=\n]+ = \n", re.MULTILINE)


def articles(files: list[Path]) -> list[str]:
    """Cut the raw files at the articles' titles."""
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        starts = [match.start() for match in TITLE.finditer(text)]
        found += [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return found


def run(command: list[str], **more: str) -> str:
    """Run in the repository without a GPU and a hub; return what it wrote to stdout."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | more
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def fine_tuned(folder: Path) -> dict[str, Any]:
    """Return the accuracy of a classifier, and that of the commonest answer."""
    report = json.loads((folder / "metrics.json").read_text())
    names = ("metrics", "commonest_answer")
    return {name: report[name]["eval"]["accuracy"] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--start", default="quickstart/run/huggingface/final", metavar="FOLDER")
    parser.add_argument("--held-out", default="0.2", metavar="SHARE", help="of the articles")
    args = parser.parse_args()
    start = str(Path(args.start).absolute())
    texts = articles(args.texts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "texts.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        out = folder / "out"
        began = time.perf_counter()
        said = run(
            ["bash", "data_prep/adapt.sh"],
            START=start, OUT=str(out), TEXTS=str(folder / "texts.jsonl"), HELD_OUT=args.held_out,
            CONTINUE="progress_bar=false", FINETUNE="progress_bar=false optimizer.lr=1.0e-3",
        )  # fmt: skip
        minutes = (time.perf_counter() - began) / 60
        run(
            ["composer", "train.py", "yamls/finetune/text-classification.yaml"]
            + [f"variables.{name}={out}/pages/{file}.csv" for name, file in
               (("train", "train"), ("eval", "dev"))]
            + [f"variables.start={start}", f"variables.out={folder}/before"]
            + ["progress_bar=false", "optimizer.lr=1.0e-3"]
        )  # fmt: skip
        lines = re.findall(
            r"^cross_entropy ([\d.]+), masked_accuracy ([\d.]+), perplexity ([\d.]+) \((\d+) rows",
            said, re.MULTILINE,
        )  # fmt: skip
        names = ("cross_entropy", "masked_accuracy", "perplexity", "rows")
        before, after = (dict(zip(names, map(float, line), strict=True)) for line in lines)
        curve = csv.DictReader((out / "pretrained" / "loss_curve.csv").read_text().splitlines())
        unigram = [row["loss"] for row in curve if row["curve"] == "unigram_cross_entropy"]
        with open(out / "predictions.csv", newline="") as file:
            predictions = [row["prediction"] for row in csv.DictReader(file)]
        report = {
            "benchmark": "adapt",
            "date": datetime.date.today().isoformat(),
            "articles": len(texts),
            "before": before,
            "after": after,
            "unigram_cross_entropy": float(unigram[0]),
            "minutes": minutes,
            "classifier": fine_tuned(out / "classifier"),
            "classifier_unadapted": fine_tuned(folder / "before"),
            "predictions": {name: predictions.count(name) for name in sorted(set(predictions))},
        }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
