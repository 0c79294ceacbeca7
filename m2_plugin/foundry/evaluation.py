"""Measure a model on data with the loaders, masks and metrics of training."""

import inspect
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from composer.metrics import LanguageCrossEntropy, MaskedAccuracy
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from m2_plugin.data.formats import check_file, is_saved_dataset
from m2_plugin.data.labels import names_of_config
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.data.tokenizer import shorten
from m2_plugin.foundry.mds_index import INDEX
from m2_plugin.foundry.mlm_text import DEFAULT_SEED, MLMCollator, build_mlm_text_dataloader
from m2_plugin.foundry.models import CLASSIFICATION_METRICS
from m2_plugin.foundry.text_classification import build_text_classification_dataloader
from m2_plugin.inference import (
    DTYPES,
    checked_rows,
    load_model,
    max_length,
    model_folder,
    move,
    own_tokenizer,
    padding_counts,
)
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX, M2BertForMaskedLM

__all__ = ["evaluate"]

CLASSES = ("accuracy", "f1", "matthews", "cross_entropy")
REGRESSION = ("pearson", "spearman", "mse")


def evaluate(
    model: str | Path,
    data: str,
    split: str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    mlm_probability: float = 0.15,
    mask_seed: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure a masked language model or a sequence classifier.

    Args:
        model: A transformers folder, or a Composer checkpoint (.pt) of an M2-BERT; with a
            tokenizer.
        data: A file of any format in `m2_plugin.data.formats`, or a folder that `datasets` saved. A
            masked language model also takes a folder of MDS shards. Texts are cut to the model's
            maximum, as in training.
        split: The split in a folder; for MDS the default is val, or none if the folder itself has
            shards.
        text_column: The column with the texts, and the name for the lines of a text file.
        pair_column: The column with the second texts of pairs.
        label_column: The column with the labels, names or ids, or with the numbers of a regression.
        label_names: The names of the classes in the order of their ids, if the model has no names.
        mlm_probability: The share of the tokens to mask.
        mask_seed: The seed of the masks; the default is the default of `mlm_text`.
        batch_size: The texts in a batch.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.

    Returns:
        `model`, `data`, `rows`, and `metrics`: name → value, None if it is not finite. Of a masked
        language model these are `cross_entropy` in nats per masked token, its exponential
        `perplexity`, and `masked_accuracy`; of a classifier the metrics of training. `commonest` is
        the label that most rows have, and the accuracy of predicting it always.

    Raises:
        ValueError: If the model, the data, a row or a label is not what it should be; the message
            names it.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {batch_size}")
    with model_folder(model) as folder:
        inner, kind = load_model(folder)
        tokenizer = own_tokenizer(folder, inner.config.vocab_size)
    move(inner, device)
    autocast = torch.autocast(inner.device.type, DTYPES[dtype], dtype != "float32")
    result: dict[str, Any] = {"model": str(model), "data": data}
    with torch.inference_mode(), autocast:
        if kind == "ForMaskedLM":
            masks = {
                "mlm_probability": mlm_probability,
                "mask_seed": DEFAULT_SEED if mask_seed is None else mask_seed,
            }
            batches = _masked_batches(inner, tokenizer, data, split, text_column, batch_size, masks)
            return result | {"masks": masks} | _masked_lm(inner, batches)
        if kind == "ForSequenceClassification":
            columns = {
                "text_column": text_column,
                "text_pair_column": pair_column,
                "label_column": label_column,
                "split": split,
            }
            names = list(label_names) if label_names else names_of_config(inner.config)
            batches = _labelled_batches(inner, tokenizer, data, columns, names, batch_size)
            return result | _classification(inner, batches, names)
    raise ValueError(f"{str(model)!r} is a model {kind}, for which there is no evaluation")


def _inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: batch[name].to(model.device) for name in names if name in takes}


# Masked language modelling


