"""What a run says, the settings that it keeps, and its event file."""

import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from composer import Trainer
from composer.optim import DecoupledAdamW
from llmfoundry.utils.builders import build_composer_model, build_dataloader

from m2_plugin.foundry.callbacks import LossCurve
from m2_plugin.foundry.event_file import TensorboardFile
from m2_plugin.foundry.run_summary import RunSummary, _count, _duration, _rounded
from m2_plugin.train_report.runs import load_runs

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "hyena_filter_order": 4}
CONFIG = {
    "run_name": "tiny",
    "seed": 5,
    "max_seq_len": 32,
    "model": {"name": "m2_bert_mlm", "config_overrides": TINY},
    "tokenizer": {"name": "a/tokenizer"},
    "train_loader": {"name": "mlm_text"},
    "optimizer": {"name": "decoupled_adamw", "lr": 1e-6},
    "global_train_batch_size": 48,
    "callbacks": {"run_summary": {}},
}


@pytest.fixture
def fit(mds, tokenizer):
    """Train to a batch, through all callbacks and loggers; return the number of parameters."""

    def run(folder: Path, batches: int, progress_bar: bool = False, **keys) -> int:
        def loader(split: str) -> object:
            dataset = {"local": str(mds), "split": split, "shuffle": False, "max_seq_len": 32}
            dataset["mlm_probability"] = 0.3
            config = {"name": "mlm_text", "num_workers": 0, "pin_memory": False, "drop_last": False}
            return build_dataloader({**config, "dataset": dataset}, tokenizer, 48)

        torch.manual_seed(0)
        model = build_composer_model("m2_bert_mlm", {"config_overrides": TINY}, tokenizer)
        trainer = Trainer(
            model=model,
            train_dataloader=loader("train"),
            eval_dataloader=loader("val"),
            eval_interval="2ba",
            optimizers=DecoupledAdamW(model.parameters(), lr=1e-3),
            max_duration=f"{batches}ba",
            callbacks=[RunSummary(copy.deepcopy(CONFIG)), LossCurve(unigram_baseline=True)],
            loggers=[TensorboardFile(flush_interval=1)],
            run_name="tiny",
            save_folder=str(folder),
            save_interval="2ba",
            autoresume=True,
            device="cpu",
            device_train_microbatch_size=48,
            progress_bar=progress_bar,
            python_log_level="warning",
            **keys,
        )
        trainer.fit()
        trainer.close()
        return sum(p.numel() for p in model.parameters())

    yield run
    logging.getLogger("m2_plugin.foundry.run_summary").handlers = []


def test_a_run_says_what_it_trains_and_what_it_reaches(fit, tmp_path, capfd):
    parameters = fit(tmp_path / "run", 2, progress_bar=True)
    said = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert (
        f"Training m2_bert (masked language modelling), {parameters:,} parameters: 2 batches of "
        "48 × 32 tokens, from scratch." in said
    )
    assert not any("Config:" in line or "Cannot split" in line for line in said)
    (start,) = (i for i, line in enumerate(said) if line.startswith("tiny has trained 2 batches"))
    block = {line.split()[0]: line for line in said[start:] if line.startswith("  ")}
    (run,) = load_runs([tmp_path])
    loss = run.evals()["eval"].values[-1]
    assert f" cross_entropy {loss:.6g}"[:20] in block["evaluation"]
    assert ", masked_accuracy 0" in block["evaluation"]
    assert block["checkpoint"].endswith(f"{tmp_path}/run/latest-rank0.pt")
    assert block["curve"].endswith("loss_curve.png") and "model" not in block
    assert f"Next: m2-plugin train-report {tmp_path}/run" in said

    assert "commonest answer" not in block
    # What `eval_results` writes at the end of a classifier's run.
    report = {"batches": 4, "commonest_answer": {"eval": {"accuracy": 0.25, "f1": None}}}
    report["constant_predictions"] = ["eval"]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(report))
    fit(tmp_path / "run", 4)
    said = capfd.readouterr().err
    assert re.search(r"^    commonest answer +accuracy 0\.25, f1 not finite$", said, re.MULTILINE)
    assert "  note  " in said and "the model gives the same answer to all rows" in said
    assert f"4 batches of 48 × 32 tokens, continuing after batch 2 from {tmp_path}/run." in said
    assert "tiny has trained batches 3 to 4 in" in said


def test_one_event_file_per_start_and_the_settings_beside_it(fit, tmp_path):
    fit(tmp_path / "runs" / "one", 4)
    folder = tmp_path / "runs" / "one"
    assert [path.parent for path in tmp_path.rglob("events*")] == [folder]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG
    (run,) = load_runs([tmp_path])
    assert run.name == "tiny" and run.sources == ["TensorBoard"]
    assert run.series["loss/train/total"].steps.tolist() == [0, 1, 2, 3]
    assert {"baseline/unigram_entropy", "metrics/eval/LanguageCrossEntropy"} <= run.series.keys()
    found = run.parameters
    assert found["optimizer.lr"] == "1.0e-06" and found["tokenizer.name"] == "a/tokenizer"
    assert found["model.config_overrides.hidden_size"] == "16" and int(found["n_params"]) > 1000

    fit(folder, 6)
    assert len(list(tmp_path.rglob("events*"))) == 2
    (run,) = load_runs([tmp_path])
    assert run.series["loss/train/total"].steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(run.starts) == 2


def test_numbers_are_for_people():
    assert [_rounded(n) for n in (12_345, 4_344_512, 80_267_328, 341_038_144)] == [
        "12,345", "4.3 M", "80.3 M", "341 M",
    ]  # fmt: skip
    assert [_count(1, "batch"), _count(1000, "batch"), _count(2, "epoch")] == [
        "1 batch", "1,000 batches", "2 epochs",
    ]  # fmt: skip
    assert [_duration(s) for s in (2.4, 168, 7260)] == ["2 s", "2 min 48 s", "2 h 1 min"]
