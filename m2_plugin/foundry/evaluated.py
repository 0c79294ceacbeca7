"""What a run's last evaluation gave, by the names that `m2-plugin evaluate` has for metrics."""

import math
from typing import Any

from composer.core import State

from m2_plugin.foundry.question_answering import ANSWER_METRICS
from m2_plugin.foundry.token_classification import TOKEN_METRICS

__all__ = ["METRIC_NAMES", "evaluated", "finite", "inner_model"]

# Class names of metrics, which Composer uses, and the names that YAMLs and commands have.
METRIC_NAMES = {
    "MulticlassAccuracy": "accuracy",
    "BinaryF1Score": "f1",
    "MulticlassF1Score": "f1",
    "MulticlassMatthewsCorrCoef": "matthews",
    "LanguageCrossEntropy": "cross_entropy",
    "LanguagePerplexity": "perplexity",
    "MaskedAccuracy": "masked_accuracy",
    "PearsonCorrCoef": "pearson",
    "SpearmanCorrCoef": "spearman",
    "MeanSquaredError": "mse",
    "ContrastiveEvalLoss": "contrastive_loss",
}
METRIC_NAMES |= {cls.__name__: name for name, cls in (TOKEN_METRICS | ANSWER_METRICS).items()}


def evaluated(state: State) -> dict[str, dict[str, float | None]]:
    """Return the values of the last evaluation: label → metric → value, None if it is not finite.

    All ranks must call it.
    """
    return {
        label.removeprefix("eval/"): {
            METRIC_NAMES.get(name, name): finite(float(metric.compute()))
            for name, metric in metrics.items()
        }
        for label, metrics in state.eval_metrics.items()
    }


def finite(value: float) -> float | None:
    """Return the value, or None in place of NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def inner_model(state: State) -> Any:
    """Return the Composer model, even if DDP wraps it."""
    return getattr(state.model, "module", state.model)