def _masked_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    split: str | None,
    text_column: str,
    batch_size: int,
    masks: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
    limit = max_length(model.config, tokenizer)
    if limit is None:
        raise ValueError("neither the model nor its tokenizer has a maximum number of tokens")
    if os.path.isdir(data) and not is_saved_dataset(data):
        if split is None and not os.path.isfile(f"{data}/{INDEX}"):
            split = "val"
        dataset = {"local": data, "split": split, "shuffle": False, "max_seq_len": limit, **masks}
        return build_mlm_text_dataloader(
            tokenizer, batch_size, dataset, drop_last=False, num_workers=0, pin_memory=False
        ).dataloader
    check_file(data)
    collator = MLMCollator(
        tokenizer, masks["mlm_probability"], limit, masks["mask_seed"], remask_each_epoch=False
    )
    padding = "max_length" if padding_counts(model.config) else False

    def read(values: Mapping[str, Any]) -> str:
        return text_of(values, text_column, "--text-column")

    def batches() -> Iterator[dict[str, Any]]:
        rows = read_rows(data, text_column=text_column, columns=[text_column])
        texts = (shorten(tokenizer, [text], limit)[0] for _, text in checked_rows(rows, read))
        while chunk := list(islice(texts, batch_size)):
            encoded = tokenizer(chunk, truncation=True, padding=padding, max_length=limit)
            pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
            yield collator([{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs])

    return batches()


def _masked_lm(model: Any, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Metric] = {
        "cross_entropy": LanguageCrossEntropy(),
        "masked_accuracy": MaskedAccuracy(IGNORE_INDEX),
    }
    rows = 0
    for batch in batches:
        rows += len(batch["input_ids"])
        labels = batch["labels"].to(model.device)
        chosen = labels != IGNORE_INDEX  # (B, L)
        if not chosen.any():
            continue
        if isinstance(model, M2BertForMaskedLM):
            logits = model(**_inputs(model, batch), labels=labels, masked_logits_only=True).logits
        else:
            logits = model(**_inputs(model, batch)).logits[chosen]
        for metric in metrics.values():
            metric.to(model.device).update(logits.float(), labels[chosen])
    if not rows:
        raise ValueError("the data have no rows")
    values = _values(metrics)
    entropy = values["cross_entropy"]
    values["perplexity"] = None if entropy is None or entropy > 700 else math.exp(entropy)
    return {"rows": rows, "metrics": values}


# Classification


def _labelled_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    columns: Mapping[str, Any],
    names: Sequence[str] | None,
    batch_size: int,
) -> Iterable[dict[str, Any]]:
    classes = model.config.num_labels
    if names is not None and classes > 1 and len(names) != classes:
        raise ValueError(f"--label-names has {len(names)} names, the model {classes} classes")
    limit = max_length(model.config, tokenizer)
    dataset = {
        "path": data,
        **columns,
        "label_names": names if classes > 1 else None,
        "regression": classes == 1,
        "max_seq_len": limit or tokenizer.model_max_length,
        # A model to which padding counts was trained on texts of this length.
        "padding": "max_length" if padding_counts(model.config) else "longest",
        "shuffle": False,
    }
    return build_text_classification_dataloader(
        tokenizer, batch_size, dataset, num_workers=0, pin_memory=False
    ).dataloader


def _classification(
    model: Any, batches: Iterable[dict[str, Any]], names: Sequence[str] | None
) -> dict[str, Any]:
    classes = model.config.num_labels
    metrics = {
        name: CLASSIFICATION_METRICS[name](classes).to(model.device)
        for name in (REGRESSION if classes == 1 else CLASSES)
    }
    counts: Counter[Any] = Counter()
    for batch in batches:
        least = max(batch.get("num_labels", 0), batch.get("min_num_labels", 0))
        if least > classes or (names is None and 1 < batch.get("num_labels", classes) != classes):
            raise ValueError(f"the data have {least} classes, the model {classes}")
        logits = model(**_inputs(model, batch)).logits.float()
        labels = batch["labels"].to(model.device)
        for metric in metrics.values():
            metric.update(logits.squeeze(1) if classes == 1 else logits, labels)
        counts.update(labels.tolist())
    result: dict[str, Any] = {"rows": counts.total(), "metrics": _values(metrics)}
    if classes > 1:
        label, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        shown = names[label] if names else label
        result["commonest"] = {"label": shown, "accuracy": count / counts.total()}
    return result


def _values(metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
