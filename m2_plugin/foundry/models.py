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

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from composer.metrics import LanguageCrossEntropy
from composer.models.huggingface import HuggingFaceModel
from composer.utils import dist
from llmfoundry.models.hf.hf_fsdp import hf_get_init_device
from llmfoundry.models.utils import init_empty_weights
from llmfoundry.utils.builders import build_metric
from llmfoundry.utils.config_utils import set_config_overrides
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from m2_plugin.foundry.fsdp import MetaInitializer, prepare_for_fsdp
from m2_plugin.foundry.metrics import (
    BinaryF1Score,
    MulticlassMatthewsCorrCoef,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)

# Importing the package registers model_type m2_bert with transformers' Auto classes.
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX
from m2_plugin.models.weights import (
    check_fit,
    checkpoint_config,
    is_checkpoint_file,
    read_checkpoint,
    shapes_in,
)
from m2_plugin.suggest import did_you_mean

__all__ = ["HFBertClassification", "HFBertMLM", "M2BertClassification", "M2BertMLM"]

log = logging.getLogger(__name__)

VOCAB_MULTIPLE = 8  # as M2-BERT and its BERT baseline are published: 30,522 becomes 30,528
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


class Weights(NamedTuple):
    """What a checkpoint file holds, and the config that belongs to it."""

    path: str
    tensors: Mapping[str, torch.Tensor]
    config: PretrainedConfig


def read_weights(path: str, model_type: str) -> Weights:
    """Read a checkpoint file of a model of this type.

    Raises:
        ValueError: If it cannot be read, or is of another model type.
    """
    tensors, saved = read_checkpoint(path, m2=model_type == "m2_bert")
    return Weights(path, tensors, checkpoint_config(path, tensors, saved))


