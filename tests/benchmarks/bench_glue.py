"""Pretrains two small models by the quickstart's recipe and fine-tunes both on five GLUE tasks.

    python tests/benchmarks/bench_glue.py GLUE_FOLDER [--out OUT]
    python tests/benchmarks/bench_glue.py GLUE_FOLDER --name longer --start M2_BERT BERT

GLUE_FOLDER holds the official folders CoLA, SST-2, MRPC, STS-B and RTE with train.tsv and dev.tsv.
Everything goes through `composer train.py`, one thread for each run; what is finished below OUT is
not run again. Writes tests/benchmarks/results/glue_quickstart.json and .png; or, of the models of
two folders (of `bench_learning.py`) in place of the quickstart's, glue_longer.json and .png.
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from omegaconf import OmegaConf

from m2_plugin.files import write_atomically
from m2_plugin.glue.tasks import TASKS, Task
from m2_plugin.pictures import LIGHT, drawing, to_png

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
COMPOSER = str(Path(sys.executable).parent / "composer")
TOKENIZER = "data_prep/quickstart/tokenizer"
MODELS = {"M2-BERT": "m2_bert", "BERT": "hf_bert"}
SMALL_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
MAX_SAMPLES = {"sst2": 20_000}  # of 67,349: a model of this size learns little from the rest
EPOCHS = {"cola": 3, "sst2": 3, "mrpc": 5, "stsb": 5, "rte": 5}
MAX_SEQ_LEN = 128
# One layout for both: width 128, two layers.
BERT = {
    "name": "hf_bert_mlm",
    "model_type": "bert",
    "config_overrides": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": MAX_SEQ_LEN,
    },
}
LOGGED = {  # name of a metric in a YAML → its key in the log
    "accuracy": "MulticlassAccuracy",
    "f1": "BinaryF1Score",
    "matthews": "MulticlassMatthewsCorrCoef",
    "pearson": "PearsonCorrCoef",
    "spearman": "SpearmanCorrCoef",
}


def run(command: list[str], log: Path) -> float:
    """Run from the repository's root on one thread; returns seconds."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, "w") as file:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)
    return time.perf_counter() - start


def pretrain(out: Path, family: str) -> Path:
    """The quickstart's YAML, for BERT with its own model section; returns the saved folder."""
    folder = out / family
    final = folder / "run" / "huggingface" / "final"
    if (final / "config.json").exists():
        return final
    yaml = ROOT / "yamls/pretrain/m2-bert-quickstart.yaml"
    if family == "hf_bert":
        config = OmegaConf.load(yaml)
        config.model, config.variables.run_name = BERT, "bert-quickstart"
        yaml = folder / "bert-quickstart.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, yaml)
    mds = folder / "mds"
    if not mds.exists():
        convert = [sys.executable, "data_prep/convert_text.py", "--out_root", str(mds)]
        convert += ["--splits", "train", "val", "--val_fraction", "0.05"]
        convert += ["--local_files", "data_prep/quickstart/novels.jsonl.gz"]
        run([*convert, "--concat_tokens", "128", "--tokenizer", TOKENIZER], folder / "convert.log")
    run([COMPOSER, "train.py", str(yaml), f"variables.out={folder}"], folder / "train.log")
    return final


def finetune(
    out: Path, family: str, task: Task, glue: Path, pretrained: Path, scratch: bool = False
) -> dict:
    """One task, also from random weights; returns the metrics after each epoch."""
    folder = out / family / ("scratch" if scratch else "glue") / task.name
    record = folder / "record.json"
    if record.exists():
        return json.loads(record.read_text())
    keys = {
        "variables.task": task.name,
        "variables.data": glue,
        "variables.pretrained": pretrained,
        "variables.out": folder,
        "model.name": f"{family}_classification",
        "model.num_labels": task.num_labels,
        "model.metrics": f"[{','.join(task.metrics)}]",
        "max_duration": f"{EPOCHS[task.name]}ep",
        "save_overwrite": "true",
    }
    if family == "m2_bert":
        # Batches are padded to their longest: what follows a text must not matter.
        keys["model.config_overrides.mask_padding"] = "true"
    if scratch:
        keys["model.pretrained"] = "false"
    if task.name in MAX_SAMPLES:
        keys["train_loader.dataset.max_samples"] = MAX_SAMPLES[task.name]
    yaml = "tests/benchmarks/glue_quickstart.yaml"
    command = [COMPOSER, "train.py", yaml, *(f"{key}={value}" for key, value in keys.items())]
    log = folder / "train.log"
    seconds = run(command, log)
    text = log.read_text()
    metrics = {}
    for name in task.metrics:
        found = re.findall(rf"metrics/eval/dev/{LOGGED[name]}: (-?[\d.]+)", text)
        metrics[name] = [float(value) for value in found]  # after each epoch
    result = {"epochs": EPOCHS[task.name], "seconds": seconds, "metrics": metrics}
    record.write_text(json.dumps(result))
    return result


def count(task: Task, glue: Path) -> int:
    """Training examples that were used."""
    lines = (glue / task.official_files("train")[0]).read_text(encoding="utf-8").split("\n")
    rows = sum(bool(line) for line in lines) - (not task.official_columns)  # the header
    return min(rows, MAX_SAMPLES.get(task.name, rows))


