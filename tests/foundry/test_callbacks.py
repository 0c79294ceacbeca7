import copy
import csv
import math
import random

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW
from llmfoundry.utils.builders import build_callback, build_composer_model, build_dataloader
from PIL import Image

from m2_plugin.foundry.callbacks import (
    LossCurve,
    SeedEachBatch,
    _from_csv,
    _to_csv,
    local_save_folder,
    unigram_baseline,
)
from m2_plugin.train_report import draw

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.2,
}
BATCHES = 8


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def make_trainer(mds, tokenizer):
    """Build a trainer of eight batches through llm-foundry, with dropout and evaluations."""

    def make(folder, duration=BATCHES, eval_interval="2ba", load_path=None, baseline=True):
        cfg = {"name": "mlm_text", "drop_last": True, "num_workers": 0, "pin_memory": False}
        shared = {"local": str(mds), "max_seq_len": 32}
        train, val = (
            build_dataloader({**copy.deepcopy(cfg), "dataset": {**shared, **extra}}, tokenizer, 48)
            for extra in (
                {"split": "train", "shuffle": True, "mlm_probability": 0.3},
                {"split": "val", "shuffle": False, "mlm_probability": 0.15},
            )
        )
        torch.manual_seed(0)
        model = build_composer_model("hf_bert_mlm", {"config_overrides": TINY}, tokenizer)
        memory = InMemoryLogger()
        trainer = Trainer(
            model=model,
            train_dataloader=train,
            eval_dataloader=val,
            optimizers=DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=1e-5),
            max_duration=f"{duration}ba",
            eval_interval=eval_interval,
            callbacks=[
                build_callback("seed_each_batch", {}),
                build_callback("loss_curve", {"unigram_baseline": baseline}),
            ],
            loggers=memory,
            run_name="tiny",
            save_folder=str(folder),
            save_interval="3ba",
            load_path=load_path,
            device="cpu",
            precision="fp32",
            device_train_microbatch_size=24,
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            seed=5,
        )
        return trainer, model, memory

    return make


def test_resumed_run_is_the_unbroken_run(make_trainer, tmp_path):
    """Weights are equal to the last bit, curves to the last digit; evaluation changes neither."""
    trainer, whole, memory = make_trainer(tmp_path / "whole")
    trainer.fit()
    trainer.close()
    rows = read_csv(tmp_path / "whole/loss_curve.csv")
    train = [row for row in rows if row["curve"] == "train"]
    evals = [row for row in rows if row["curve"] == "eval"]
    assert [int(row["batch"]) for row in train] == list(range(1, BATCHES + 1))
    assert [int(row["batch"]) for row in evals] == [2, 4, 6, 8]
    logged = [float(value) for _, value in memory.data["loss/train/total"]]
    assert [float(row["loss"]) for row in train] == logged
    logged = [float(v) for _, v in memory.data["metrics/eval/LanguageCrossEntropy"]]
    assert [float(row["loss"]) for row in evals] == logged
    assert logged[-1] < logged[0] < math.log(30528) + 0.5
    for name in ("unigram_cross_entropy", "unigram_entropy"):
        assert memory.data[f"baseline/{name}"]
        assert name in {row["curve"] for row in rows}
    with Image.open(tmp_path / "whole/loss_curve.png") as image:
        assert image.size == (1200, 800)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50

    # Cut one batch after the checkpoint of batch 3, as a killed run would be.
    trainer, _, _ = make_trainer(tmp_path / "cut", duration=4)
    trainer.fit()
    trainer.close()
    (tmp_path / "cut/ep0-ba4-rank0.pt").unlink()  # a killed run saves none at its end
    trainer, resumed, _ = make_trainer(
        tmp_path / "cut", load_path=str(tmp_path / "cut/ep0-ba3-rank0.pt")
    )
    # Composer takes the loaded RNG state between epochs only; make sure that nothing hangs on it.
    torch.manual_seed(999)
    trainer.fit()
    trainer.close()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert read_csv(tmp_path / "cut/loss_curve.csv") == rows

    trainer, blind, _ = make_trainer(tmp_path / "blind", eval_interval="8ba", baseline=False)
    trainer.fit()
    trainer.close()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, blind.get_parameter(name)), name


