"""GLUE's metrics, defined where torchmetrics' and composer's are not.

Predictions that are all one class, or constant, leave correlations and F1 undefined: 0 / 0. Here
they are 0, as scikit-learn has it for Matthews and F1: such predictions show no skill, and a NaN
would take a whole average with it. scipy's correlations of a constant are NaN.

The classes keep the names of those they extend, because the trainer logs metrics by class name.
"""

from typing import Any

import composer.metrics
import torch
import torchmetrics
from torch import Tensor
from torchmetrics import classification

__all__ = [
    "BinaryF1Score",
    "MulticlassMatthewsCorrCoef",
    "PearsonCorrCoef",
    "SpearmanCorrCoef",
]


class BinaryF1Score(composer.metrics.BinaryF1Score):
    """F1 of class 1 over logits (B, 2) and labels (B,); 0 where class 1 neither is nor is said."""

    def compute(self) -> Tensor:
        """Returns F1, from 0 to 1."""
        return super().compute().nan_to_num(0.0)


class MulticlassMatthewsCorrCoef(classification.MulticlassMatthewsCorrCoef):
    """Matthews correlation over logits (B, C) and labels (B,).

    torchmetrics gives other values than scikit-learn where all predictions or all labels are of
    one class, 1 if they agree, and counts in fp32, where the squares of large sets round.
    """

    def compute(self) -> Tensor:
        """Returns the correlation, from -1 to 1; 0 where labels or predictions are one class."""
        confusion = self.confmat.double()  # (C, C), label by prediction
        total, right = confusion.sum(), confusion.trace()
        labels, predictions = confusion.sum(1), confusion.sum(0)
        covariance = right * total - labels @ predictions
        variances = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
        return torch.where(variances > 0, covariance / variances.sqrt(), 0.0).float()


class PearsonCorrCoef(torchmetrics.PearsonCorrCoef):
    """Pearson correlation of predictions (B,) and labels (B,); 0 where one is constant.

    Accumulated in fp64: predictions that hardly differ are lost in fp32.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        super().update(preds.double(), target.double())

    def compute(self) -> Tensor:
        """Returns the correlation, from -1 to 1."""
        return super().compute().nan_to_num(0.0).float()


class SpearmanCorrCoef(torchmetrics.SpearmanCorrCoef):
    """Spearman correlation of predictions (B,) and labels (B,); 0 where one is constant."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        super().update(preds.double(), target.double())

    def compute(self) -> Tensor:
        """Returns the correlation, from -1 to 1."""
        return super().compute().nan_to_num(0.0).float()
