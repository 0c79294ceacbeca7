"""The sweep with llm-foundry's jobs, and one task by `composer train.py`, on a tiny GLUE."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.utils import ROOT, TOKENIZER

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
DATA = ROOT / "tests" / "foundry" / "data" / "glue"
YAMLS = "yamls/finetune/glue"
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "hyena_filter_order": 4,
    "hyena_training_additions": False,
}
SMALL = [f"model.config_overrides.{key}={value}" for key, value in TINY.items()]
SMALL += [f"variables.tokenizer={TOKENIZER}", "model.pretrained=false"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=600)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def sweep(out: Path, data: Path) -> subprocess.Popen:
    command = [str(BIN / "m2-plugin"), "glue", "--config", f"{YAMLS}/sweep-m2-bert-base.yaml"]
    command += ["--out", str(out), "--jobs", "2", "--tasks", "mnli", "cola", "rte", *SMALL]
    command += ["model.pretrained=false"]
    command += [f"variables.glue_path={data}", "tasks.mnli.max_duration=1ep"]
    command += ["tasks.rte.max_duration=2ep", "tasks.rte.seeds=[7]", "tasks.cola.seeds=[7]"]
    return launch(command)


def test_a_killed_sweep_goes_on_and_a_broken_task_is_in_the_table(tmp_path):
    out, data = tmp_path / "out", tmp_path / "glue"
    shutil.copytree(DATA, data)
    (data / "CoLA" / "train.tsv").unlink()

    process = sweep(out, data)
    mnli = out / "mnli-seed19" / "result.json"
    deadline = time.monotonic() + 300
    while not (mnli.exists() and (out / "rte-seed7" / "job.yaml").exists()):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "rte-seed7" / "result.json").exists()
    written = mnli.stat().st_mtime_ns

    process = sweep(out, data)
    output = finish(process)
    assert process.returncode == 1, output  # CoLA cannot be trained
    assert mnli.stat().st_mtime_ns == written

    results = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/result.json")}
    assert results["mnli-seed19"]["status"] == results["rte-seed7"]["status"] == "finished"
    assert set(results["mnli-seed19"]["metrics"]) == {"mnli_matched", "mnli_mismatched"}
    assert results["rte-seed7"]["batches"] == 4 and results["rte-seed7"]["seed"] == 7
    predictions = out / "mnli-seed19" / "predictions"
    assert {p.stem for p in predictions.iterdir()} == {"mnli_matched", "mnli_mismatched", "ax"}
    # Only what others start from is kept.
    assert not list(out.glob("rte-seed7/**/*.pt")) + list(out.glob("rte-seed7/huggingface"))

    failed = results["cola-seed7"]
    assert failed["status"] == "failed" and "RunError: No train split of cola" in failed["error"]
    assert "CoLA/train.tsv" in failed["error"]
    table = output[output.index("GLUE: m2-bert-base") :]
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert "0/1" in lines["CoLA"] and "failed" in lines["CoLA"]
    accuracy = 100 * results["rte-seed7"]["metrics"]["rte"]["accuracy"]
    assert "1/1" in lines["RTE"] and f"{accuracy:.1f}" in lines["RTE"]
    assert "incomplete: 2 of 8 tasks" in lines["average"]
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_one_task_by_composer_from_a_pretraining_checkpoint(tmp_path):
    """With a learning rate of 0 the encoder of the checkpoint comes out as it went in."""
    from composer import Trainer
    from llmfoundry.utils.builders import build_composer_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    pretrained = build_composer_model("m2_bert_mlm", {"config_overrides": TINY}, tokenizer)
    checkpoint = Trainer(model=pretrained, device="cpu").save_checkpoint(str(tmp_path / "mlm.pt"))
    assert checkpoint

    out = tmp_path / "run"
    command = [str(BIN / "composer"), "-n", "1", "train.py", f"{YAMLS}/m2-bert-base-rte.yaml"]
    command += [f"variables.start={checkpoint}", f"variables.out={out}"]
    command += [f"variables.glue_path={DATA}", "max_duration=1ep"]
    command += ["optimizer.lr=0", "optimizer.weight_decay=0"]
    process = launch(command)
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    said = f"2 batches of 16 × at most 128 tokens, from {checkpoint}"
    assert said in output and "rte has trained 2 batches" in output
    report = json.loads((out / "metrics.json").read_text())
    assert 0 <= report["metrics"]["rte"]["accuracy"] <= 1 and report["batches"] == 2
    assert report["commonest_answer"]["rte"]["accuracy"] >= 0.5
    tuned = load_file(out / "huggingface" / "final" / "model.safetensors")
    encoder = {k: v for k, v in pretrained.model.state_dict().items() if k.startswith("model.")}
    assert len(encoder) > 20
    for name, tensor in encoder.items():
        assert torch.equal(tuned[name], tensor), name
    assert {name.split(".")[0] for name in set(tuned) - set(encoder)} == {"pooler", "classifier"}
