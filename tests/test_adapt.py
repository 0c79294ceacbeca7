"""`data_prep/adapt.sh`: from own texts and labels to predictions, on a CPU and without a hub."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from m2_plugin.models import M2BertConfig, M2BertForMaskedLM
from tests.utils import ROOT, TOKENIZER, write_rows

SMALL = "global_train_batch_size=8 device_train_microbatch_size=8 progress_bar=false"


@pytest.mark.slow
def test_own_texts(tmp_path):
    """The loss on the texts that are held out falls, and new texts get the classes of the file."""
    torch.manual_seed(0)
    config = M2BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, hyena_filter_order=4,
        max_position_embeddings=32, long_conv_l_max=32, vocab_size=30528, mask_padding=True,
    )  # fmt: skip
    start = tmp_path / "start"
    M2BertForMaskedLM(config).save_pretrained(start)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(start)
    texts = [f"Report {i}. " + "The pump of unit four was checked. " * 5 for i in range(300)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    rows = [("The pump works.", "good"), ("A leak was found.", "bad")] * 20
    for name in ("train", "dev"):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    write_rows(tmp_path / "new.jsonl", [{"text": "The pump leaks.", "id": 7}])

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "START": str(start), "OUT": str(tmp_path / "out"), "TOKENS": "32",
        "TEXTS": str(tmp_path / "texts.jsonl"), "TRAIN": str(tmp_path / "train.csv"),
        "DEV": str(tmp_path / "dev.csv"), "NEW": str(tmp_path / "new.jsonl"),
        "CONTINUE": f"{SMALL} max_duration=40ba optimizer.lr=1e-2",
        "FINETUNE": f"{SMALL} max_duration=4ba",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "data_prep/adapt.sh"], cwd=ROOT, env=environment, timeout=800,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    before, after = map(float, re.findall(r"^cross_entropy ([\d.]+)", done.stdout, re.MULTILINE))
    assert after < before - 1
    metrics = json.loads((tmp_path / "out" / "classifier" / "metrics.json").read_text())
    assert metrics["metrics"]
    with open(tmp_path / "out" / "predictions.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["id"] == "7" and row["prediction"] in ("good", "bad")
    assert abs(float(row["probability_good"]) + float(row["probability_bad"]) - 1) < 1e-5
