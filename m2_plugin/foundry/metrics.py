"""GLUE's metrics, with a value also for inputs where torchmetrics and Composer give NaN.

And a base class for metrics of units that lie in several batches, on any rank.

If all predictions are one class, or constant, correlations and F1 are 0 / 0. Here they are 0, as in
scikit-learn for Matthews and F1: such predictions show no skill, and one NaN would spoil an average
over tasks. (scipy gives NaN for correlations of a constant.)

The classes keep the names of the classes they extend: the trainer logs metrics by class name.
"""

from typing import Any

import composer.metrics
import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import classification

__all__ = [
    "BinaryF1Score",
    "MulticlassMatthewsCorrCoef",
    "PearsonCorrCoef",
    "RowMetric",
    "SpearmanCorrCoef",
]


class BinaryF1Score(composer.metrics.BinaryF1Score):
    """F1 of class 1 over logits (B, 2) and labels (B,).

    0 if class 1 occurs in neither labels nor predictions.
    """

    def compute(self) -> Tensor:
        """Return F1, from 0 to 1."""
        return super().compute().nan_to_num(0.0)


class MulticlassMatthewsCorrCoef(classification.MulticlassMatthewsCorrCoef):
    """Matthews correlation over logits (B, C) and labels (B,).

    Equal to scikit-learn's. torchmetrics differs if all predictions or all labels are one class
    (1 if they agree), and computes in fp32, which rounds the squares of large counts.
    """

    def compute(self) -> Tensor:
        """Return the correlation, from -1 to 1; 0 if labels or predictions are one class."""
        confusion = self.confmat.double()  # (C, C), label by prediction
        total, right = confusion.sum(), confusion.trace()
        labels, predictions = confusion.sum(1), confusion.sum(0)
        covariance = right * total - labels @ predictions
        variances = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
        return torch.where(variances > 0, covariance / variances.sqrt(), 0.0).float()


class PearsonCorrCoef(torchmetrics.PearsonCorrCoef):
    """Pearson correlation of predictions (B,) and labels (B,); 0 if one is constant.

    Accumulated in fp64, since fp32 loses predictions that hardly differ.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        super().update(preds.double(), target.double())

    def compute(self) -> Tensor:
        """Return the correlation, from -1 to 1."""
        return super().compute().nan_to_num(0.0).float()


class SpearmanCorrCoef(torchmetrics.SpearmanCorrCoef):
    """Spearman correlation of predictions (B,) and labels (B,); 0 if one is constant."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        super().update(preds.double(), target.double())

    def compute(self) -> Tensor:
        """Return the correlation, from -1 to 1."""
        return super().compute().nan_to_num(0.0).float()


class RowMetric(torchmetrics.Metric):
    """A metric of rows of numbers, which are gathered from all ranks.

    For units such as sentences whose parts lie in several batches: a subclass groups the rows. A
    row may occur twice, since a sampler repeats rows so that ranks have equally many.

    Args:
        columns: The numbers in a row.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        # A rank without rows gives torchmetrics an empty vector of the metric's dtype, so the state
        # is a vector of this dtype too. fp64 has all integers to 2^53.
        self.set_dtype(torch.float64)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """Add rows, (N, columns)."""
        self.rows.append(rows.double().flatten())

    def table(self) -> NDArray[np.float64]:
        """Return the rows, (N, columns)."""
        rows = self.rows if isinstance(self.rows, list) else [self.rows]
        if not rows:
            return np.zeros((0, self.columns))
        return torch.cat(rows).cpu().numpy().reshape(-1, self.columns)
