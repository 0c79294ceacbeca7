"""The `glue` and `text_classification` dataloaders: sentences or pairs with a class or a number.

`glue` is a special case: it knows the names of the tasks' files, columns and labels, and leaves
the rest to `text_classification`. Examples from any source become an Arrow table of texts and label
ids. A collator tokenises a batch at a time: nothing is cached, so the batches of an epoch depend on
the data, the seed and the epoch alone.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import datasets
import torch
from composer.core.data_spec import DataSpec
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from m2_plugin.data.formats import DataError, is_saved_dataset
from m2_plugin.data.labels import in_data, label_names, spelling
from m2_plugin.data.rows import Row, class_names, read_rows, text_bytes
from m2_plugin.data.tokenizer import shorten
from m2_plugin.foundry.errors import one_line
from m2_plugin.foundry.loaders import (
    PAD_MULTIPLE,
    PADDINGS,
    SHARED_KEYS,
    build_example_loader,
    check_section,
    leave_out,
    subset,
)
from m2_plugin.glue.tasks import Task
from m2_plugin.glue.tasks import task as glue_task

__all__ = [
    "TextClassificationCollator",
    "build_glue_dataloader",
    "build_text_classification_dataloader",
]

HUB_NAMES = ("nyu-mll/glue", "glue")  # the current name and the former one, which caches may use
NO_LABEL = "-"  # official MNLI: the annotators did not agree

GLUE_KEYS = SHARED_KEYS | {"path", "task"}
OWN_KEYS = SHARED_KEYS | {
    "hf_name",
    "hf_subset",
    "label_column",
    "label_names",
    "path",
    "regression",
    "text_column",
    "text_pair_column",
}


@dataclass(frozen=True)
class _Table:
    """The rows of one source.

    Attributes:
        source: The name of the source in errors.
        rows: The rows; they can be read only once.
        classes: The names of the classes by column, if the source has them. The values of such a
            column are indices into the names.
    """

    source: str
    rows: Iterable[Row]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fields:
    """The columns to read from a table, and the labels that are accepted.

    Attributes:
        texts: The column of the text, or the two columns of a pair.
        label: The column of the label; None for data without labels.
        spellings: The label id of each accepted spelling; None if labels are ids or numbers.
        num_labels: The number of classes; 1 for a regression; None if unknown.
        label_range: The smallest and the largest number of a regression.
        skip_label: The label of rows to leave out; None leaves out none.
        by_name: Whether to look up a source's own class names in `spellings`, not its ids.
        names_only: Whether an id that is no name is refused, because the names are those of data.
    """

    texts: tuple[str, ...]
    label: str | None
    spellings: Mapping[str, int] | None = None
    num_labels: int | None = None
    label_range: tuple[float, float] = (-math.inf, math.inf)
    skip_label: str | None = None
    by_name: bool = False
    names_only: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns that are read."""
        return (*self.texts, *([] if self.label is None else [self.label]))

    @property
    def takes_ids(self) -> bool:
        """Whether a label may be an id; false if a class name is a number other than its id."""
        spellings = self.spellings or {}
        return not self.names_only and all(
            name == str(i) for name, i in spellings.items() if _is_number(name)
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Reading


def _read_file(path: str, split: str | None, **how: Any) -> _Table:
    try:
        return _Table(path, read_rows(path, split, **how), class_names(path, split))
    except DataError as error:
        raise ValueError(f"dataset.path: {error}.") from error


def _dataset_table(dataset: Dataset, source: str, columns: Sequence[str] = ()) -> _Table:
    """Make a table of a loaded dataset, with only these columns if it has all of them."""
    if columns and set(columns) <= set(dataset.column_names):
        dataset = dataset.select_columns(list(columns))
    classes = {
        column: tuple(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    batches = dataset.with_format("arrow").iter(1000)
    rows = (values for batch in batches for values in batch.to_pylist())
    return _Table(
        source, (Row(f"{source}, row {i}", values) for i, values in enumerate(rows)), classes
    )


def _hub_dataset(name: str, subset: str | None, split: str | None, cache: str | None) -> Dataset:
    """Load a split of a dataset from the hub, or from its cache.

    Raises:
        ValueError: If it cannot be loaded, has no such split, or a local folder has its name.
    """
    if split is None:
        raise ValueError(f"dataset.split is missing: name the split of {name!r} to read.")
    if os.path.isdir(name):  # `datasets` would read it, guess types, and cache it by path and time
        raise ValueError(
            f"There is a folder {name!r} here. Give dataset.path to read it, or run in another "
            "folder to load the dataset of this name from the hub."
        )
    try:
        return datasets.load_dataset(name, subset, split=split, cache_dir=cache)
    except (ValueError, OSError) as error:  # OSError: not found, neither online nor in the cache
        which = f"{name!r}, {subset!r}" if subset else repr(name)
        raise ValueError(f"The split {split!r} of the dataset {which}: {error}") from error


# From a table to examples


def _class_id(value: Any, fields: _Fields) -> int:
    # Look up integers too: names may be numbers that do not start at 0, such as stars.
    if fields.spellings is not None:
        for name in (spelling(value), str(value)):  # JSON's true may be called true or True
            if name in fields.spellings:
                return fields.spellings[name]
    try:
        label = int(value) if fields.takes_ids and isinstance(value, (int, str)) else None
    except ValueError:
        label = None
    n = fields.num_labels
    if label is None or label < 0 or (n is not None and label >= n):
        names = "" if fields.spellings is None else f" ({_listed(fields.spellings)})"
        accepted = "0, 1, 2, ..." if n is None else f"one of 0 to {n - 1}{names}"
        if fields.spellings is not None and not fields.takes_ids:
            accepted = f"one of {_listed(fields.spellings)}"
        raise ValueError(f"label {value!r} is out of range: it must be {accepted}")
    return label


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _number(value: Any, fields: _Fields) -> float:
    low, high = fields.label_range
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not (math.isfinite(label) and low <= label <= high):
        between = f" from {low} to {high}" if math.isfinite(low) else ""
        raise ValueError(f"label {value!r} is out of range: it must be a number{between}")
    return label


def _examples(table: _Table, fields: _Fields) -> tuple[dict[str, list[Any]], list[str]]:
    """Read the texts and labels of a table.

    Returns:
        The values by column, and a message for each row that is left out because it is broken.

    Raises:
        ValueError: If no row has a required column, or if labels are words and have no ids.
    """
    label = fields.label
    out: dict[str, list[Any]] = {name: [] for name in ("text", "text_pair")[: len(fields.texts)]}
    if label is not None:
        out["label"] = []
    classes = table.classes.get(label or "", ()) if fields.by_name else ()
    read = _number if fields.num_labels == 1 else _class_id
    broken: list[str] = []
    found: dict[str, None] = {}
    words: Counter[str] = Counter()
    try:
        for row in table.rows:
            try:
                if row.problem:
                    raise ValueError(row.problem)
                found |= dict.fromkeys(row.values)
                example: list[Any] = []
                for name in fields.texts:
                    text = row.values.get(name)
                    text_bytes(text, name)
                    example.append(text)
                if label is not None:
                    value = row.values.get(label)
                    if classes and isinstance(value, int) and 0 <= value < len(classes):
                        value = classes[value]
                    if value == fields.skip_label and fields.skip_label is not None:
                        continue
                    if isinstance(value, str) and not value.lstrip("-").isdigit():
                        words[value] += 1
                    example.append(read(value, fields))
            except ValueError as error:
                broken.append(f"{row.place}: {error}")
                continue
            for column, part in zip(out.values(), example, strict=True):
                column.append(part)
    except DataError as error:
        raise ValueError(f"dataset.path: {error}.") from error
    _check_columns(table, fields, found)
    if words and fields.num_labels is None and fields.spellings is None:
        _refuse_words(table, words)
    return out, broken


def _check_columns(table: _Table, fields: _Fields, found: Mapping[str, None]) -> None:
    keys = ("text_column", "text_pair_column")[: len(fields.texts)] + ("label_column",)
    for name, key in zip(fields.columns, keys, strict=False):
        if found and name not in found:
            raise ValueError(
                f"{table.source} has no column {name!r} ({key}). Its columns: "
                f"{', '.join(map(repr, found))}."
            )


def _refuse_words(table: _Table, words: Counter[str]) -> None:
    """Raise an error, since one file of words does not determine the ids of the classes."""
    names = json.dumps(sorted(word for word, _ in words.most_common(20)), ensure_ascii=False)
    raise ValueError(
        f"{table.source}: labels are words. List them in the order of their ids, e.g. "
        f"dataset.label_names: {names}. For numbers set dataset.regression to true."
    )


def _to_dataset(tables: Sequence[_Table], fields: _Fields, on_error: str) -> Dataset:
    """Join the examples of all tables to one dataset with `text`, `text_pair` and `label`.

    Raises:
        ValueError: If a column is missing, if a row is broken and `on_error` is not skip, or if no
            example is left.
    """
    parts, broken = [], []
    for table in tables:
        columns, wrong = _examples(table, fields)
        broken += wrong
        parts.append(columns)
    leave_out(broken, on_error)
    merged = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    if not merged["text"]:
        sources = ", ".join(table.source for table in tables)
        raise ValueError(f"There are no examples in {sources}.")
    return Dataset.from_dict(merged)


# GLUE's own files


def _glue_fields(task: Task, columns: Collection[str], labelled: bool) -> _Fields:
    """Choose the hub's names of the columns, or those of the official files."""
    texts, label = task.text_columns, "label"
    if columns and not set(texts) <= set(columns):
        texts = task.official_text_columns
    if columns and (label not in columns or task.official_label_column in columns):
        label = task.official_label_column
    spellings = {name: i for i, name in enumerate(task.label_names)}
    spellings |= {name: i for i, name in enumerate(task.official_labels)}
    return _Fields(
        texts=texts,
        label=label if labelled else None,
        spellings=spellings,
        num_labels=task.num_labels,
        label_range=task.label_range,
        skip_label=NO_LABEL if task.name == "mnli" else None,
        by_name=True,
    )


def _glue_file(task: Task, split: str, path: str) -> str | None:
    """Find the file of a split below `path`: the official one, or a .jsonl of the same name."""
    if os.path.isfile(path):
        return path
    candidates = [f"{path}/{name}" for name in task.official_files(split)]
    candidates += [f"{path}/{os.path.basename(name)}" for name in task.official_files(split)]
    candidates += [os.path.splitext(name)[0] + ".jsonl" for name in candidates]
    return next((name for name in candidates if os.path.isfile(name)), None)


def _glue_table(task: Task, split: str, path: str | None) -> _Table:
    """Read a split of a task from `path`, or from the hub if it is None.

    Raises:
        ValueError: If the split is not found.
    """
    if path is None:
        return _dataset_table(*_glue_from_hub(task, split, None))
    if not os.path.exists(path):
        raise ValueError(f"dataset.path: there is no file or folder {path!r}.")
    if (file := _glue_file(task, split, path)) is not None:
        return _read_file(file, None, header=task.official_columns)
    for folder in (path, f"{path}/{task.name}"):
        if is_saved_dataset(folder):
            return _read_file(folder, split)
    if any(os.path.isdir(f"{path}/{name.replace('/', '___')}") for name in HUB_NAMES):
        return _dataset_table(*_glue_from_hub(task, split, path))
    tsv = task.official_files(split)[0]
    raise ValueError(
        f"No {split} split of {task.name} below {path!r}. Looked for {tsv} (or .jsonl, also "
        f"without the folder), a dataset saved by `datasets`, and the cache of `datasets`."
    )


def _with_columns(table: _Table) -> tuple[_Table, Collection[str]]:
    """Find the columns of a table in its first row that is not broken."""
    try:
        rows = iter(table.rows)
        head = list(_until_unbroken(rows))
    except DataError as error:
        raise ValueError(f"dataset.path: {error}.") from error
    return replace(table, rows=chain(head, rows)), head[-1].values if head else ()


def _until_unbroken(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        if not row.problem:
            return


def _glue_from_hub(task: Task, split: str, cache: str | None) -> tuple[Dataset, str]:
    for name in HUB_NAMES:
        try:
            return _hub_dataset(name, task.name, split, cache), f"{name} {task.name} {split}"
        except ValueError as error:
            problem = error
    raise ValueError(
        f"{problem} Without a connection, give dataset.path: a folder of the official files or "
        f"the cache of `datasets`."
    ) from problem


# Batches


class TextClassificationCollator:
    """Tokenise, truncate and pad examples into a batch.

    Args:
        tokenizer: The run's tokenizer.
        max_seq_len: The largest L; the longer text of a pair is cut first.
        padding: "max_length" pads to `max_seq_len`, "longest" to the longest of the batch, rounded
            up to a multiple of 8.
        num_labels: The number of classes; 1 for a regression; None if unknown.
        min_num_labels: The smallest number of classes that fits the labels, if `num_labels` is
            None.

    Raises:
        ValueError: If the padding is unknown or the tokenizer has no padding token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        padding: str = "max_length",
        num_labels: int | None = None,
        min_num_labels: int | None = None,
    ):
        if padding not in PADDINGS:
            raise ValueError(f"dataset.padding must be one of {PADDINGS}, got {padding!r}.")
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no padding token.")
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.padding = padding
        self.counts = {"num_labels": num_labels, "min_num_labels": min_num_labels}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of B rows with `text` and, optionally, `text_pair` and `label`.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each (B, L) int64; `labels` (B,),
            int64 for classes and float32 for a regression; and `num_labels` or `min_num_labels`,
            which the model compares with its own number of classes.
        """
        columns = ["text", "text_pair"] if "text_pair" in rows[0] else ["text"]
        texts = [
            shorten(self.tokenizer, [row[name] for name in columns], self.max_seq_len)
            for row in rows
        ]
        longest = self.padding == "longest"
        encoded = self.tokenizer(
            *map(list, zip(*texts, strict=True)),
            truncation="longest_first",
            max_length=self.max_seq_len,
            padding=self.padding,
            # Rounding up must not exceed max_seq_len, which may be the model's limit.
            pad_to_multiple_of=PAD_MULTIPLE if longest and not self.max_seq_len % 8 else None,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        batch = dict(encoded)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        # Plain integers: the model compares them without waiting for the device.
        return batch | {key: n for key, n in self.counts.items() if n is not None}


def _count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Count the tokens of a batch. Each example has one loss, which weights the microbatches."""
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": len(batch["input_ids"]),
    }


def _build(
    examples: Dataset,
    num_labels: int | None,
    dataset: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int | float,
    drop_last: bool,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int | None,
    persistent_workers: bool,
    timeout: int,
) -> DataSpec:
    examples = subset(examples, dataset)
    least = None
    if num_labels is None and "label" in examples.column_names:
        least = max(max(examples["label"]) + 1, 2)
    collator = TextClassificationCollator(
        tokenizer,
        int(dataset["max_seq_len"]),
        dataset.get("padding", "max_length"),
        num_labels,
        least,
    )
    return build_example_loader(
        examples,
        collator,
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


@one_line()
def build_glue_dataloader(
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
    """Build the dataloader `glue`, for one split of a GLUE task. A test split has no labels.

    The keys of `dataset` are

    * `task` (required): cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli or ax;
    * `split` (required): its name on the hub: train, validation, test, validation_matched, ...;
    * `max_seq_len` (required): the largest number of tokens;
    * `path`: a folder of the official files, where a `.jsonl` may replace a `.tsv`; one such file;
      a folder that `datasets` saved; or the cache of `datasets`. Without `path`, the hub or the
      default cache is read;
    * `padding`: max_length (default) or longest;
    * `shuffle` (default: true for train only) and `shuffle_seed`: the order;
    * `max_samples`: the number of examples to use, chosen at random;
    * `on_error`: raise (default), or skip (default for QQP) to leave out broken rows.

    `num_workers` to `timeout` are the arguments of `torch.utils.data.DataLoader`.

    Args:
        tokenizer: A tokenizer with a padding token.
        device_batch_size: The examples per batch on this device.
        dataset: The keys above.
        drop_last: Whether to leave out a last batch that is not full.

    Returns:
        Composer's data spec, with the batches of `TextClassificationCollator`.

    Raises:
        ValueError: If a key, the task, the split, a file, a column or a label is missing or
            wrong; the message names it, and for a row the file and line.
    """
    required = ("task", "split", "max_seq_len")
    tokenizer = check_section("glue", dataset, GLUE_KEYS, required, tokenizer)
    task, split = glue_task(dataset["task"]), dataset["split"]
    if split not in task.splits:
        raise ValueError(
            f"dataset.split: {task.name} has no split {split!r}. It has {', '.join(task.splits)}."
        )
    table, columns = _with_columns(_glue_table(task, split, dataset.get("path")))
    fields = _glue_fields(task, columns, labelled=split not in task.test_splits)
    default = "skip" if task.name == "qqp" else "raise"  # three official rows are cut short
    examples = _to_dataset([table], fields, dataset.get("on_error", default))
    return _build(
        examples,
        task.num_labels,
        dataset,
        tokenizer,
        device_batch_size,
        drop_last,
        num_workers,
        pin_memory,
        prefetch_factor,
        persistent_workers,
        timeout,
    )


def _own_tables(dataset: Mapping[str, Any], columns: tuple[str, ...]) -> list[_Table]:
    """Open the files, or the dataset of the hub, that a `text_classification` section names."""
    path, hub, split = dataset.get("path"), dataset.get("hf_name"), dataset.get("split")
    if (path is None) == (hub is None):
        raise ValueError("text_classification needs either path or hf_name in dataset.")
    if hub is not None:
        read = _hub_dataset(hub, dataset.get("hf_subset"), split, None)
        return [_dataset_table(read, f"{hub} {split}", columns)]
    files = [path] if isinstance(path, str) else list(path or ())
    text = dataset["text_column"]
    return [_read_file(file, split, text_column=text, columns=columns) for file in files]


def _class_names(tables: Sequence[_Table], label: str) -> tuple[str, ...]:
    """Return the class names that the tables themselves have; empty if they have none.

    Raises:
        ValueError: If the names differ between tables.
    """
    found = {table.source: table.classes[label] for table in tables if label in table.classes}
    if len(set(found.values())) > 1 or 0 < len(found) < len(tables):
        raise ValueError(
            f"The sources do not have the same classes in {label!r} ({found}): give "
            "dataset.label_names."
        )
    return next(iter(found.values()), ())


@one_line()
def build_text_classification_dataloader(
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
    """Build the dataloader `text_classification`, for your own texts or pairs of texts.

    The keys of `dataset` are

    * `path`: a file, or a list of files, of any format in `m2_plugin.data.formats` (quotes have
      their usual meaning in .csv and are text in .tsv); a folder that `datasets` saved; or a URL
      such as s3://bucket/train.csv;
    * `hf_name` and `hf_subset`: a dataset of the hub, instead of `path`;
    * `split`: the split of that dataset or folder;
    * `text_column` (required), and `text_pair_column` for pairs;
    * `label_column` (default: label): null for data without labels;
    * `label_names`: the names of the classes in the order of their ids, if labels are words; or
      `[{path: FILE, column: COLUMN}]` for the labels that occur in these data (see
      `m2_plugin.data.labels`), which leaves no others. Without it labels are integers from 0;
    * `regression`: true if labels are numbers to predict;
    * `max_seq_len` (required), `padding`, `shuffle`, `shuffle_seed`, `max_samples` and `on_error`
      (default: raise), as in `build_glue_dataloader`.

    `num_workers` to `timeout` are the arguments of `torch.utils.data.DataLoader`.

    Args:
        tokenizer: A tokenizer with a padding token.
        device_batch_size: The examples per batch on this device.
        dataset: The keys above.
        drop_last: Whether to leave out a last batch that is not full.

    Returns:
        Composer's data spec, with the batches of `TextClassificationCollator`.

    Raises:
        ValueError: If a key, file, column or label is missing or wrong; the message names it, and
            for a row the file and line.
    """
    required = ("text_column", "max_seq_len")
    tokenizer = check_section("text_classification", dataset, OWN_KEYS, required, tokenizer)
    given, regression = dataset.get("label_names"), dataset.get("regression", False)
    if regression and given and not in_data(given):
        raise ValueError(
            "dataset has both label_names, for classes, and regression: true: remove one of them."
        )
    names = None if regression else label_names(given, "dataset.label_names")
    texts = (dataset["text_column"], dataset.get("text_pair_column"))
    fields = _Fields(
        texts=tuple(name for name in texts if name is not None),
        label=dataset.get("label_column", "label"),
        spellings={name: i for i, name in enumerate(names)} if names else None,
        by_name=names is not None,
        names_only=in_data(given) is not None,
    )
    tables = _own_tables(dataset, fields.columns)
    classes = names or (() if regression else _class_names(tables, fields.label or ""))
    num_labels = 1 if regression else len(classes) or None
    fields = replace(fields, num_labels=num_labels)
    examples = _to_dataset(tables, fields, dataset.get("on_error", "raise"))
    return _build(
        examples,
        num_labels if fields.label is not None else None,
        dataset,
        tokenizer,
        device_batch_size,
        drop_last,
        num_workers,
        pin_memory,
        prefetch_factor,
        persistent_workers,
        timeout,
    )
