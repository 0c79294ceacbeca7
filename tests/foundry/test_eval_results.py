"""The final evaluation as a file, and predictions in the order of the data."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer import Callback, Evaluator, Trainer
from llmfoundry.utils.builders import (
    add_metrics_to_eval_loaders,
    build_callback,
    build_composer_model,
    build_dataloader,
    build_evaluators,
    build_optimizer,
)

from m2_plugin.data.rows import read_rows
from m2_plugin.foundry.errors import RunError
from m2_plugin.foundry.eval_results import EvalResults, _commonest_answer, _is_constant
from m2_plugin.foundry.evaluated import METRIC_NAMES
from m2_plugin.foundry.models import CLASSIFICATION_METRICS

GLUE = Path(__file__).parent / "data" / "glue"
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "hyena_filter_order": 4}


def loader(task: str, split: str, **keys) -> dict:
    dataset = {"task": task, "split": split, "path": str(GLUE), "max_seq_len": 16, **keys}
    return {"name": "glue", "dataset": dataset, "num_workers": 0, "pin_memory": False}


@pytest.fixture
def train(tokenizer, tmp_path):
    """Runs two epochs of four batches on MNLI; returns the trainer."""

    def run(callbacks: list[Callback], eval_interval: str = "3ba", max_duration: str = "2ep"):
        torch.manual_seed(0)
        config = {"num_labels": 3, "metrics": ["accuracy"], "config_overrides": dict(TINY)}
        model = build_composer_model("m2_bert_classification", config, tokenizer)
        evals = [
            {"label": f"mnli_{kind}", **loader("mnli", f"validation_{kind}")}
            for kind in ("matched", "mismatched")
        ]
        evaluators, _, _ = build_evaluators(
            evals, None, None, tokenizer=tokenizer, device_eval_batch_size=5, icl_seq_len=16,
            icl_subset_num_batches=None,
        )  # fmt: skip
        names = list(model.get_metrics(is_train=False))
        trainer = Trainer(
            model=model,
            train_dataloader=build_dataloader(loader("mnli", "train"), tokenizer, 8),
            eval_dataloader=add_metrics_to_eval_loaders(evaluators, names),
            eval_interval=eval_interval,
            max_duration=max_duration,
            optimizers=build_optimizer(model, "torch_adamw", {"lr": 1e-2}),
            callbacks=callbacks,
            progress_bar=False,
            log_to_console=False,
            device="cpu",
            seed=3,
            accumulate_train_batch_on_tokens=False,
        )
        trainer.fit()
        return trainer

    return run


def accuracy(model, tokenizer, split: str) -> float:
    right = total = 0
    for batch in build_dataloader(loader("mnli", split), tokenizer, 64).dataloader:
        logits = predict(model, batch)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        total += len(logits)
    return right / total


@torch.no_grad()
def predict(model, batch) -> torch.Tensor:
    keys = ("input_ids", "attention_mask", "token_type_ids")
    return model.model.eval()(**{key: batch[key] for key in keys}).logits


# 8 batches: an evaluation at the last one, or one that the trainer adds after training.
@pytest.mark.parametrize("eval_interval", ["4ba", "3ba", "1ep"])
def test_metrics_are_those_of_the_final_weights(train, tokenizer, tmp_path, eval_interval):
    callback = build_callback("eval_results", {"folder": str(tmp_path / "{run_name}")})
    trainer = train([callback], eval_interval)
    report = json.loads((tmp_path / trainer.state.run_name / "metrics.json").read_text())
    assert set(report["metrics"]) == {"mnli_matched", "mnli_mismatched"}
    for label, metrics in report["metrics"].items():
        expected = accuracy(trainer.state.model, tokenizer, label.replace("mnli", "validation"))
        assert metrics == {"accuracy": pytest.approx(expected, abs=1e-6)}
        labels = [row["label"] for row in build_dataloader(
            loader("mnli", label.replace("mnli", "validation")), tokenizer, 64
        ).dataloader.dataset]  # fmt: skip
        share = max(labels.count(i) for i in range(3)) / len(labels)
        assert report["commonest_answer"][label] == {"accuracy": pytest.approx(share, abs=1e-6)}
    parameters = sum(p.numel() for p in trainer.state.model.parameters())
    assert report["model"] == {"type": "m2_bert", "parameters": parameters}
    assert report["batches"] == 8 and report["seed"] == 3 and report["precision"] == "fp32"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]


def test_nothing_is_written_before_the_end(train, tmp_path):
    class Stop(Callback):
        def batch_end(self, state, logger):
            assert not (tmp_path / "metrics.json").exists()
            if state.timestamp.batch == 7:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train([EvalResults(str(tmp_path)), Stop()])
    assert not (tmp_path / "metrics.json").exists()


def test_predictions_are_the_models_in_the_order_of_the_file(train, tokenizer, tmp_path):
    predictions = [
        {"label": "mnli_matched", **loader("mnli", "test_matched")},
        {"label": "ax", **loader("ax", "test")},
        {"label": "gone", **loader("qqp", "test", path="/nowhere")},
    ]
    callback = EvalResults(str(tmp_path), predict=predictions, batch_size=4, progress=True)
    trainer = train([callback])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["predictions"]["ax"] == {"rows": 6}
    assert "/nowhere" in report["predictions"]["gone"]["error"]
    files = {f"{label}.{ending}" for label in ("mnli_matched", "ax") for ending in ("csv", "npy")}
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == files
    for label, split in (("mnli_matched", "test_matched"), ("ax", "test")):
        saved = np.load(tmp_path / "predictions" / f"{label}.npy")
        data = loader(label.split("_")[0], split)
        (batch,) = build_dataloader(data, tokenizer, 64).dataloader
        expected = predict(trainer.state.model, batch).numpy()
        assert saved.dtype == np.float32 and saved.shape == (6, 3)
        np.testing.assert_allclose(saved, expected, atol=1e-5)
        rows = [row.values for row in read_rows(str(tmp_path / "predictions" / f"{label}.csv"))]
        assert list(rows[0]) == [
            *("text", "text_pair", "prediction"), *(f"probability_LABEL_{i}" for i in range(3))
        ]  # fmt: skip
        assert [row["prediction"] for row in rows] == [f"LABEL_{i}" for i in expected.argmax(1)]
        shares = [[float(row[f"probability_LABEL_{i}"]) for i in range(3)] for row in rows]
        powers = np.exp(expected)
        np.testing.assert_allclose(shares, powers / powers.sum(1, keepdims=True), atol=1e-5)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert 0 < progress["done"] <= 1 and progress["loss"] > 0


def test_a_prediction_without_a_label_is_an_error():
    with pytest.raises(ValueError, match="each loader needs a label"):
        EvalResults(".", predict=[loader("mnli", "test_matched")])


def test_predictions_of_another_model_are_refused_at_the_start():
    state = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(problem_type=None)))
    predict = [{"label": "new", **loader("mnli", "test_matched")}]
    with pytest.raises(RunError, match=r"eval_results\.predict is for classes .*m2-plugin predict"):
        EvalResults(".", predict=predict).fit_start(state, None)


class Broken(Callback):
    """Give the classifier one answer for all rows, before each evaluation."""

    def batch_end(self, state, logger):
        state.model.model.classifier.weight.data.zero_()
        state.model.model.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0])


def test_the_same_answer_to_all_rows_is_noted(train, tmp_path):
    train([EvalResults(str(tmp_path)), Broken()])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["constant_predictions"]) == {"mnli_matched", "mnli_mismatched"}
    assert _is_constant([(1.0, 1.0), (1.0, 1.0)]) and _is_constant([(math.nan, math.nan)])
    assert not _is_constant([(1.0, 1.0), (0.0, 0.0)]) and not _is_constant([(0.0, 2.0)])


def test_the_commonest_answer_of_numbers_is_their_mean(tokenizer):
    numbers = loader("stsb", "validation")
    config = {"num_labels": 1, "metrics": ["spearman", "mse"], "config_overrides": dict(TINY)}
    model = build_composer_model("m2_bert_classification", config, tokenizer)
    spec = build_dataloader(numbers, tokenizer, 64)
    labels = np.array(spec.dataloader.dataset["label"])
    found = _commonest_answer(
        Evaluator(label="stsb", dataloader=spec, metric_names=list(model.get_metrics(False))), model
    )
    assert found == {"spearman": 0.0, "mse": pytest.approx(labels.var(), rel=1e-5)}

    config = {"num_labels": 2, "metrics": ["f1", "matthews", "cross_entropy"]}
    model = build_composer_model(
        "m2_bert_classification", {**config, "config_overrides": dict(TINY)}, tokenizer
    )
    spec = build_dataloader(loader("cola", "validation"), tokenizer, 64)
    labels = np.array(spec.dataloader.dataset["label"])
    found = _commonest_answer(
        Evaluator(label="cola", dataloader=spec, metric_names=list(model.get_metrics(False))), model
    )
    share = labels.mean()
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert found["cross_entropy"] == pytest.approx(entropy, rel=1e-5) and found["matthews"] == 0
    guess = int(share > 0.5)  # the first of equally common classes
    assert found["f1"] == pytest.approx(2 * share / (1 + share) if guess else 0.0, rel=1e-5)


def test_every_metric_has_its_yamls_name():
    for n in (2, 3):
        made = {type(make(n)).__name__: name for name, make in CLASSIFICATION_METRICS.items()}
        assert made.items() <= METRIC_NAMES.items()
