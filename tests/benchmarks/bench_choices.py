# ruff: noqa: T201
"""What the choices of a recipe change: the held-out loss of a small M2-BERT, each with two seeds.

    python tests/benchmarks/bench_learning.py --corpus wikipedia.jsonl novels.jsonl
    python tests/benchmarks/bench_choices.py --corpus wikipedia.jsonl

Runs as `bench_learning.py` those of 1,000 batches, in its folder, with its learning rate; and each
with one choice changed. `padded texts` are paragraphs of --corpus, one a sample, as texts to be
embedded are: most are shorter than the 128 tokens to which the loader pads. Their models are also
evaluated without that padding. What is finished is not run again. Writes results/choices.json.
"""

import argparse
import datetime
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_glue import MODELS, RESULTS, ROOT, TOKENIZER, run
from bench_learning import HELD_OUT, SEEDS, SEQUENCE, best_rate, is_finished, losses, train
from report import main as write_tables

from m2_plugin.files import write_atomically

BATCHES = 1000
PARAGRAPHS = 200_000
SHORTEST = 60  # characters of a paragraph: no headings
MASKS = "train_loader.dataset.mlm_probability"
GROUPS = "optimizer.param_groups"


def groups(filters: float, positions: float, decay: float) -> list[dict[str, Any]]:
    """Groups of the filters, with their learning rates and the weight decay of a step."""
    return [
        {"param_str_match": r"filter\.pos_emb$", "lr": positions, "weight_decay": 0.0},
        {"param_str_match": r"\.filter\.", "lr": filters, "weight_decay": decay},
    ]


def choices(rate: float) -> dict[str, dict[str, Any]]:
    """The changes of each choice, by its name; learning rates are shares of the recipe's."""
    return {
        "recipe": {},
        "15% masked": {MASKS: 0.15},
        "intended groups": {GROUPS: groups(rate * 1.25, rate / 80, 1e-4)},
        "a third of the filters' rate": {GROUPS: groups(rate / 3, rate / 3, 1e-5)},
        "three times the filters' rate": {GROUPS: groups(rate * 3, rate * 3, 1e-5)},
        "filters fixed": {GROUPS: groups(0.0, 0.0, 0.0)},
        "padded texts": {"mds": "paragraphs", "model.config_overrides.mask_padding": False},
        "padded texts, mask_padding": {
            "mds": "paragraphs",
            "model.config_overrides.mask_padding": True,
        },
    }


def paragraphs(corpus: Path, out: Path) -> None:
    """Convert paragraphs to MDS of text, each a sample."""
    if (out / "paragraphs").exists():
        return
    file, count = out / "paragraphs.jsonl", 0
    with open(corpus, encoding="utf-8") as source, open(file, "w", encoding="utf-8") as target:
        for line in source:
            for text in json.loads(line)["text"].split("\n"):
                if len(text) >= SHORTEST and count < PARAGRAPHS:
                    target.write(json.dumps({"text": text}) + "\n")
                    count += 1
    command = [sys.executable, "data_prep/convert_text.py", "--out_root", str(out / "paragraphs")]
    command += ["--splits", "train", "val", "--val_fraction", "0.02", "--local_files", str(file)]
    run(command, out / "paragraphs.log")


@torch.no_grad()
def unpadded_losses(folder: Path, out: Path) -> tuple[float, float]:
    """The loss in nats on the same masked paragraphs, padded to 128 tokens and not padded."""
    from llmfoundry.data.dataloader import build_dataloader
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import m2_plugin.models  # noqa: F401  (registers the model type)

    dataset = {
        "local": str(out / "paragraphs"),
        "split": "val",
        "shuffle": False,
        "max_seq_len": SEQUENCE,
        "mlm_probability": 0.15,
        "epoch_size": HELD_OUT,
        "sampling_method": "fixed",
    }
    config = {"name": "mlm_text", "dataset": dataset, "drop_last": False, "num_workers": 0}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TOKENIZER)
    loader = build_dataloader(config | {"pin_memory": False}, tokenizer, 1).dataloader
    model = AutoModelForMaskedLM.from_pretrained(folder / "huggingface/final").eval()
    sums, count = [0.0, 0.0], 0
    for batch in loader:
        length, masked = int(batch["attention_mask"].sum()), int((batch["labels"] >= 0).sum())
        for i, end in enumerate((SEQUENCE, length)):
            inputs = {k: batch[k][:, :end] for k in ("input_ids", "attention_mask", "labels")}
            if masked:
                sums[i] += model(**inputs).loss.item() * masked
        count += masked
    return sums[0] / count, sums[1] / count


def measure(out: Path, name: str, changes: dict[str, Any], rate: float) -> dict[str, Any]:
    """The held-out losses of a choice, one for each seed."""
    found: dict[str, Any] = {"loss": []}
    changes = dict(changes)
    if mds := changes.pop("mds", None):
        changes |= {f"{part}_loader.dataset.local": str(out / mds) for part in ("train", "eval")}
    for seed in SEEDS:
        folder = out / "choices" / name / str(seed)
        if name == "recipe":
            folder = out / "M2-BERT" / f"{rate}-{seed}" / str(BATCHES)
        if not is_finished(folder):
            train(out, folder, "M2-BERT", rate, seed, BATCHES, changes=changes)
        found["loss"].append(losses(folder)[-1][1])
        if mds:
            padded, unpadded = unpadded_losses(folder, out)
            found.setdefault("padded", []).append(padded)
            found.setdefault("unpadded", []).append(unpadded)
    print(f"{name}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines of text")
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart" / "bench_learning")
    args = parser.parse_args()
    out = args.out.resolve()
    torch.set_num_threads(1)
    paragraphs(args.corpus, out)
    rate, _ = best_rate(out, "M2-BERT")
    with ThreadPoolExecutor(len(MODELS)) as pool:
        named = choices(rate)
        rows = pool.map(lambda name: measure(out, name, named[name], rate), named)
        found = dict(zip(named, rows, strict=True))
    report = {
        "benchmark": "choices",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "batches": BATCHES,
        "lr": rate,
        "choices": found,
    }
    write_atomically(RESULTS / "choices.json", json.dumps(report, indent=1) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
