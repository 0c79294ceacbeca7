"""A callback that writes a run's final evaluation, and predictions for data without labels."""

import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Evaluator, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from datasets import Dataset
from llmfoundry.data.dataloader import build_dataloader

from m2_plugin.data.labels import answer_columns, answers
from m2_plugin.data.write import write_rows
from m2_plugin.files import write_atomically, write_json
from m2_plugin.foundry.errors import RunError
from m2_plugin.foundry.evaluated import METRIC_NAMES, evaluated, finite, inner_model
from m2_plugin.foundry.models import CLASSIFICATION_METRICS, REGRESSION, SINGLE_LABEL
from m2_plugin.foundry.run_summary import count_parameters

__all__ = ["PACKAGES", "EvalResults"]

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
PACKAGES = ("m2-plugin", "llm-foundry", "mosaicml", "torch", "transformers")


class EvalResults(Callback):
    """Write the metrics of a run's last evaluation to `metrics.json`; `eval_results` in a YAML.

    The file appears when training is over, after all other files of this callback. NaN and infinite
    values are written as null. For a classifier it also has `commonest_answer`, the metrics of a
    model that always gives the commonest class (or the mean of the numbers), and
    `constant_predictions`, the evaluations in which the model gave the same answer to all rows.

    Args:
        folder: The folder to write to; `{run_name}` is replaced.
        predict: Loaders of data without labels, each in the schema of `eval_loader` with a `label`.
            `predictions/LABEL.csv` gets the texts and the columns that `m2-plugin predict` writes,
            in the order of the data, and `predictions/LABEL.npy` the logits, float32 (N,
            num_labels). A loader that cannot be built is left out, and `metrics.json` says why.
            Only for classifiers and regressions of texts; for others it is an error at the start.
        batch_size: The rows of a batch of predictions.
        progress: Whether to write `progress.json` every two seconds, with the loss and the share
            of training that is done.
    """

    def __init__(
        self,
        folder: str,
        predict: Sequence[Mapping[str, Any]] = (),
        batch_size: int = 64,
        progress: bool = False,
    ):
        for loader in predict:
            if not loader.get("label"):
                raise ValueError(f"eval_results.predict: each loader needs a label: {loader}.")
        self.folder = folder
        self.predict = [dict(loader) for loader in predict]
        self.batch_size = batch_size
        self.progress = progress
        self.loaders: dict[str, Any] = {}
        self.predictions: dict[str, Any] = {}
        self.metrics: dict[str, dict[str, float | None]] = {}
        self.commonest: dict[str, dict[str, float | None]] = {}
        self.ranges: dict[str, list[tuple[float, float]]] = {}  # of the answers, by label
        self.evaluated_at = -1
        self.fit_ended = False
        self.last_progress = -PROGRESS_SECONDS

    def fit_start(self, state: State, logger: Logger) -> None:
        """Build the loaders to predict, so that an error comes before training."""
        del logger
        if self.predict and not _classifies(inner_model(state)):
            raise RunError(
                "callbacks.eval_results.predict is for classes or numbers of texts: for another "
                "model use m2-plugin predict after training"
            )
        self.folder = format_name_with_dist(self.folder, state.run_name)
        os.makedirs(self.folder, exist_ok=True)
        tokenizer = getattr(inner_model(state), "tokenizer", None)
        for config in self.predict:
            label = config["label"]
            loader = {key: value for key, value in config.items() if key != "label"}
            try:
                self.loaders[label] = build_dataloader(loader, tokenizer, self.batch_size)
            except ValueError as error:
                log.warning("No predictions of %s: %s", label, error)
                self.predictions[label] = {"error": str(error)}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the progress, but not after every batch: reading the loss waits for the device."""
        del logger
        if not self.progress or time.monotonic() - self.last_progress < PROGRESS_SECONDS:
            return
        self.last_progress = time.monotonic()
        loss = state.total_loss_dict.get("loss/train/total")
        if dist.get_global_rank() == 0 and loss is not None:
            value = {"done": _share_done(state), "loss": finite(float(loss))}
            write_json(os.path.join(self.folder, "progress.json"), value)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forget the answers of the evaluation before."""
        del logger
        self.ranges.pop(str(state.dataloader_label), None)

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Keep the range of the answers to a batch."""
        del logger
        if not _classifies(inner_model(state)):
            return
        answers = state.outputs.argmax(1) if state.outputs.ndim == 2 else state.outputs
        low, high = torch.stack(answers.aminmax()).tolist()
        self.ranges.setdefault(str(state.dataloader_label), []).append((low, high))

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Keep the metrics. All ranks take part, since `compute` is a collective operation."""
        del logger
        self.metrics = evaluated(state)
        self.commonest = self.commonest or {
            evaluator.label.removeprefix("eval/"): found
            for evaluator in state.evaluators
            if (found := _commonest_answer(evaluator, inner_model(state)))
        }
        self.evaluated_at = state.timestamp.batch.value
        if self.fit_ended:
            self._finish(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the files, unless an evaluation of the final weights follows."""
        del logger
        self.fit_ended = True
        if self.evaluated_at == state.timestamp.batch.value:
            self._finish(state)

    def _finish(self, state: State) -> None:
        for label, loader in self.loaders.items():
            self.predictions[label] = self._predict(state, label, loader.dataloader)
        ranges = dist.all_gather_object(self.ranges)
        if dist.get_global_rank() != 0:
            return
        model = inner_model(state)
        report = {
            "metrics": self.metrics,
            "commonest_answer": self.commonest,
            "constant_predictions": [
                label.removeprefix("eval/")
                for label in self.ranges
                if _is_constant([found for rank in ranges for found in rank.get(label, [])])
            ],
            "model": {
                "type": getattr(model.config, "model_type", None),
                "parameters": count_parameters(state),
            },
            "predictions": self.predictions,
            "batches": state.timestamp.batch.value,
            "seed": state.rank_zero_seed,
            "precision": str(state.precision.value),
            "device": state.device.name,
            "versions": {package: version(package) for package in PACKAGES},
        }
        write_json(os.path.join(self.folder, "metrics.json"), report)

    def _predict(self, state: State, label: str, loader: Any) -> dict[str, Any]:
        """Predict on all ranks, and write on rank 0."""
        rows = len(loader.dataset)
        model, was_training = state.model, state.model.training
        model.eval()
        with torch.no_grad(), get_precision_context(state.precision):
            logits = [
                model(state.device.batch_to_device(batch))["logits"].float().cpu()
                for batch in loader
            ]
        model.train(was_training)
        parts = dist.all_gather_object(torch.cat(logits).numpy())
        # Rank r has rows r, r + world_size, ...; the sampler may repeat rows at the end.
        merged = np.stack(parts, axis=1).reshape(-1, parts[0].shape[-1])[:rows]
        if dist.get_global_rank() == 0:
            folder = os.path.join(self.folder, "predictions")
            os.makedirs(folder, exist_ok=True)
            write_atomically(os.path.join(folder, f"{label}.npy"), _npy(merged))
            config = inner_model(state).config
            self._write_csv(Path(folder) / f"{label}.csv", config, loader, merged)
        return {"rows": rows}

    def _write_csv(self, path: Path, config: Any, loader: Any, logits: Any) -> None:
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        regression = config.num_labels == 1
        texts = [c for c in ("text", "text_pair") if c in loader.dataset.column_names]
        found = answers(logits, names, regression)
        rows = (
            row | answer
            for row, answer in zip(loader.dataset.select_columns(texts), found, strict=True)
        )
        write_rows(path, rows, [*texts, *answer_columns(names, regression)])


def _classifies(model: Any) -> bool:
    """Tell whether a model gives one class, or one number, for each row."""
    config = getattr(model, "config", None)
    return getattr(config, "problem_type", None) in (REGRESSION, SINGLE_LABEL)


def _is_constant(ranges: Sequence[tuple[float, float]]) -> bool:
    """Tell whether all answers are equal, or are NaN."""
    low, high = np.array(ranges).T
    return not low.min() < high.max()


def _commonest_answer(evaluator: Evaluator, model: Any) -> dict[str, float | None]:
    """Return the metrics of a model that knows only how often each class occurs.

    It gives these shares as probabilities, so that its cross-entropy is the entropy of the classes.
    For a regression it gives the mean. Without labels, or for other models, there are none.
    """
    data = getattr(evaluator.dataloader.dataloader, "dataset", None)
    if not _classifies(model) or not isinstance(data, Dataset) or "label" not in data.column_names:
        return {}
    labels, n = torch.tensor(list(data["label"])), model.config.num_labels
    if n == 1:
        answers = labels.mean().expand(len(labels))
    else:
        answers = torch.bincount(labels, minlength=n).log().expand(len(labels), n)
    found = {}
    for name in [METRIC_NAMES.get(name, "") for name in evaluator.metric_names]:
        if name not in CLASSIFICATION_METRICS:
            continue
        metric = CLASSIFICATION_METRICS[name](n)
        metric.sync_on_compute = False  # each rank has all labels
        metric.update(answers, labels)
        found[name] = finite(float(metric.compute()))
    return found


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _share_done(state: State) -> float:
    """Return the share of training that is done, within an epoch too."""
    assert state.max_duration is not None
    done = float(state.timestamp.get(state.max_duration.unit) / state.max_duration)
    if state.max_duration.unit.value == "ep" and state.dataloader_len is not None:
        within = state.timestamp.batch_in_epoch.value / state.dataloader_len.value
        done += within / state.max_duration.value
    return min(done, 1.0)
