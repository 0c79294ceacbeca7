"""Callbacks: seeds that make a resumed run exact, and the curve of a run's losses."""

import csv
import io
import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from numpy.typing import NDArray

from m2_plugin.data.tokenizer import vocabulary_size
from m2_plugin.files import write_atomically
from m2_plugin.train_report.draw import draw
from m2_plugin.train_report.readers import CSV, MSE, loss_curve_series
from m2_plugin.train_report.runs import Run

__all__ = ["LossCurve", "SeedEachBatch", "local_save_folder"]

log = logging.getLogger(__name__)

# Evaluation metrics that are the loss of training: of tokens or classes, numbers, pairs of texts.
LOSSES = ("LanguageCrossEntropy", MSE, "ContrastiveEvalLoss")
TRAIN = "train"
Point = tuple[int, str, float]  # batch, curve, loss in nats


class SeedEachBatch(Callback):
    """Seed Python, NumPy and torch (all devices) at the start of each training batch.

    The seed depends on the run's seed, the batch and the rank only. Dropout in a resumed run
    therefore equals that of an unbroken run; Composer restores random states only between epochs.
    Evaluation uses the same generators, but the next training batch seeds them again.

    Args:
        seed: A seed to use instead of the run's.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        """Seed for the next batch."""
        del logger
        run_seed = state.rank_zero_seed if self.seed is None else self.seed
        batch = state.timestamp.batch.value
        words = np.random.SeedSequence([run_seed, batch, dist.get_global_rank()]).generate_state(1)
        seed = int(words[0])
        # Composer's seed_all logs a line per call.
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class LossCurve(Callback):
    """Draw the losses of a run to `loss_curve.png` and write them to `loss_curve.csv`.

    Rank 0 writes both after each evaluation and at the end. The points are part of the checkpoint,
    so that the curve of a resumed run has no gap and no repeats.

    Args:
        folder: The folder to write to; `{run_name}` is replaced. By default the run's
            `save_folder`, or `./{run_name}` if there is none or it is remote.
        eval_metric: The class name of the evaluation metric to draw; by default the loss that the
            model has: `LanguageCrossEntropy`, `MeanSquaredError` or `ContrastiveEvalLoss`.
        unigram_baseline: Whether to log and draw two losses, in nats, of a model that knows word
            frequencies only: see `unigram_baseline`.
        unigram_samples: The largest number of samples of each dataset to count for it.
        smoothing: The span, in batches, of the running mean over the training loss; by default
            1/50 of the points.
    """

    def __init__(
        self,
        folder: str | None = None,
        eval_metric: str | None = None,
        unigram_baseline: bool = False,
        unigram_samples: int = 20_000,
        smoothing: int | None = None,
    ):
        self.folder = folder
        self.eval_metric = eval_metric
        self.unigram_baseline = unigram_baseline
        self.unigram_samples = unigram_samples
        self.smoothing = smoothing
        self.column = "loss"  # in the CSV: this or mse
        self.points: list[Point] = []
        self.baseline: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the points as CSV strings: each is one entry, even in a sharded checkpoint."""
        return {"points": _to_csv(self.points), "baseline": _to_csv(self._baseline_rows())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the curve in a checkpoint."""
        self.points = _from_csv(state["points"])
        self.baseline = {name: value for _, name, value in _from_csv(state["baseline"])}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log the baseline; compute it if the checkpoint does not have it."""
        if not self.unigram_baseline:
            return
        if not self.baseline:
            found = [self._count_baseline(state) if dist.get_global_rank() == 0 else {}]
            dist.broadcast_object_list(found, src=0)
            self.baseline = found[0]
        logger.log_metrics({f"baseline/{name}": value for name, value in self.baseline.items()})
        logger.log_hyperparameters({f"baseline/{k}": v for k, v in self.baseline.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keep the loss of this batch; Composer has reduced it over the ranks."""
        del logger
        loss = state.total_loss_dict.get("loss/train/total")
        if loss is not None:
            self.points.append((state.timestamp.batch.value, TRAIN, float(loss)))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the evaluation loss, and write the files."""
        del logger
        label = state.dataloader_label or "eval"
        metrics = state.eval_metrics.get(label, {})
        names = LOSSES if self.eval_metric is None else (self.eval_metric,)
        name = next((name for name in names if name in metrics), None)
        if name is not None:
            self.column = "mse" if name == MSE else "loss"
            # All ranks call compute, a collective. A repeated evaluation replaces its point.
            point = (state.timestamp.batch.value, label, float(metrics[name].compute()))
            self.points = [p for p in self.points if p[:2] != point[:2]] + [point]
        self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the files."""
        del logger
        self._write(state)

    def _baseline_rows(self) -> list[Point]:
        return [(0, name, value) for name, value in self.baseline.items()]

    def _count_baseline(self, state: State) -> dict[str, float]:
        train = getattr(state.train_dataloader, "dataset", None)
        evals = [getattr(e.dataloader.dataloader, "dataset", None) for e in state.evaluators]
        evals = [dataset for dataset in evals if dataset is not None]
        if train is None or not evals:
            log.warning(
                "loss_curve: unigram_baseline is left out: it needs a training and an evaluation "
                "dataset."
            )
            return {}
        return unigram_baseline(train, evals, self.unigram_samples)

    def _write(self, state: State) -> None:
        if dist.get_global_rank() != 0 or not self.points:
            return
        folder = self.folder or local_save_folder(state) or "./{run_name}"
        folder = format_name_with_dist(folder, state.run_name)
        os.makedirs(folder, exist_ok=True)
        table = _to_csv(self._baseline_rows() + sorted(self.points), self.column)
        write_atomically(os.path.join(folder, "loss_curve.csv"), table)
        run = Run(state.run_name, Path(folder), loss_curve_series(table.splitlines()), {}, [CSV])
        picture = draw("loss", [run], smoothing=self.smoothing)
        write_atomically(os.path.join(folder, "loss_curve.png"), picture)


def local_save_folder(state: State) -> str | None:
    """Return the run's `save_folder`; None if there is none or it is remote."""
    for callback in state.callbacks:
        # If the folder is remote, `callback.folder` is a temporary one.
        if isinstance(callback, CheckpointSaver) and callback.remote_uploader is None:
            return format_name_with_dist(callback.folder, state.run_name)
    return None


def _to_csv(points: Iterable[Point], column: str = "loss") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("batch", "curve", column))
    writer.writerows(points)  # exact: csv writes floats with repr
    return text.getvalue()


def _from_csv(text: str) -> list[Point]:
    rows = csv.reader(io.StringIO(text))
    next(rows)
    return [(int(batch), curve, float(loss)) for batch, curve, loss in rows]


def unigram_baseline(train: Any, evals: Iterable[Any], max_samples: int) -> dict[str, float]:
    """Compute the loss of a model that knows word frequencies only.

    Special tokens do not count, since they are never masked.

    Args:
        train: A dataset with a `tokenizer` that gives `input_ids` per index, as `mlm_text` does.
        evals: Datasets of the same kind, counted together.
        max_samples: The largest number of samples of each dataset to count, spread evenly.

    Returns:
        Two losses in nats per token; empty if there are no tokens. `unigram_cross_entropy` is the
        cross-entropy of the evaluation tokens under the distribution of the training tokens, with
        one added to every count. `unigram_entropy` is the entropy of the training tokens, with the
        counts as they are.
    """
    tokenizer = train.tokenizer
    size = vocabulary_size(tokenizer)
    keep = np.ones(size, dtype=bool)
    keep[tokenizer.all_special_ids] = False
    counts = _count_tokens(train, size, max_samples)[keep]
    seen = np.zeros(len(counts))
    for dataset in evals:
        seen += _count_tokens(dataset, size, max_samples)[keep]
    if not counts.sum() or not seen.sum():
        return {}
    smoothed = (counts + 1.0) / (counts + 1.0).sum()
    return {
        "unigram_cross_entropy": float(-(seen * np.log(smoothed)).sum() / seen.sum()),
        "unigram_entropy": _entropy(counts),
    }


def _entropy(counts: NDArray[np.float64]) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _count_tokens(dataset: Any, vocab_size: int, max_samples: int) -> NDArray[np.float64]:
    size = dataset.size if hasattr(dataset, "size") else len(dataset)  # len() is per rank
    counts = np.zeros(vocab_size)
    for i in np.linspace(0, size - 1, num=min(size, max_samples)).astype(int):
        sample = dataset[int(i)]
        ids = np.asarray(sample["input_ids"] if isinstance(sample, dict) else sample)
        counts += np.bincount(ids, minlength=vocab_size)
    return counts
