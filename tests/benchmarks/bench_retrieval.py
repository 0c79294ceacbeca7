"""Retrieval on held-out pairs of real text: the quickstart's model before and after fine-tuning.

    make quickstart
    python tests/benchmarks/bench_retrieval.py --wikipedia enwiki_sample.jsonl.xz

fine-tunes by `yamls/finetune/retrieval/m2-bert-quickstart.yaml`, and ranks for each query of the
test split all its passages: nDCG@10. The learning rate was chosen by a few runs on the validation
splits. A query is a piece of text of 300 characters and more, its passage the
piece after it. Two sets: the quickstart's web pages of C4, and, if --wikipedia is given (JSON
lines with `title` and `text`), the first two pieces of articles. The quickstart's model has been
pretrained on novels, hence on neither.
"""

import argparse
import datetime
import hashlib
import json
import lzma
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.feature_extraction.text import CountVectorizer
from torchmetrics.functional.retrieval import retrieval_normalized_dcg
from transformers import AutoTokenizer

from m2_plugin.models import M2BertForTextEmbedding

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "results" / "retrieval.json"
YAML = "yamls/finetune/retrieval/m2-bert-quickstart.yaml"
PAIRS = ROOT / "data_prep" / "quickstart" / "pairs.py"
TOKENIZER = ROOT / "data_prep" / "quickstart" / "tokenizer"
LENGTH, TOP = 128, 10
K1, B = 1.2, 0.75  # of BM25
WIKIPEDIA = {"val": 600, "test": 1000, "train": 9600}  # articles
LOSSES = ("infonce",)  # the other one needs negatives in the data

Pairs = tuple[list[str], list[str]]  # queries, and the passage of each


def read_pairs(path: Path) -> Pairs:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["query"] for row in rows], [row["passage"] for row in rows]


def write_wikipedia(source: Path, out: Path) -> None:
    """The first two pieces of articles, the title's own line left out."""
    pieces = runpy.run_path(str(PAIRS))["pieces"]
    with lzma.open(source, "rt", encoding="utf-8") as file:
        articles = {row["title"]: row["text"].partition("\n")[2] for row in map(json.loads, file)}
    titles = iter(sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest()))
    out.mkdir(parents=True, exist_ok=True)
    for split, count in WIKIPEDIA.items():
        rows: list[str] = []
        while len(rows) < count:
            first = list(islice(pieces(articles[next(titles)]), 2))
            if len(first) == 2:
                rows.append(json.dumps(dict(zip(("query", "passage"), first, strict=True))))
        (out / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


# --- ranking -------------------------------------------------------------------------------------


def ndcg(scores: torch.Tensor) -> float:
    """Mean nDCG@10 of scores (Q, Q), where passage i belongs to query i."""
    each = [
        retrieval_normalized_dcg(row, torch.arange(len(row)) == i, top_k=TOP)
        for i, row in enumerate(scores)
    ]
    return torch.stack(each).mean().item()


def bm25(pairs: Pairs) -> torch.Tensor:
    queries, passages = pairs
    words = CountVectorizer()
    counts = words.fit_transform(passages).astype(float)
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    found = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log(1 + (len(passages) - found + 0.5) / (found + 0.5))
    rows, columns = counts.nonzero()
    norm = K1 * (1 - B + B * lengths / lengths.mean())
    counts.data = idf[columns] * counts.data * (K1 + 1) / (counts.data + norm[rows])
    return torch.from_numpy((words.transform(queries) @ counts.T).toarray()).float()


@torch.no_grad()
def embed(model: M2BertForTextEmbedding, texts: list[str], pooler: bool) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    kwargs = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "pt"}
    vectors = []
    for i in range(0, len(texts), 64):
        batch = tokenizer(texts[i : i + 64], **kwargs)
        output = model(**batch)
        mask = batch["attention_mask"][..., None]
        mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors.append(output.sentence_embedding if pooler else mean)
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def ranked(folder: Path, pairs: Pairs, pooler: bool = True) -> float:
    torch.manual_seed(17)  # of a pooler that is not there yet
    model = M2BertForTextEmbedding.from_pretrained(
        folder, classifier_pooling="mean", mask_padding=True
    )
    queries, passages = (embed(model.eval(), texts, pooler) for texts in pairs)
    return ndcg(queries @ passages.T)


# --- training ------------------------------------------------------------------------------------


def run(*command: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)


def fine_tune(start: Path, data: Path, loss: str, *keys: str) -> tuple[Path, float]:
    """Train on `data`/train.jsonl through the launcher; returns the folder and the seconds."""
    out = data / loss
    shutil.rmtree(out, ignore_errors=True)
    files = [f"{split}={data / split}.jsonl" for split in ("train", "val")]
    convert = [sys.executable, "data_prep/convert_pairs.py", "--out_root", out]
    run(*convert, "--local_files", *files)
    values = [f"variables.out={out}", f"variables.start={start}", f"model.loss={loss}", *keys]
    began = time.perf_counter()
    run(Path(sys.executable).parent / "composer", "train.py", YAML, *values)
    return out / "run" / "huggingface" / "final", time.perf_counter() - began


def baselines(start: Path, data: Path) -> dict:
    test = read_pairs(data / "test.jsonl")
    passages = len(test[1])
    return {
        "train_pairs": len(read_pairs(data / "train.jsonl")[0]),
        "test_pairs": passages,
        "minutes": {},
        "ndcg": {
            "random": sum(1 / math.log2(r + 1) for r in range(1, TOP + 1)) / passages,
            "start, random pooler": ranked(start, test),
            "start, no pooler": ranked(start, test, pooler=False),
            "bm25": ndcg(bm25(test)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    quickstart = ROOT / "quickstart"
    parser.add_argument("--start", type=Path, default=quickstart / "run/huggingface/final")
    parser.add_argument("--work", type=Path, default=quickstart / "bench_retrieval")
    parser.add_argument("--wikipedia", type=Path)
    args = parser.parse_args()
    start, work = args.start.resolve(), args.work.resolve()
    torch.set_num_threads(1)
    sets = {"c4": work / "c4"}
    run(sys.executable, PAIRS, "--out", sets["c4"])
    if args.wikipedia:
        sets["wikipedia"] = work / "wikipedia"
        write_wikipedia(args.wikipedia, sets["wikipedia"])
    report = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sets": {name: baselines(start, data) for name, data in sets.items()},
    }
    for loss in LOSSES:
        for name, data in sets.items():
            folder, seconds = fine_tune(start, data, loss)
            found = report["sets"][name]
            found["ndcg"][loss] = ranked(folder, read_pairs(data / "test.jsonl"))
            found["minutes"][loss] = seconds / 60
            OUT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
