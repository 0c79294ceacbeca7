"""Token classification, e.g. of named entities: the dataloader, the metrics and the models.

    model:
      name: m2_bert_token_classification  # or hf_bert_token_classification
      pretrained_model_name_or_path: ./exported/m2-bert-base
      label_names: [{path: ./train.conll, column: tags}]  # or a list of tags

A sentence that is longer than `max_seq_len` becomes several windows, in training and evaluation: no
word is lost. The metrics put its words together again.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from composer.core.data_spec import DataSpec
from composer.metrics import LanguageCrossEntropy
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from transformers import (
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from m2_plugin.data.formats import DataError
from m2_plugin.data.labels import names_of_config, spelling
from m2_plugin.data.token_labels import (
    Sentence,
    are_entity_tags,
    encode_words,
    entities,
    read_sentences,
    tag_names,
)
from m2_plugin.foundry.errors import one_line
from m2_plugin.foundry.loaders import (
    SHARED_KEYS,
    Padding,
    build_example_loader,
    check_section,
    leave_out,
    subset,
)
from m2_plugin.foundry.metrics import RowMetric
from m2_plugin.foundry.models import BertComposerModel
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX

__all__ = [
    "TOKEN_METRICS",
    "EntityF1",
    "EntityPrecision",
    "EntityRecall",
    "HFBertTokenClassification",
    "M2BertTokenClassification",
    "TokenCollator",
    "WordAccuracy",
    "build_token_classification_dataloader",
    "tag_metrics",
    "word_rows",
]

log = logging.getLogger(__name__)

KEYS = SHARED_KEYS | {"label_names", "path", "tags_column", "tokens_column"}
INTS = datasets.Sequence(datasets.Value("int32"))
SENTENCES = datasets.Features({"words": datasets.Sequence(datasets.Value("string")), "tags": INTS})
WINDOWS = datasets.Features(
    {"sentence": datasets.Value("int32"), "input_ids": INTS, "words": INTS, "labels": INTS}
)


# Data


def _tag_ids(sentence: Sentence, ids: Mapping[str, int]) -> list[int]:
    """Return the ids of a sentence's tags.

    Raises:
        ValueError: If a tag is not among the names; names its place.
    """
    found = []
    for i, tag in enumerate(sentence.tags):
        name = spelling(tag)
        if name in ids:
            found.append(ids[name])
        elif isinstance(tag, int) and 0 <= tag < len(ids) and not isinstance(tag, bool):
            found.append(tag)
        else:
            known = ", ".join(list(ids)[:20])
            raise ValueError(
                f"{sentence.place_of(i)}: the tag {tag!r} of {sentence.words[i]!r} is not one of "
                f"label_names ({known})"
            )
    return found


def _read(dataset: Mapping[str, Any], names: Sequence[str]) -> Dataset:
    """Read the sentences of all files, as words and tag ids.

    Raises:
        ValueError: If a file or, with `on_error: raise`, a sentence cannot be read.
    """
    path = dataset["path"]
    files = [path] if isinstance(path, str) else list(path)
    ids = {name: i for i, name in enumerate(names)}
    columns = {"words": [], "tags": []}  # type: dict[str, list[Any]]
    broken: list[str] = []
    for file in files:
        try:
            for sentence in read_sentences(
                file,
                dataset.get("split"),
                dataset.get("tokens_column", "tokens"),
                dataset.get("tags_column", "tags"),
            ):
                if sentence.problem:
                    broken.append(f"{sentence.place}: {sentence.problem}")
                    continue
                try:
                    tags = _tag_ids(sentence, ids)
                except ValueError as error:
                    broken.append(str(error))
                    continue
                columns["words"].append(sentence.words)
                columns["tags"].append(tags)
        except DataError as error:
            raise ValueError(f"dataset.path: {error}.") from error
    leave_out(broken, dataset.get("on_error", "raise"))
    return Dataset.from_dict(columns, SENTENCES)


def _windows(sentences: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in WINDOWS}
    for i, sentence in enumerate(sentences):
        tags = sentence["tags"]
        for window in encode_words(tokenizer, sentence["words"], max_seq_len):
            columns["sentence"].append(i)
            columns["input_ids"].append(window.input_ids)
            columns["words"].append(window.words)
            columns["labels"].append([tags[w] if w >= 0 else IGNORE_INDEX for w in window.words])
    return Dataset.from_dict(columns, WINDOWS)


class TokenCollator:
    """Pad windows to a batch.

    Args:
        padding: Makes the tensors.
        names: The names of the tags, which the model compares with its own.
    """

    def __init__(self, padding: Padding, names: Sequence[str]):
        self.padding = padding
        self.names = "\n".join(names)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of B windows.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, (B, L) int64; `labels` (B, L), the
            tag at the first piece of each word that the window decides, otherwise −100; `words`
            (B, L), the index of that word in its sentence, otherwise −1; `sentence` (B,), the index
            of the sentence; `label_names`, the names of the tags, a line each.
        """
        return {
            **self.padding.inputs(rows),
            "labels": self.padding([row["labels"] for row in rows], IGNORE_INDEX),
            "words": self.padding([row["words"] for row in rows], -1),
            "sentence": torch.tensor([row["sentence"] for row in rows]),
            "label_names": self.names,
        }


