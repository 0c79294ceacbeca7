"""Composer models: M2-BERT and any Hugging Face BERT, for masked language modelling and GLUE.

The four registered classes are one implementation; they differ in class attributes. In a YAML:

    model:
      name: m2_bert_mlm                   # or hf_bert_mlm, with the same keys
      config_overrides: {num_hidden_layers: 12, hidden_size: 768}

    model:
      name: m2_bert_classification        # or hf_bert_classification
      pretrained_model_name_or_path: ./exported/m2-bert-base
      num_labels: 3
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from composer.metrics import LanguageCrossEntropy
from composer.models.huggingface import HuggingFaceModel
from llmfoundry.utils.builders import build_metric
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from m2_plugin.data.labels import in_data
from m2_plugin.data.labels import label_names as read_label_names
from m2_plugin.foundry.errors import one_line
from m2_plugin.foundry.flops import FlopCounter
from m2_plugin.foundry.metrics import (
    BinaryF1Score,
    MulticlassMatthewsCorrCoef,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)

# Importing the package registers model_type m2_bert with transformers' Auto classes.
from m2_plugin.foundry.starting_points import build_from_keys, prepare_for_composer
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX

__all__ = ["HFBertClassification", "HFBertMLM", "M2BertClassification", "M2BertMLM"]

REGRESSION = "regression"
SINGLE_LABEL = "single_label_classification"

CLASSIFICATION_METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: MulticlassAccuracy(num_classes=n, average="micro"),
    # GLUE's F1 is that of class 1; with more classes, the unweighted mean over classes.
    "f1": lambda n: BinaryF1Score() if n == 2 else MulticlassF1Score(num_classes=n),
    "matthews": lambda n: MulticlassMatthewsCorrCoef(num_classes=n),
    # Not composer's CrossEntropy, which averages batch means: wrong with a smaller last batch.
    "cross_entropy": lambda n: LanguageCrossEntropy(),
    "pearson": lambda n: PearsonCorrCoef(),
    "spearman": lambda n: SpearmanCorrCoef(),
    "mse": lambda n: MeanSquaredError(),
}


class BertComposerModel(HuggingFaceModel):
    """A transformers encoder with a head, built from YAML keys.

    Args:
        tokenizer: The run's tokenizer; llm-foundry passes it.
        pretrained_model_name_or_path: A transformers folder, a hub name, or a file: a Composer
            checkpoint (.pt) or bare weights (.bin, .safetensors), of this package or of the M2
            reference. None builds a new model of `model_type`.
        pretrained: Whether to load the weights too, not only the config. The default is True if
            `pretrained_model_name_or_path` is given.
        model_type: The transformers model type of a new model.
        config_overrides: Config fields to replace.
        init_device: "cpu", "meta" or "mixed", as for llm-foundry's models.
        metrics: Names of the evaluation metrics, in place of the default ones.
        additional_eval_metrics: Names of more evaluation metrics.
        additional_train_metrics: Names of more training metrics; needs `use_train_metrics`.
        use_train_metrics: Whether to compute the metrics on training batches too, which costs
            time. The training loss is always logged.
        allow_embedding_resizing: Whether to enlarge a vocabulary that is smaller than the
            tokenizer's. If not, such a vocabulary is an error.

    Raises:
        ValueError: For an unknown config field, a missing folder, a vocabulary smaller than the
            tokenizer's, weights that do not fit, or an unknown metric.
    """

    auto_class: Any
    default_model_type: str

    @one_line()
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pretrained_model_name_or_path: str | None = None,
        pretrained: bool | None = None,
        model_type: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        init_device: str = "cpu",
        metrics: Sequence[str] | None = None,
        additional_eval_metrics: Sequence[str] | None = None,
        additional_train_metrics: Sequence[str] | None = None,
        use_train_metrics: bool = False,
        allow_embedding_resizing: bool = False,
    ):
        inner = build_from_keys(
            self.auto_class,
            model_type,
            self.default_model_type,
            tokenizer=tokenizer,
            path=pretrained_model_name_or_path,
            pretrained=pretrained,
            config_overrides=config_overrides,
            init_device=init_device,
            allow_embedding_resizing=allow_embedding_resizing,
        )
        config = inner.config
        names = list(metrics if metrics is not None else self.default_metrics(config))
        train_names = [*names, *(additional_train_metrics or ())] if use_train_metrics else []
        eval_names = [*names, *(additional_eval_metrics or ())]
        super().__init__(
            model=inner,
            tokenizer=tokenizer,
            use_logits=True,
            metrics=[self.build_metric(name, config) for name in train_names],
            eval_metrics=[self.build_metric(name, config) for name in eval_names],
            shift_labels=False,
            allow_embedding_resizing=allow_embedding_resizing,
        )
        self.count_flops = FlopCounter(self.model)
        prepare_for_composer(self.model)  # after resizing, which replaces modules

    def flops_per_batch(self, batch: Mapping[str, Any]) -> float:
        """Count the operations of a training step on this rank's batch; see `FlopCounter`.

        Composer's `speed_monitor` logs from it `throughput/flops_per_sec` and, on GPUs whose peak
        it knows, `throughput/device/mfu`.
        """
        return self.count_flops(batch)

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        """Return the names of the default metrics for a config."""
        raise NotImplementedError

    @staticmethod
    def build_metric(name: str, config: PretrainedConfig) -> Metric:
        """Build a metric by its name in llm-foundry's registry."""
        return build_metric(name, {})


