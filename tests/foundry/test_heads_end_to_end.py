"""The YAMLs of token classification and question answering through the real launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from m2_plugin.models import M2BertConfig, M2BertForMaskedLM
from tests.utils import ROOT, TOKENIZER

pytestmark = pytest.mark.slow

PEOPLE, CITIES = ["Anna", "Peter", "Mary"], ["Paris", "London", "Rome"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A tiny folder such as a pretraining leaves."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    fields |= {"hyena_filter_order": 8, "max_position_embeddings": 32, "long_conv_l_max": 32}
    config = M2BertConfig(vocab_size=len(tokenizer), **fields)
    M2BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(yaml: str, start: Path, folder: Path, ending: str) -> dict:
    keys = {
        "variables.start": start,
        "variables.train": folder / f"train{ending}",
        "variables.eval": folder / f"dev{ending}",
        "variables.out": folder / "run",
        "variables.max_seq_len": 32,
        "precision": "fp32",
        "max_duration": "30ba",
        "eval_interval": "15ba",
        "optimizer.lr": 3e-3,
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 8,
        "device_eval_batch_size": 8,
        "progress_bar": "false",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "composer", "train.py", f"yamls/finetune/{yaml}.yaml"]
        + [f"{key}={value}" for key, value in keys.items()],
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert (folder / "run" / "loss_curve.png").is_file()
    return json.loads((folder / "run" / "metrics.json").read_text())["metrics"]["eval"]


def test_token_classification(start, tmp_path):
    for name in ("train", "dev"):
        sentences = [
            f"{who} B-PER\nwent O\nto O\n{where} B-LOC\n. O\n" for who in PEOPLE for where in CITIES
        ]
        (tmp_path / f"{name}.conll").write_text("-DOCSTART- O\n\n" + "\n".join(sentences * 3))
    metrics = train("token-classification", start, tmp_path, ".conll")
    names = {"accuracy", "entity_f1", "entity_precision", "entity_recall", "cross_entropy"}
    assert metrics.keys() == names and metrics["entity_f1"] > 0.9 and metrics["accuracy"] > 0.9
    tagger = pipeline(
        "ner", str(tmp_path / "run/huggingface/final"), aggregation_strategy="first", device="cpu"
    )
    found = [(row["entity_group"], row["word"]) for row in tagger("Anna went to Paris .")]
    assert found == [("PER", "anna"), ("LOC", "paris")]


def test_question_answering(start, tmp_path):
    for name in ("train", "dev"):
        paragraphs = []
        for i, (who, where) in enumerate((a, b) for a in PEOPLE for b in CITIES):
            context = f"{who} went to {where} by train. " + "It rained. " * (i * 2)
            answer = {"text": where, "answer_start": context.index(where)}
            question = {"id": f"{name}{i}", "question": "Where?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        data = {"version": "1.1", "data": [{"title": "trips", "paragraphs": paragraphs}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    metrics = train("question-answering", start, tmp_path, ".json")
    assert metrics.keys() == {"exact_match", "f1", "cross_entropy"}
    assert metrics["exact_match"] > 90 and metrics["f1"] > 90
    answer = pipeline("question-answering", str(tmp_path / "run/huggingface/final"), device="cpu")
    found = answer(question="Where?", context="Mary went to Rome by train.")
    assert found["answer"].strip(" .") == "Rome"