def draws(callback, batch, seed=7):
    state = State.__new__(State)
    state.rank_zero_seed = seed
    state.timestamp = _timestamp(batch)
    callback.batch_start(state, None)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _timestamp(batch):
    from composer.core import Timestamp

    return Timestamp(batch=batch)


def test_seed_each_batch(monkeypatch):
    first = draws(SeedEachBatch(), 3)
    assert draws(SeedEachBatch(), 3) == first
    for other in (
        draws(SeedEachBatch(), 4),
        draws(SeedEachBatch(), 3, seed=8),
        draws(SeedEachBatch(seed=8), 3),
    ):
        assert all(a != b for a, b in zip(first, other, strict=True))
    assert draws(SeedEachBatch(seed=7), 3, seed=123) == first
    monkeypatch.setattr("m2_plugin.foundry.callbacks.dist.get_global_rank", lambda: 1)
    assert draws(SeedEachBatch(), 3) != first


def test_loss_curve_state_is_two_strings():
    curve = LossCurve()
    curve.points = [(1, "train", 0.1 + 0.2), (1, "mnli, matched", 1e-17)]
    curve.baseline = {"unigram_entropy": 1 / 3}
    state = curve.state_dict()
    assert all(isinstance(leaf, str) for leaf in state.values())
    again = LossCurve()
    again.load_state_dict(state)
    assert again.points == curve.points
    assert again.baseline == curve.baseline
    assert _from_csv(_to_csv([])) == []


class Ids:
    """A dataset of token ids."""

    def __init__(self, tokenizer, rows):
        self.tokenizer, self.rows = tokenizer, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i]}


def test_unigram_baseline(tokenizer):
    special = len(tokenizer.all_special_ids)
    train = Ids(tokenizer, [[101, 1000, 1000, 1000, 2000, 102, 0, 0]] * 2)  # 6 and 2
    val = Ids(tokenizer, [[101, 1000, 2000, 3000, 102]])
    size = len(tokenizer) - special
    got = unigram_baseline(train, [val], max_samples=10)
    cross_entropy = -sum(math.log((n + 1) / (8 + size)) for n in (6, 2, 0)) / 3
    assert got["unigram_cross_entropy"] == pytest.approx(cross_entropy)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert got["unigram_entropy"] == pytest.approx(entropy)
    assert unigram_baseline(train, [Ids(tokenizer, [[101, 102]])], 10) == {}
    capped = unigram_baseline(train, [val], max_samples=1)
    cross_entropy = -sum(math.log((n + 1) / (4 + size)) for n in (3, 1, 0)) / 3
    assert capped["unigram_cross_entropy"] == pytest.approx(cross_entropy)


def test_figure_survives_odd_points(monkeypatch, tmp_path):
    """A NaN, equal ends, names with a dollar sign: one picture, its texts apart."""
    figures = []
    monkeypatch.setattr(draw._Panel, "finish", keep_figure(draw._Panel.finish, figures))
    curve = LossCurve(str(tmp_path), smoothing=1)
    curve.points = [(1, "train", math.nan), (2, "train", 3.0), (2, "a", 3.0), (2, "b", 3.0)]
    curve.baseline = {"unigram_entropy": 2.0}
    state = State.__new__(State)
    state.run_name = "run $1$"
    curve.fit_end(state, None)
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "run $1$"
    assert axes.get_xlabel() == "batch"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(labels) == {
        "training, smoothed", "evaluation (a)", "evaluation (b)", "unigram entropy: 2.000"
    }  # fmt: skip
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert len(heights) == 3
    assert min(np.diff(heights)) > 0  # equal values, texts apart
    with Image.open(tmp_path / "loss_curve.png") as image:
        assert image.size == (1200, 800)


def keep_figure(finish, figures):
    def kept(panel, *arguments):
        finish(panel, *arguments)
        figures.append(panel.figure)

    return kept


@pytest.mark.parametrize(
    ("save_folder", "expected"),
    [("ckpt/{run_name}", "ckpt/small"), ("s3://bucket/ckpt", None), (None, None)],
)
def test_local_save_folder(save_folder, expected):
    state = State.__new__(State)
    state.run_name = "small"
    state._callbacks = [CheckpointSaver(folder=save_folder)] if save_folder else []
    assert local_save_folder(state) == expected