def _count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": int((batch["labels"] != IGNORE_INDEX).sum()),
    }


@one_line()
def build_token_classification_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int | float,
    dataset: dict[str, Any],
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: int = 0,
) -> DataSpec:
    """Build the dataloader `token_classification`, for sentences whose words have tags.

    The keys of `dataset` are

    * `path` (required): a file, or a list of files: CoNLL (.conll .bio .iob .txt), a sentence per
      row (.jsonl, .parquet, ...), or a folder that `datasets` saved; see
      `m2_plugin.data.token_labels.read_sentences`;
    * `split`: the split of that folder;
    * `tokens_column` (default: tokens) and `tags_column` (default: tags). In a CoNLL file they are
      the first and the last column; numbers choose others;
    * `label_names` (required): the tags in the order of their ids, or `[{path, column}]`: those
      that occur in that data, sorted;
    * `max_seq_len` (required): the largest number of tokens. Longer sentences become several
      windows, whose neighbours share up to a quarter as context;
    * `padding`: max_length (default) or longest;
    * `shuffle` (default: true for the split train only) and `shuffle_seed`: the order;
    * `max_samples`: the number of sentences to use, chosen at random;
    * `on_error`: raise (default), or skip to leave out sentences that are broken or have a tag that
      is not one of `label_names`.

    `num_workers` to `timeout` are the arguments of `torch.utils.data.DataLoader`.

    Args:
        tokenizer: A fast tokenizer with a padding token.
        device_batch_size: The windows per batch on this device.
        dataset: The keys above.
        drop_last: Whether to leave out a last batch that is not full.

    Returns:
        Composer's data spec, with the batches of `TokenCollator`.

    Raises:
        ValueError: If a key, file, column or tag is missing or wrong; the message names it, and
            the file and line.
    """
    required = ("path", "label_names", "max_seq_len")
    tokenizer = check_section("token_classification", dataset, KEYS, required, tokenizer)
    max_seq_len = int(dataset["max_seq_len"])
    padding = Padding(tokenizer, max_seq_len, dataset.get("padding", "max_length"))
    names = tag_names(
        dataset["label_names"], "dataset.label_names", dataset.get("tokens_column", "tokens")
    )
    assert names is not None
    sentences = subset(_read(dataset, names), dataset)
    examples = _windows(sentences, tokenizer, max_seq_len)
    if not len(examples):
        raise ValueError(f"There are no words in {dataset['path']}.")
    log.info("%d sentences in %d windows of %s", len(sentences), len(examples), dataset["path"])
    return build_example_loader(
        examples,
        TokenCollator(padding, names),
        _count_tokens,
        dataset,
        device_batch_size,
        drop_last,
        num_workers,
        pin_memory,
        prefetch_factor,
        persistent_workers,
        timeout,
    )