def build_config(
    source: str | Weights | None, model_type: str, overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """The config of a folder, a hub name or a file's weights, or a model type's default.

    Raises:
        ValueError: If a field to replace is unknown to the config, or the folder is not there.
    """
    if source is None:
        _check_fields(AutoConfig.for_model(model_type), overrides)
        return AutoConfig.for_model(model_type, **overrides)
    if isinstance(source, Weights):
        config = source.config
    else:
        _check_folder(source)
        config = AutoConfig.from_pretrained(source)
    _check_fields(config, overrides)
    set_config_overrides(config, dict(overrides))
    # Once more through the constructor, which checks the fields against each other.
    return type(config).from_dict(config.to_dict())


def _check_folder(path: str) -> None:
    if path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise ValueError(f"pretrained_model_name_or_path: there is no folder {path!r}.")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        inside = [f"{path}/latest-rank0.pt", f"{path}/huggingface/final"]
        there = [repr(name) for name in inside if os.path.exists(name)]
        hint = f" Did you mean {' or '.join(there)}?" if there else ""
        raise ValueError(
            f"pretrained_model_name_or_path: {path!r} is no transformers folder, it has no "
            f"config.json.{hint}"
        )


def _check_fields(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        if not hasattr(config, key):
            raise ValueError(
                f"config_overrides: {type(config).__name__} has no field {key!r}."
                f"{did_you_mean(key, config.to_dict())}"
            )


def _check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The model's vocab_size {config.vocab_size} is smaller than the tokenizer's "
            f"{len(tokenizer)} entries ({tokenizer.name_or_path!r}): set "
            f"config_overrides.vocab_size to {len(tokenizer)} or more."
        )


def load_pretrained(auto_class: Any, path: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load weights, letting only the task head be new.

    Raises:
        ValueError: If backbone weights are missing or of another shape: transformers would start
            them at random with a warning.
    """
    model, info = auto_class.from_pretrained(
        path,
        config=config,
        torch_dtype=torch.float32,  # master weights; the trainer's precision casts
        ignore_mismatched_sizes=True,  # a head for another number of labels; checked below
        output_loading_info=True,
    )
    # Some versions of transformers give the shapes beside the names, some do not.
    names = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *names})
    theirs = shapes_in(path) if names else {}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = [(name, theirs.get(name), ours[name]) for name in names]
    backbone = f"{model.base_model_prefix}."
    check_fit(path, backbone, mismatched, info["missing_keys"], info["unexpected_keys"])
    if new:
        log.warning("Newly initialised (not in %s): %s", path, ", ".join(new))
    return model


def load_weights(auto_class: Any, weights: Weights, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model and give it the weights of a file, letting only the task head be new.

    Raises:
        ValueError: As `load_pretrained`.
    """
    model = auto_class.from_config(config)
    tensors = dict(weights.tensors)
    new = fit_state_dict(weights.path, model, tensors)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    if new:
        log.warning("Newly initialised (not in %s): %s", weights.path, ", ".join(new))
    return model


def fit_state_dict(
    path: str, model: Any, tensors: dict[str, torch.Tensor], prefix: str = ""
) -> list[str]:
    """Drop heads of another shape from a state dict; returns the names that will be new.

    Args:
        path: Where the tensors are from.
        model: The transformers model they are for.
        tensors: Changed in place.
        prefix: How the model's names begin in it.

    Raises:
        ValueError: If weights of the encoder are missing, too many, or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    mismatched = [(n, found[n], own[n]) for n in own if n in found and found[n] != own[n]]
    tied = set(model._tied_weights_keys or ())  # to tensors that are there
    missing = [name for name in own if name not in found and name not in tied]
    unexpected = [name for name in found if name not in own]
    check_fit(path, f"{model.base_model_prefix}.", mismatched, missing, unexpected)
    for name, _, _ in mismatched:
        del tensors[prefix + name]
    return sorted([*missing, *(name for name, _, _ in mismatched)])


def _check_loading(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before torch loads a state dict: check what Composer loads (`load_path`) as the rest is.

    With `load_strict_model_weights: false`, which a new head needs, the host would leave an
    encoder that does not match at random values, and would stop at a head for other classes.
    """
    sharded = any(hasattr(m, "_fsdp_wrapped_module") for m in module.modules())
    if sharded or not any(name.startswith(prefix) for name in state_dict):
        return  # FSDP gives each rank its part
    new = fit_state_dict("load_path", module, state_dict, prefix)
    if new:
        log.warning("Newly initialised (not in load_path): %s", ", ".join(new))


def build_inner_model(
    auto_class: Any,
    config: PretrainedConfig,
    source: str | Weights | None,
    pretrained: bool,
    init_device: str,
) -> PreTrainedModel:
    """Build on the CPU, or without storage where FSDP is to make or send the weights.

    Raises:
        ValueError: If pretrained weights are asked for on the meta device, or the device is
            unknown.
    """
    if init_device not in ("cpu", "meta", "mixed"):
        raise ValueError(f"init_device must be cpu, meta or mixed, got {init_device!r}.")
    if pretrained and init_device == "meta":
        raise ValueError("Pretrained weights need init_device cpu or mixed, not meta.")
    if hf_get_init_device(init_device) == "meta":
        rng_state = torch.get_rng_state()
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(config)
        model.tie_weights()  # the tie made in the constructor is lost on the meta device
        model.param_init_fn = (
            MetaInitializer(model, lambda: auto_class.from_config(config), rng_state)
            if init_device == "meta"
            else lambda module: None  # rank 0 sends the values
        )
        return model
    if pretrained:
        assert source is not None
        if isinstance(source, Weights):
            return load_weights(auto_class, source, config)
        return load_pretrained(auto_class, source, config)
    return auto_class.from_config(config)


def prepare_for_host(model: Any) -> None:
    """Let the host check what it loads into a finished model, and shard it."""
    model.register_load_state_dict_pre_hook(_check_loading)
    prepare_for_fsdp(model)


def build_from_keys(
    auto_class: Any,
    model_type: str | None,
    default_model_type: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | None,
    pretrained: bool | None,
    config_overrides: Mapping[str, Any] | None,
    init_device: str,
) -> PreTrainedModel:
    """Build a transformers model from the keys that all models of this package take in a YAML.

    Args:
        auto_class: The Auto class whose model it is.
        model_type: As in `BertComposerModel`, which documents the keys.
        default_model_type: What is built where neither `model_type` nor `path` is given.
        tokenizer: The run's, which the vocabulary must hold; None skips the check.
        path: `pretrained_model_name_or_path`.
        pretrained: See there.
        config_overrides: See there.
        init_device: See there.

    Raises:
        ValueError: As `BertComposerModel`.
    """
    if pretrained is None:
        pretrained = path is not None
    if pretrained and path is None:
        raise ValueError("pretrained: true needs pretrained_model_name_or_path.")
    if path is not None and model_type is not None:
        raise ValueError("Give pretrained_model_name_or_path or model_type, not both.")
    source: str | Weights | None = path
    if path is not None and is_checkpoint_file(path):
        source = read_weights(path, default_model_type)
    config = build_config(source, model_type or default_model_type, config_overrides or {})
    if not pretrained:
        config.vocab_size = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    _check_vocabulary(config, tokenizer)
    # A rank that FSDP will send the weights to needs none of its own.
    load = pretrained and not (init_device == "mixed" and dist.get_global_rank() != 0)
    return build_inner_model(auto_class, config, source, load, init_device)


class BertComposerModel(HuggingFaceModel):
    """A transformers encoder with a head, built from YAML keys.

    Args:
        tokenizer: The run's tokenizer; the host passes it.
        pretrained_model_name_or_path: A transformers folder; a hub name; a checkpoint file of
            Composer's (.pt) or bare weights (.bin, .safetensors), of this package or of the M2
            reference. None builds from `model_type`.
        pretrained: Load the weights, not only the config, of that folder or name. Defaults to
            True where one is given.
        model_type: transformers' model type to build where no folder or name is given.
        config_overrides: Config fields to replace.
        init_device: "cpu", "meta" or "mixed", as the host's models take it.
        metrics: Names of the evaluation metrics, in place of the default ones.
        additional_eval_metrics: Names of evaluation metrics on top.
        additional_train_metrics: Names of training metrics on top; need `use_train_metrics`.
        use_train_metrics: Compute the metrics on training batches too, which costs time; the
            training loss is logged in any case.
        allow_embedding_resizing: Enlarge a vocabulary smaller than the tokenizer's instead of
            raising.

    Raises:
        ValueError: For unknown config fields, a missing folder, a vocabulary smaller than the
            tokenizer's, weights that do not fit, or an unknown metric.
    """

    auto_class: Any
    default_model_type: str

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
            tokenizer=None if allow_embedding_resizing else tokenizer,
            path=pretrained_model_name_or_path,
            pretrained=pretrained,
            config_overrides=config_overrides,
            init_device=init_device,
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
        prepare_for_host(self.model)  # after a possible resizing, which replaces modules

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        """Names of the metrics for this config."""
        raise NotImplementedError

    @staticmethod
    def build_metric(name: str, config: PretrainedConfig) -> Metric:
        """A metric from the host's registry by name."""
        return build_metric(name, {})


class _MaskedLM(BertComposerModel):
    """Masked language modelling: logits and metrics at the masked positions only."""

    auto_class = AutoModelForMaskedLM

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        return ("language_cross_entropy", "masked_accuracy")

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model.

        With labels, M2-BERT's decoder runs at the M masked positions alone and returns logits
        (M, V); a model whose forward does not know the flag never sees it.

        Args:
            batch: `input_ids`, `attention_mask`, ... each (B, L), with or without `labels`.
        """
        return super().forward({**batch, "masked_logits_only": "labels" in batch})

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> torch.Tensor:
        """Logits (M, V) at the M masked positions; their labels (M,) are kept for the metrics.

        Args:
            batch: A batch with `labels` (B, L), -100 where nothing is predicted.
            outputs: What `forward` returned on it, if it ran already.
        """
        outputs = self.forward(batch) if outputs is None else outputs
        chosen = batch["labels"] != IGNORE_INDEX  # (B, L)
        logits = outputs["logits"]
        self.labels = batch["labels"][chosen]
        return (logits[chosen] if logits.ndim == 3 else logits).float()

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict[str, Any]:
        """Update a metric; a batch in which nothing is masked has nothing to add."""
        if self.labels is not None and self.labels.numel() == 0:
            return {}
        return super().update_metric(batch, outputs, metric)


class _Classification(BertComposerModel):
    """Sequence classification, or regression with one label.

    Args:
        num_labels: Number of classes; 1 is regression.
        problem_type: "regression" or "single_label_classification"; by default from `num_labels`.
        config_overrides: Config fields to replace.
        **kwargs: As `BertComposerModel`. `metrics` may also name accuracy, f1, matthews,
            cross_entropy, pearson, spearman and mse.

    Raises:
        ValueError: If the problem type does not fit the number of labels.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        num_labels: int = 2,
        problem_type: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        problem_type = problem_type or (REGRESSION if num_labels == 1 else SINGLE_LABEL)
        if problem_type not in (REGRESSION, SINGLE_LABEL):
            raise ValueError(
                f"problem_type must be {REGRESSION} or {SINGLE_LABEL}, got {problem_type!r}."
            )
        if (problem_type == REGRESSION) != (num_labels == 1):
            raise ValueError(f"problem_type {problem_type} does not fit num_labels {num_labels}.")
        task = {"num_labels": num_labels, "problem_type": problem_type}
        super().__init__(config_overrides={**(config_overrides or {}), **task}, **kwargs)

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        if config.problem_type == REGRESSION:
            return ("spearman", "pearson", "mse")
        return ("accuracy", "cross_entropy")

    @staticmethod
    def build_metric(name: str, config: PretrainedConfig) -> Metric:
        if name in CLASSIFICATION_METRICS:
            return CLASSIFICATION_METRICS[name](config.num_labels)
        return build_metric(name, {})

    def eval_forward(self, batch: dict[str, Any], outputs: Any | None = None) -> torch.Tensor:
        """Logits (B, num_labels), or (B,) for regression, in fp32: bf16 makes ranks tie.

        Args:
            batch: A batch, with `labels` (B,) unless it is to be predicted only.
            outputs: What `forward` returned on it, if it ran already.
        """
        if "labels" not in batch:  # data to predict
            outputs = self.forward(batch) if outputs is None else outputs
            logits = outputs["logits"].float()
            return logits.squeeze(1) if logits.shape[1] == 1 else logits
        return super().eval_forward(batch, outputs).float()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model.

        Args:
            batch: `input_ids`, `attention_mask`, ... each (B, L), with or without `labels` (B,).

        Raises:
            ValueError: If the data say that they have another number of classes.
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
