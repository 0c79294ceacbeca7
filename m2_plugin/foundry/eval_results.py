"""A callback that writes a run's final evaluation, and predictions for data without labels."""

import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from llmfoundry.data.dataloader import build_dataloader

from m2_plugin.files import write_atomically, write_json
from m2_plugin.foundry.models import CLASSIFICATION_METRICS

__all__ = ["EvalResults"]

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
PACKAGES = ("m2-plugin", "llm-foundry", "mosaicml", "torch", "transformers")


class EvalResults(Callback):
    """Write the metrics of a run's last evaluation to `metrics.json`; `eval_results` in a YAML.

    The file appears when training is over, after all other files of this callback. NaN and infinite
    values are written as null.

    Args:
        folder: The folder to write to; `{run_name}` is replaced.
        predict: Loaders of data without labels, each in the schema of `eval_loader` with a `label`.
            `predictions/LABEL.npy` gets the logits, float32 (N, num_labels), in the order of the
            data. A loader that cannot be built is left out, and `metrics.json` says why.
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
        self.evaluated_at = -1
        self.fit_ended = False
        self.last_progress = -PROGRESS_SECONDS

    def fit_start(self, state: State, logger: Logger) -> None:
        """Build the loaders to predict, so that an error comes before training."""
        del logger
        self.folder = format_name_with_dist(self.folder, state.run_name)
        os.makedirs(self.folder, exist_ok=True)
        tokenizer = getattr(_inner(state), "tokenizer", None)
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
            value = {"done": _share_done(state), "loss": _finite(float(loss))}
            write_json(os.path.join(self.folder, "progress.json"), value)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Keep the metrics. All ranks take part, since `compute` is a collective operation."""
        del logger
        names = _metric_names(_inner(state))
        self.metrics = {
            label.removeprefix("eval/"): {
                names.get(name, name): _finite(float(metric.compute()))
                for name, metric in metrics.items()
            }
            for label, metrics in state.eval_metrics.items()
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
        if dist.get_global_rank() != 0:
            return
        report = {
            "metrics": self.metrics,
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
        return {"rows": rows}


def _inner(state: State) -> Any:
    """Return the Composer model, even if DDP wraps it."""
    return getattr(state.model, "module", state.model)


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _share_done(state: State) -> float:
    """Return the share of training that is done, within an epoch too."""
    assert state.max_duration is not None
    done = float(state.timestamp.get(state.max_duration.unit) / state.max_duration)
    if state.max_duration.unit.value == "ep" and state.dataloader_len is not None:
        within = state.timestamp.batch_in_epoch.value / state.dataloader_len.value
        done += within / state.max_duration.value
    return min(done, 1.0)


def _metric_names(model: Any) -> dict[str, str]:
    """Map class names of metrics, which Composer uses, to their names in a YAML."""
    n = max(getattr(model.config, "num_labels", 2), 2)
    return {type(make(n)).__name__: name for name, make in CLASSIFICATION_METRICS.items()}
