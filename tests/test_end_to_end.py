"""The quickstart's YAML through the real `composer` launcher, at a smaller size.

Three times the same job: unbroken; killed by SIGKILL and started again; on two processes.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import m2_plugin.models  # noqa: F401  (registers the model type)
from tests.benchmarks.kill import differences
from tests.utils import ROOT, TOKENIZER

pytestmark = pytest.mark.slow

YAML = "yamls/pretrain/m2-bert-quickstart.yaml"
SMALL = {
    "model.config_overrides.hidden_size": 32,
    "model.config_overrides.intermediate_size": 64,
    "model.config_overrides.num_hidden_layers": 2,
    "model.config_overrides.hyena_filter_order": 8,
    "train_loader.dataset.epoch_size": 320,  # 10 batches: the runs go into their third epoch
    "global_train_batch_size": 32,
    "device_train_microbatch_size": 16,
    "max_duration": "24ba",
    "eval_interval": "8ba",
    "save_interval": "8ba",
    "save_num_checkpoints_to_keep": -1,
    "progress_bar": "false",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "mds"
    command = [sys.executable, "data_prep/convert_c4.py", "--out_root", str(out)]
    command += ["--splits", "train", "val", "--val_fraction", "0.05", "--verify"]
    command += ["--local_files", "data_prep/quickstart/c4-sample.json.gz"]
    command += ["--concat_tokens", "128", "--tokenizer", str(TOKENIZER)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return out


def launch(out: Path, shards: Path, nproc: int = 1) -> subprocess.Popen:
    if not (out / "mds").exists():
        (out / "mds").symlink_to(shards)
    keys = SMALL | {"variables.out": out}
    composer = Path(sys.executable).parent / "composer"
    command = [str(composer), "-n", str(nproc), "train.py", YAML]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *(f"{k}={v}" for k, v in keys.items())],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-5000:]
    return output


def kill_after(process: subprocess.Popen, checkpoint: Path) -> None:
    """Sends SIGKILL to the launcher and all its processes some batches after a checkpoint."""
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"no {checkpoint}: {process.communicate()[0][-5000:]}")
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def curve(out: Path) -> dict[tuple[str, str], float]:
    with open(out / "run" / "loss_curve.csv") as file:
        return {(row["batch"], row["curve"]): float(row["loss"]) for row in csv.DictReader(file)}


def final_state(out: Path) -> dict:
    # Our own file; composer's checkpoints hold more than tensors.
    return torch.load(out / "run" / "ep2-ba24-rank0.pt", weights_only=False)["state"]


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    finish(launch(out, shards))
    return out


def test_unbroken_run_leaves_everything(unbroken, shards):
    """Curve, picture, checkpoint and a transformers folder that evaluates to the logged loss."""
    from llmfoundry.utils.builders import build_dataloader, build_tokenizer

    run = unbroken / "run"
    assert (run / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    losses = curve(unbroken)
    assert losses["24", "train"] < losses["1", "train"] - 0.5
    assert losses["0", "unigram_cross_entropy"] > losses["0", "unigram_entropy"] > 5

    folder = run / "huggingface" / "final"
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = final_state(unbroken)["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model.{name}"]), name

    kwargs = {"model_max_length": 128, "bos_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = build_tokenizer(str(TOKENIZER), kwargs)
    dataset = {"local": str(shards), "split": "val", "max_seq_len": 128, "mlm_probability": 0.15}
    dataset |= {"shuffle": False, "remask_each_epoch": False}
    config = {"name": "mlm_text", "dataset": dataset, "drop_last": False, "num_workers": 0}
    loader = build_dataloader(config, tokenizer, 32).dataloader
    total, count = 0.0, 0
    for batch in loader:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            loss = model.eval()(**inputs).loss.item()
        masked = int((batch["labels"] != -100).sum())
        total, count = total + loss * masked, count + masked
    assert total / count == pytest.approx(losses["24", "eval"], rel=1e-5)


def test_killed_and_restarted_run_equals_the_unbroken_one(unbroken, shards, tmp_path):
    kill_after(launch(tmp_path, shards), tmp_path / "run" / "latest-rank0.pt")
    assert not (tmp_path / "run" / "ep2-ba24-rank0.pt").exists()
    finish(launch(tmp_path, shards))
    assert curve(tmp_path) == curve(unbroken)
    resumed, whole = final_state(tmp_path), final_state(unbroken)
    for part in ("model", "optimizers"):
        assert not list(differences(resumed[part], whole[part], part))


def test_two_processes_give_the_same_losses(unbroken, shards, tmp_path):
    finish(launch(tmp_path, shards, nproc=2))
    one, two = curve(unbroken), curve(tmp_path)
    assert one.keys() == two.keys()
    for point in one:
        assert two[point] == pytest.approx(one[point], rel=1e-4), point