# Metrics


class _TagMetric(RowMetric):
    """A metric of words' tags. A row has sentence, word, predicted tag id and right tag id.

    Args:
        names: The names of the tags by id.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__(columns=4)
        self.names = list(names)

    def words(self) -> NDArray[np.int64]:
        """Return the row of each word, sorted by sentence and word, (N, 4)."""
        rows = self.table().astype(np.int64)
        return rows[np.unique(rows[:, :2], axis=0, return_index=True)[1]]

    def entity_counts(self) -> tuple[int, int, int]:
        """Return how many entities are predicted rightly, are predicted, and are there."""
        rows = self.words()
        both = predicted = right = 0
        starts = np.flatnonzero(np.diff(rows[:, 0])) + 1
        for sentence in np.split(rows, starts):
            found, there = (
                set(entities([self.names[i] for i in sentence[:, column]])) for column in (2, 3)
            )
            both += len(found & there)
            predicted += len(found)
            right += len(there)
        return both, predicted, right


class WordAccuracy(_TagMetric):
    """The share of words with the right tag."""

    def compute(self) -> Tensor:
        """Return the accuracy, from 0 to 1."""
        rows = self.words()
        return torch.tensor((rows[:, 2] == rows[:, 3]).mean() if len(rows) else 0.0)


class EntityPrecision(_TagMetric):
    """The share of predicted entities that are right: type, first and last word.

    This, `EntityRecall` and `EntityF1` count over all sentences (micro average), and equal
    seqeval's in its default mode; 0 / 0 is 0.
    """

    def compute(self) -> Tensor:
        """Return the precision, from 0 to 1."""
        both, predicted, _ = self.entity_counts()
        return torch.tensor(both / max(predicted, 1))


class EntityRecall(_TagMetric):
    """The share of entities that are predicted."""

    def compute(self) -> Tensor:
        """Return the recall, from 0 to 1."""
        both, _, right = self.entity_counts()
        return torch.tensor(both / max(right, 1))


class EntityF1(_TagMetric):
    """The harmonic mean of `EntityPrecision` and `EntityRecall`."""

    def compute(self) -> Tensor:
        """Return F1, from 0 to 1."""
        both, predicted, right = self.entity_counts()
        return torch.tensor(2 * both / max(predicted + right, 1))


TOKEN_METRICS: dict[str, type[_TagMetric]] = {
    "accuracy": WordAccuracy,
    "entity_f1": EntityF1,
    "entity_precision": EntityPrecision,
    "entity_recall": EntityRecall,
}


def word_rows(batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Return the rows of the metrics for a batch, (N, 4) int64, one for each word that it decides.

    Args:
        batch: A batch of `TokenCollator`.
        logits: (B, L, number of tags).
    """
    words = batch["words"]
    sentence = batch["sentence"][:, None].expand_as(words)
    rows = torch.stack([sentence, words, logits.argmax(-1), batch["labels"]], dim=-1)
    return rows[words >= 0]


def tag_metrics(names: Sequence[str]) -> Sequence[str]:
    """Return the names in `TOKEN_METRICS` that suit some tags: others than entities' have one."""
    return list(TOKEN_METRICS) if are_entity_tags(names) else ["accuracy"]


# Models


