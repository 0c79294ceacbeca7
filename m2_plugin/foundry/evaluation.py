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
from m2_plugin.data.squad import DOC_STRIDE, AnswerRules
from m2_plugin.data.token_labels import is_conll
from m2_plugin.data.tokenizer import shorten
from m2_plugin.foundry.mds_index import INDEX
from m2_plugin.foundry.mlm_text import DEFAULT_SEED, MLMCollator, build_mlm_text_dataloader
from m2_plugin.foundry.models import CLASSIFICATION_METRICS
from m2_plugin.foundry.question_answering import (
    ANSWER_METRICS,
    build_question_answering_dataloader,
    feature_rows,
)
from m2_plugin.foundry.text_classification import build_text_classification_dataloader
from m2_plugin.foundry.token_classification import (
    TOKEN_METRICS,
    build_token_classification_dataloader,
    tag_metrics,
    word_rows,
)
from m2_plugin.inference import (
    DTYPES,
    LONGEST,
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
# The kinds of models that `load_model` loads, and the options of the data that each takes.
OPTIONS = {
    "ForMaskedLM": {"text_column", "mlm_probability", "mask_seed"},
    "ForSequenceClassification": {"text_column", "pair_column", "label_column", "label_names"},
    "ForTokenClassification": {"text_column", "label_column", "label_names"},
    "ForQuestionAnswering": set[str](),
}


def evaluate(
    model: str | Path,
    data: str,
    split: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    mlm_probability: float | None = None,
    mask_seed: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure a masked language model, a classifier of texts or words, or answers to questions.

    Args:
        model: A transformers folder, or a Composer checkpoint (.pt) of an M2-BERT; with a
            tokenizer.
        data: A file of any format in `m2_plugin.data.formats`, or a folder that `datasets` saved;
            for words also CoNLL, for questions SQuAD's JSON, for a masked language model a folder
            of MDS shards. Texts are cut to the model's maximum, as in training; words and contexts
            beyond it are read in windows.
        split: The split in a folder; for MDS the default is val, or none if the folder itself has
            shards.
        text_column: The column with the texts (default: text), and the name for the lines of a text
            file; or with the lists of words (tokens). In a CoNLL file it is a number.
        pair_column: The column with the second texts of pairs.
        label_column: The column with the labels (label), names or ids, or with the numbers of a
            regression; or with the lists of tags (tags). In a CoNLL file it is a number.
        label_names: The names of the classes in the order of their ids, if the model has no names.
        mlm_probability: The share of the tokens to mask (0.15).
        mask_seed: The seed of the masks; the default is the default of `mlm_text`.
        batch_size: The texts, or windows, in a batch.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.

    Returns:
        `model`, `data`, `rows` (texts, sentences or questions), and `metrics`: name → value, None
        if it is not finite. Of a masked language model these are `cross_entropy` in nats per masked
        token, its exponential `perplexity`, and `masked_accuracy`; of other models the metrics of
        training. `commonest` is the label that most rows (or words) have, and the accuracy of
        predicting it always.

    Raises:
        ValueError: If the model, the data, a row or a label is not what it should be, or an option
            is not one for such a model; the message names it.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {batch_size}")
    given = {
        "text_column": text_column,
        "pair_column": pair_column,
        "label_column": label_column,
        "label_names": label_names,
        "mlm_probability": mlm_probability,
        "mask_seed": mask_seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with model_folder(model) as folder:
        inner, kind = load_model(folder)
        for name in options:
            if name not in OPTIONS[kind]:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no effect on {str(model)!r}, a model {kind}")
        tokenizer = own_tokenizer(folder, inner.config.vocab_size)
    move(inner, device)
    autocast = torch.autocast(inner.device.type, DTYPES[dtype], dtype != "float32")
    result: dict[str, Any] = {"model": str(model), "data": data}
    source = {"path": data, "split": split}
    with torch.inference_mode(), autocast:
        if kind == "ForMaskedLM":
            masks = {
                "mlm_probability": options.get("mlm_probability", 0.15),
                "mask_seed": options.get("mask_seed", DEFAULT_SEED),
            }
            text = text_column or "text"
            batches = _masked_batches(inner, tokenizer, data, split, text, batch_size, masks)
            return result | {"masks": masks} | _masked_lm(inner, batches)
        if kind == "ForQuestionAnswering":
            return result | _questions(inner, tokenizer, source, batch_size)
        names = list(label_names) if label_names else names_of_config(inner.config)
        classes = inner.config.num_labels
        if names is not None and classes > 1 and len(names) != classes:
            raise ValueError(f"--label-names has {len(names)} names, the model {classes} classes")
        if kind == "ForTokenClassification":
            columns = {"tokens_column": text_column, "tags_column": label_column}
            return result | _words(inner, tokenizer, source, columns, names, batch_size)
        dataset = source | {
            "text_column": text_column or "text",
            "text_pair_column": pair_column,
            "label_column": label_column or "label",
        }
        batches = _labelled_batches(inner, tokenizer, dataset, names, batch_size)
        return result | _classification(inner, batches, names)


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
    dataset: Mapping[str, Any],
    names: Sequence[str] | None,
    batch_size: int,
) -> Iterable[dict[str, Any]]:
    classes = model.config.num_labels
    dataset = {
        **dataset,
        "label_names": names if classes > 1 else None,
        "regression": classes == 1,
        "max_seq_len": max_length(model.config, tokenizer) or tokenizer.model_max_length,
        **_how(model),
    }
    return build_text_classification_dataloader(
        tokenizer, batch_size, dataset, num_workers=0, pin_memory=False
    ).dataloader


def _how(model: Any) -> dict[str, Any]:
    """Return the keys of a loader that are the same for all tasks."""
    # A model to which padding counts was trained on texts of the full length.
    padding = "max_length" if padding_counts(model.config) else "longest"
    return {"padding": padding, "shuffle": False}


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
    return result | (_commonest(counts, names) if classes > 1 else {})


def _commonest(counts: Mapping[int, int], names: Sequence[str] | None) -> dict[str, Any]:
    label, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = names[label] if names else label
    return {"commonest": {"label": shown, "accuracy": count / sum(counts.values())}}


# Words and questions


def _words(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    source: Mapping[str, Any],
    columns: Mapping[str, str | None],
    names: Sequence[str] | None,
    batch_size: int,
) -> dict[str, Any]:
    if names is None:
        raise ValueError("the model has no names for its tags: list them with --label-names")
    own = {
        key: int(column) if is_conll(source["path"]) and column.isdigit() else column
        for key, column in columns.items()
        if column is not None
    }
    length = max_length(model.config, tokenizer) or LONGEST
    dataset = {**source, **own, **_how(model), "label_names": names, "max_seq_len": length}
    loader = build_token_classification_dataloader(
        tokenizer, batch_size, dataset, num_workers=0, pin_memory=False
    ).dataloader
    metrics = {name: TOKEN_METRICS[name](names) for name in tag_metrics(names)}
    entropy = LanguageCrossEntropy().to(model.device)
    counts: Counter[int] = Counter()
    for batch in loader:
        logits = model(**_inputs(model, batch)).logits.float()
        rows = word_rows(batch, logits.cpu())
        for metric in metrics.values():
            metric.update(rows)
        entropy.update(logits, batch["labels"].to(model.device))
        counts.update(rows[:, 3].tolist())
    return {
        "rows": len(set(loader.dataset["sentence"])),
        "metrics": _values({**metrics, "cross_entropy": entropy}),
        **_commonest(counts, names),
    }


def _questions(
    model: Any, tokenizer: PreTrainedTokenizerBase, source: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    length = max_length(model.config, tokenizer) or LONGEST
    stride = min(DOC_STRIDE, length // 2)  # as `m2-plugin predict`
    dataset = {**source, **_how(model), "max_seq_len": length, "doc_stride": stride}
    loader = build_question_answering_dataloader(
        tokenizer, batch_size, dataset, num_workers=0, pin_memory=False
    ).dataloader
    rules = AnswerRules.of(model.config)
    metrics = {name: metric(rules.null_threshold) for name, metric in ANSWER_METRICS.items()}
    entropy = LanguageCrossEntropy().to(model.device)
    for batch in loader:
        outputs = model(**_inputs(model, batch))
        logits = {which: outputs[f"{which}_logits"].float() for which in ("start", "end")}
        starts, ends = (values.cpu().numpy() for values in logits.values())
        rows = feature_rows(batch, starts, ends, rules.max_answer_length)
        for metric in metrics.values():
            metric.update(rows)
        for which, values in logits.items():
            entropy.update(values, batch[f"{which}_positions"].to(model.device))
    return {
        "rows": len(set(loader.dataset["question"])),
        "metrics": _values({**metrics, "cross_entropy": entropy}),
    }


def _values(metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