def predict(folder: Path, task: Task, glue: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the saved folder, without the trainer; and those of the commonest answer."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import m2_plugin.models  # noqa: F401  (registers the model type)
    from m2_plugin.foundry.text_classification import build_glue_dataloader

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = {"task": task.name, "split": "validation", "path": str(glue)}
    dataset |= {"max_seq_len": MAX_SEQ_LEN, "padding": "longest"}
    loader = build_glue_dataloader(tokenizer, 32, dataset, pin_memory=False).dataloader
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in loader:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
            logits.append(model(**inputs).logits)
            labels.append(batch["labels"])
    truth = torch.cat(labels).numpy()
    output = torch.cat(logits)
    guess = (output[:, 0] if task.is_regression else output.argmax(1)).numpy()
    functions = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda y, p: pearsonr(y, p)[0],
        "spearman": lambda y, p: spearmanr(y, p)[0],
    }
    metrics = {name: float(functions[name](truth, guess)) for name in task.metrics}
    if task.is_regression:
        return metrics, dict.fromkeys(task.metrics, 0.0)
    commonest = torch.full((len(truth),), int(torch.from_numpy(truth).mode().values)).numpy()
    return metrics, {name: float(functions[name](truth, commonest)) for name in task.metrics}


def pretraining_loss(final: Path) -> float:
    with open(final.parents[1] / "loss_curve.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["curve"] == "eval"]
    return float(rows[-1]["loss"])


def parameters(final: Path) -> int:
    from transformers import AutoModelForMaskedLM

    import m2_plugin.models  # noqa: F401

    model = AutoModelForMaskedLM.from_pretrained(final)
    return sum(p.numel() for p in model.parameters())


def draw(report: dict, path: Path) -> None:
    rows = report["tasks"]
    with drawing(height=4.6) as figure:
        axes = figure.add_subplot()
        for i, name in enumerate(MODELS):
            heights = [row["models"][name]["metrics"][row["metric"]] for row in rows]
            places = [x + 0.4 * (i - 0.5) for x in range(len(rows))]
            bars = axes.bar(places, heights, 0.39, label=name, color=LIGHT.series[i])
            axes.bar_label(bars, fmt="%.2f")
        for x, row in enumerate(rows):
            score = row["commonest"][row["metric"]]
            axes.hlines(score, x - 0.4, x + 0.4, color=LIGHT.ink, linestyle="--")
        axes.hlines([], 0, 0, color=LIGHT.ink, linestyle="--", label="the commonest answer")
        axes.set_xticks(range(len(rows)), [f"{row['task']}\n{row['metric']}" for row in rows])
        axes.grid(visible=False, axis="x")
        axes.set_title(f"GLUE dev sets ({report['benchmark'].removeprefix('glue_')})")
        figure.legend(loc="outside lower left", ncols=3)
        write_atomically(path, to_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("glue", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart" / "bench_glue")
    parser.add_argument("--start", type=Path, nargs=2, metavar="FOLDER", help="pretrained models")
    parser.add_argument("--name", default="quickstart")
    args = parser.parse_args()
    starts = dict(zip(MODELS.values(), args.start or (), strict=bool(args.start)))
    glue, out = args.glue.resolve(), args.out.resolve()
    if args.start:
        out = out / args.name
    tasks = [TASKS[name] for name in SMALL_TASKS]

    def all_of(family: str) -> tuple[Path, dict[str, dict], dict]:
        final = starts[family].resolve() if starts else pretrain(out, family)
        records = {task.name: finetune(out, family, task, glue, final) for task in tasks}
        if starts:
            return final, records, {}
        return final, records, finetune(out, family, TASKS["sst2"], glue, final, scratch=True)

    with ThreadPoolExecutor(len(MODELS)) as pool:
        runs = dict(zip(MODELS, pool.map(all_of, MODELS.values()), strict=True))

    torch.set_num_threads(1)
    rows = []
    for task in tasks:
        models = {}
        for name, family in MODELS.items():
            record = runs[name][1][task.name]
            trained = {key: values[-1] for key, values in record["metrics"].items()}
            folder = out / family / "glue" / task.name / "huggingface" / "final"
            reloaded, commonest = predict(folder, task, glue)
            for key in trained:  # the log has four decimals
                assert abs(trained[key] - reloaded[key]) < 1e-4, (task.name, trained, reloaded)
            models[name] = {
                "train_samples": count(task, glue),
                "epochs": record["epochs"],
                "metrics": reloaded,
                "logged": record["metrics"],  # by the trainer, after each epoch
            }
        rows.append(
            {
                "task": task.folder,
                "metric": task.score_metrics[0],
                "commonest": commonest,
                "models": models,
            }
        )
        print(json.dumps(rows[-1], indent=1))
    report = {
        "benchmark": f"glue_{args.name}",
        "date": datetime.date.today().isoformat(),
        "threads": 1,
        "torch": torch.__version__,
        "models": {
            name: {
                "parameters": parameters(final),
                "pretraining_eval_loss": pretraining_loss(final),
            }
            for name, (final, _, _) in runs.items()
        },
        # What the task alone teaches, without pretraining.
        "sst2_from_random_weights": {
            name: scratch["metrics"]["accuracy"][-1]
            for name, (_, _, scratch) in runs.items()
            if scratch
        },
        "tasks": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"glue_{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, RESULTS / f"glue_{args.name}.png")


if __name__ == "__main__":
    main()