class _TokenClassification(BertComposerModel):
    """Classification of each word of a sentence.

    Args:
        label_names: The tags, as in the dataloader `token_classification`; they become `id2label`
            and `label2id` of the saved config. By default those of the model that is loaded.
        tokens_column: As in the dataloader; only for `label_names` from data.
        config_overrides: Config fields to replace.
        **kwargs: More arguments of `BertComposerModel`. `metrics` may name accuracy, cross_entropy
            and, if all tags are tags of entities, entity_f1, entity_precision and entity_recall;
            the default is all of these.

    Raises:
        ValueError: If there are no names, or the loaded model has the same ones in another order.
    """

    auto_class = AutoModelForTokenClassification

    @one_line()
    def __init__(
        self,
        label_names: Any = None,
        tokens_column: str | int = "tokens",
        config_overrides: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        names = tag_names(label_names, "model.label_names", tokens_column)
        self.given_names = names
        task = {} if names is None else {"num_labels": len(names)}
        super().__init__(config_overrides={**(config_overrides or {}), **task}, **kwargs)
        theirs = names_of_config(self.config)
        if names is None:
            names = theirs or []
        elif theirs is not None and theirs != names and set(theirs) == set(names):
            raise ValueError(
                "The loaded model has the tags of model.label_names in another order: give them as "
                f"[{', '.join(theirs)}] to the model and to the data."
            )
        self.names = "\n".join(names)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: i for i, name in enumerate(names)}

    def _names(self, config: PretrainedConfig) -> list[str]:
        names = self.given_names or names_of_config(config)
        if names is None:
            raise ValueError(
                "model.label_names is missing, and the loaded model has no names of its own: list "
                "the tags, or give the data that has them: [{path: FILE, column: tags}]."
            )
        return names

    def default_metrics(self, config: PretrainedConfig) -> Sequence[str]:  # type: ignore[override]
        """Return the names of the default metrics for a config."""
        return (*tag_metrics(self._names(config)), "cross_entropy")

    def build_metric(self, name: str, config: PretrainedConfig) -> Metric:  # type: ignore[override]
        """Build a metric by its name."""
        if name == "cross_entropy":
            return LanguageCrossEntropy()
        if name not in TOKEN_METRICS:
            raise ValueError(
                f"model.metrics: {name!r} is not one of {', '.join(TOKEN_METRICS)}, cross_entropy."
            )
        names = self._names(config)
        if name.startswith("entity") and not are_entity_tags(names):
            raise ValueError(
                f"model.metrics: {name} needs tags of entities (O, B-PER, I-PER, ...), but the "
                f"tags are {', '.join(names[:20])}. Use accuracy."
            )
        return TOKEN_METRICS[name](names)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model.

        Args:
            batch: `input_ids`, `attention_mask`, ... each (B, L), with or without `labels` (B, L).

        Raises:
            ValueError: If the data have other tags than the model.
        """
        if batch.get("label_names", self.names) != self.names:
            raise ValueError(
                f"The data and the model have different label_names: "
                f"{batch['label_names'].split()[:20]} and {self.names.split()[:20]}."
            )
        return super().forward(batch)

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> dict[str, Any]:
        """Predict the tags of words.

        Args:
            batch: A batch of `TokenCollator`.
            outputs: The outputs of `forward` on this batch, if it ran already.

        Returns:
            `logits`, fp32 (B, L, num_labels), and `rows`, (N, 4) int64: sentence, word, predicted
            and right tag id of each word that the batch decides.
        """
        outputs = self.forward(batch) if outputs is None else outputs
        logits = outputs["logits"].float()
        return {"logits": logits, "rows": word_rows(batch, logits)}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict[str, Any]:
        """Update a metric with the outputs of `eval_forward`."""
        if isinstance(metric, RowMetric):
            metric.update(outputs["rows"])
        else:
            metric.update(outputs["logits"], batch["labels"])
        return {}


class M2BertTokenClassification(_TokenClassification):
    """M2-BERT for token classification; `m2_bert_token_classification` in a YAML."""

    default_model_type = "m2_bert"


class HFBertTokenClassification(_TokenClassification):
    """Any transformers token classifier; `hf_bert_token_classification` in a YAML."""

    default_model_type = "bert"