class _MaskedLM(BertComposerModel):
    """Masked language modelling: logits and metrics at the masked positions only."""

    auto_class = AutoModelForMaskedLM

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        return ("language_cross_entropy", "masked_accuracy")

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model.

        With labels, M2-BERT's decoder runs only at the M masked positions and returns logits
        (M, V), and none in training without metrics. Composer passes these two arguments only to
        models whose forward accepts them.

        Args:
            batch: `input_ids`, `attention_mask`, ... each (B, L), with or without `labels`.
        """
        labelled = "labels" in batch
        unread = labelled and self.training and not self.train_metrics
        return super().forward({**batch, "masked_logits_only": labelled, "loss_only": unread})

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> torch.Tensor:
        """Return fp32 logits (M, V) at the M masked positions; keep their labels for the metrics.

        Args:
            batch: A batch with `labels` (B, L), -100 at positions that are not masked.
            outputs: The outputs of `forward` on this batch, if it ran already.
        """
        outputs = self.forward(batch) if outputs is None else outputs
        chosen = batch["labels"] != IGNORE_INDEX  # (B, L)
        logits = outputs["logits"]
        self.labels = batch["labels"][chosen]
        return (logits[chosen] if logits.ndim == 3 else logits).float()

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict[str, Any]:
        """Update a metric; skip a batch without masked positions."""
        if self.labels is not None and self.labels.numel() == 0:
            return {}
        return super().update_metric(batch, outputs, metric)


class _Classification(BertComposerModel):
    """Sequence classification, or regression with one label.

    Args:
        num_labels: Number of classes; 1 is regression. By default the number of `label_names`, or 1
            with `regression`, or 2.
        label_names: The names of the classes in the order of their ids, or the data that has them,
            as in the dataloader `text_classification`. They become `id2label` and `label2id` of
            the saved config.
        regression: Whether the model predicts a number. Then `label_names` that stand for the names
            in some data are not read.
        problem_type: "regression" or "single_label_classification"; by default from `num_labels`.
        config_overrides: Config fields to replace.
        **kwargs: More arguments of `BertComposerModel`. `metrics` may also name accuracy, f1,
            matthews, cross_entropy, pearson, spearman and mse.

    Raises:
        ValueError: If the problem type or the names do not fit the number of labels.
    """

    auto_class = AutoModelForSequenceClassification

    @one_line()
    def __init__(
        self,
        num_labels: int | None = None,
        problem_type: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        label_names: Any = None,
        regression: bool = False,
        **kwargs: Any,
    ):
        names = None
        if regression:
            if num_labels not in (None, 1) or (label_names and not in_data(label_names)):
                raise ValueError(
                    "model has regression: true, and num_labels or label_names for classes: remove "
                    "one of them."
                )
            num_labels = 1
        else:
            names = read_label_names(label_names, "model.label_names")
        if names is not None and num_labels not in (None, len(names)):
            raise ValueError(
                f"model.num_labels is {num_labels}, but label_names are {len(names)}: "
                f"{', '.join(names[:20])}. Remove num_labels, or list the names."
            )
        num_labels = num_labels or len(names or ()) or 2
        problem_type = problem_type or (REGRESSION if num_labels == 1 else SINGLE_LABEL)
        if problem_type not in (REGRESSION, SINGLE_LABEL):
            raise ValueError(
                f"problem_type must be {REGRESSION} or {SINGLE_LABEL}, got {problem_type!r}."
            )
        if (problem_type == REGRESSION) != (num_labels == 1):
            raise ValueError(
                f"problem_type {problem_type} does not fit num_labels {num_labels}: regression has "
                f"1 label, classification 2 or more."
            )
        task = {"num_labels": num_labels, "problem_type": problem_type}
        super().__init__(config_overrides={**(config_overrides or {}), **task}, **kwargs)
        if names is not None:
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: i for i, name in enumerate(names)}

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        if config.problem_type == REGRESSION:
            return ("spearman", "pearson", "mse")
        return ("accuracy", "f1", "cross_entropy")

    @staticmethod
    def build_metric(name: str, config: PretrainedConfig) -> Metric:
        if name in CLASSIFICATION_METRICS:
            return CLASSIFICATION_METRICS[name](config.num_labels)
        return build_metric(name, {})

    def eval_forward(self, batch: dict[str, Any], outputs: Any | None = None) -> torch.Tensor:
        """Return fp32 logits (B, num_labels), or (B,) for regression: in bf16 ranks would tie.

        Args:
            batch: A batch, with `labels` (B,) or, for prediction only, without.
            outputs: The outputs of `forward` on this batch, if it ran already.
        """
        if "labels" not in batch:  # only prediction
            outputs = self.forward(batch) if outputs is None else outputs
            logits = outputs["logits"].float()
            return logits.squeeze(1) if logits.shape[1] == 1 else logits
        return super().eval_forward(batch, outputs).float()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model.

        Args:
            batch: `input_ids`, `attention_mask`, ... each (B, L), with or without `labels` (B,).

        Raises:
            ValueError: If the data have another number of classes than the model.
        """
        own, data = self.config.num_labels, batch.get("num_labels")
        least = batch.get("min_num_labels", 0)
        if (data is not None and data != own) or least > own or (least and own == 1):
            kind = "are a regression" if data == 1 else f"have {data or f'{least} or more'} classes"
            raise ValueError(
                f"The data {kind}, the model has num_labels {own}: set model.num_labels to "
                f"{data or least}, or give the data label_names or regression: true."
            )
        return super().forward(batch)


class M2BertMLM(_MaskedLM):
    """M2-BERT for masked language modelling; `m2_bert_mlm` in a YAML."""

    default_model_type = "m2_bert"


class M2BertClassification(_Classification):
    """M2-BERT for classification and regression; `m2_bert_classification` in a YAML."""

    default_model_type = "m2_bert"


class HFBertMLM(_MaskedLM):
    """Any transformers masked language model; `hf_bert_mlm` in a YAML."""

    default_model_type = "bert"


class HFBertClassification(_Classification):
    """Any transformers sequence classifier; `hf_bert_classification` in a YAML."""

    default_model_type = "bert"
