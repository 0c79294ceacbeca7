"""The `glue` and `text_classification` dataloaders: sentences or pairs with a class or a number.

GLUE is a special case: `glue` looks up what its tasks' files, columns and labels are called, and
leaves the rest to `text_classification`. Whatever the source, examples become an Arrow table of
texts and label ids; a collator tokenises a batch at a time, so that nothing is drawn or cached
and the batches of an epoch are a function of the data, the seed and the epoch.
"""

import contextlib
import copy
import csv
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from composer.core.data_spec import DataSpec
from composer.utils import dist
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from m2_plugin.foundry.loaders import PAD_MULTIPLE, build_loader
from m2_plugin.glue.tasks import Task
from m2_plugin.glue.tasks import task as glue_task
from m2_plugin.suggest import check_keys

__all__ = [
    "TextClassificationCollator",
    "build_glue_dataloader",
    "build_text_classification_dataloader",
]

log = logging.getLogger(__name__)

DEFAULT_SEED = 19  # the published GLUE recipe's
PADDINGS = ("max_length", "longest")
ON_ERROR = ("raise", "skip")
HUB_NAMES = ("nyu-mll/glue", "glue")  # today's and the former one, by which caches may know it
NO_LABEL = "-"  # official MNLI: the annotators did not agree

SHARED_KEYS = {
    "max_samples",
    "max_seq_len",
    "on_error",
    "padding",
    "shuffle",
    "shuffle_seed",
    "split",
}
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


@dataclass
class _Table:
    """Columns as they were read, where each row stands, and what could not be read."""

    source: str
    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str]
    broken: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return max((len(column) for column in self.columns.values()), default=0)


@dataclass(frozen=True)
class _Fields:
    """What to take from a table.

    Attributes:
        texts: Column of the text, or those of the pair.
        label: Column of the label; None for data to predict.
        spellings: Label id by each way to write it; None to take integers as they are.
        num_labels: Number of classes, 1 for a regression, None where the data do not say.
        label_range: Smallest and largest number of a regression.
        skip_label: A label whose rows are left out.
    """

    texts: tuple[str, ...]
    label: str | None
    spellings: Mapping[str, int] | None = None
    num_labels: int | None = None
    label_range: tuple[float, float] = (-math.inf, math.inf)
    skip_label: str | None = None


# Reading files


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    """Text of a local or remote file, compressed or not, its line ends as they are."""
    try:
        # utf-8-sig: the official MRPC begins with a byte order mark.
        with fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"dataset.path: there is no file {path!r}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error


def _read_tsv(
    path: str, text_columns: Sequence[str] = (), header: Sequence[str] | None = None
) -> _Table:
    """Read tab-separated values as GLUE's are: quotes are text, a row is a line.

    Args:
        path: The file.
        text_columns: Columns that a header line must name to be one.
        header: Columns of a file without a header line.
    """
    with _open(path) as file:
        # Not splitlines: the texts hold other line separators of Unicode.
        lines = [line.removesuffix("\r") for line in file.read().split("\n")]
    first = 0
    if header is None or set(text_columns) <= set(lines[0].split("\t")):
        header, first = lines[0].split("\t"), 1
    rows, numbers, broken = [], [], []
    for number, line in enumerate(lines[first:], first + 1):
        if not line:
            continue
        row = line.split("\t")
        if len(row) != len(header):
            broken.append(f"{path}:{number}: {_wrong_count(row, header)}")
            continue
        rows.append(row)
        numbers.append(number)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return _Table(path, columns, lambda i: f"{path}:{numbers[i]}", broken)


def _wrong_count(row: Sequence[str], header: Sequence[str]) -> str:
    return f"{len(row)} columns where there should be {len(header)}"


def _read_csv(path: str) -> _Table:
    rows, numbers, broken = [], [], []
    with _open(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if len(row) == len(header):
                    rows.append(row)
                    numbers.append(reader.line_num)
                elif row:
                    broken.append(f"{path}:{reader.line_num}: {_wrong_count(row, header)}")
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}.") from error
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return _Table(path, columns, lambda i: f"{path}:{numbers[i]}", broken)


def _read_jsonl(path: str) -> _Table:
    rows, numbers, broken = [], [], []
    with _open(path) as file:
        for number, line in enumerate(file.read().split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                broken.append(f"{path}:{number}: no JSON object ({error})")
                continue
            rows.append(row)
            numbers.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return _Table(path, columns, lambda i: f"{path}:{numbers[i]}", broken)


READERS: dict[str, Callable[[str], _Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
}


def _suffix(path: str) -> str:
    for compression in (".gz", ".xz", ".bz2", ".zst"):
        path = path.removesuffix(compression)
    return os.path.splitext(path)[1].lower()


def _read_file(path: str) -> _Table:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise ValueError(
            f"dataset.path: {path!r} must end in one of {', '.join(READERS)}, or those and .gz, "
            f".xz, .bz2 or .zst."
        )
    return reader(path)


# Reading Hugging Face datasets


def _of_dataset(dataset: Dataset, source: str, decode: str | None = None) -> _Table:
    """Columns of a dataset; the class ids of the column `decode` as names, where it has some."""
    columns = {name: dataset[name] for name in dataset.column_names}
    names = _class_names(dataset, decode)
    if decode is not None and names is not None:
        columns[decode] = [names[i] if i >= 0 else i for i in columns[decode]]
    return _Table(source, columns, lambda i: f"{source}, row {i}")


def _is_saved_dataset(path: str) -> bool:
    """Whether `datasets` saved a dataset, or a dict of its splits, in this folder."""
    return any(os.path.isfile(f"{path}/{name}") for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(path: str, split: str | None) -> Dataset:
    """A split of what `save_to_disk` wrote.

    Raises:
        ValueError: If the split is not there or not given; names those that are.
    """
    saved = datasets.load_from_disk(path)
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"{path!r} has no split {split!r}. dataset.split: one of {list(saved)}.")
    return saved[split]


def _hub_dataset(name: str, subset: str | None, split: str | None, cache: str | None) -> Dataset:
    """A split of a dataset of the hub, or of its cache.

    Raises:
        ValueError: If it is not to be had, or has no such split.
    """
    if split is None:
        raise ValueError(f"dataset.split: say which split of {name!r} to read.")
    try:
        return datasets.load_dataset(name, subset, split=split, cache_dir=cache)
    except (ValueError, OSError) as error:  # OSError: not found, neither online nor in the cache
        which = f"{name!r}, {subset!r}" if subset else repr(name)
        raise ValueError(f"The split {split!r} of the dataset {which}: {error}") from error


def _class_names(dataset: Dataset, column: str | None) -> tuple[str, ...] | None:
    """Names of the classes, where the dataset's features say them."""
    feature = dataset.features.get(column) if column else None
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


# From a table to examples


def _column(table: _Table, name: str, key: str) -> Sequence[Any]:
    if name not in table.columns:
        if table.broken and not len(table):  # not one row to learn the columns from
            raise ValueError(f"{table.broken[0]}.")
        raise ValueError(
            f"{table.source} has no column {name!r} ({key}). Its columns: "
            f"{', '.join(map(repr, table.columns)) or 'none'}."
        )
    return table.columns[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} should be a text, got {value!r}")
    return value


def _class_id(value: Any, fields: _Fields) -> int:
    # Integers too: names may be numbers that do not start at 0, such as stars.
    if fields.spellings is not None and str(value) in fields.spellings:
        return fields.spellings[str(value)]
    try:
        label = int(value) if isinstance(value, (int, str)) else None
    except ValueError:
        label = None
    n = fields.num_labels
    if label is None or label < 0 or (n is not None and label >= n):
        names = "" if fields.spellings is None else f" ({', '.join(fields.spellings)})"
        accepted = "0, 1, 2, ..." if n is None else f"one of 0 to {n - 1}{names}"
        raise ValueError(f"label {value!r} is out of range: it must be {accepted}")
    return label


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
    """Texts and labels by column, and what is wrong with the rows that are left out."""
    texts = [
        _column(table, name, key)
        for name, key in zip(fields.texts, ("text_column", "text_pair_column"), strict=False)
    ]
    labels = None
    if fields.label is not None:
        labels = _column(table, fields.label, "label_column")
        if fields.num_labels is None and fields.spellings is None:
            _check_not_words(table, labels)
    read = _number if fields.num_labels == 1 else _class_id
    names = ("text", "text_pair")[: len(texts)]
    out: dict[str, list[Any]] = {name: [] for name in names}
    if labels is not None:
        out["label"] = []
    broken = list(table.broken)
    for i in range(len(table)):
        try:
            row: list[Any] = [
                _text(c[i], name) for c, name in zip(texts, fields.texts, strict=True)
            ]
            if labels is not None:
                if labels[i] == fields.skip_label and fields.skip_label is not None:
                    continue
                row.append(read(labels[i], fields))
        except ValueError as error:
            broken.append(f"{table.where(i)}: {error}")
            continue
        for column, value in zip(out.values(), row, strict=True):
            column.append(value)
    return out, broken


def _check_not_words(table: _Table, labels: Sequence[Any]) -> None:
    """Words as labels need their order, which one file cannot be trusted to give."""
    words = Counter(v for v in labels if isinstance(v, str) and not v.lstrip("-").isdigit())
    if words:
        found = sorted(word for word, _ in words.most_common(20))
        raise ValueError(
            f"{table.source}: labels are words. Give them in the order of their ids, e.g. "
            f"dataset.label_names: [{', '.join(found)}]; or regression: true for numbers."
        )


def _to_dataset(tables: Sequence[_Table], fields: _Fields, on_error: str) -> Dataset:
    """The examples of all tables as one dataset with `text`, `text_pair` and `label`.

    Raises:
        ValueError: If a column is missing, a row is broken and `on_error` is not skip, or nothing
            is left.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"dataset.on_error must be one of {ON_ERROR}, got {on_error!r}.")
    parts, broken = [], []
    for table in tables:
        columns, wrong = _examples(table, fields)
        broken += wrong
        parts.append(columns)
    if broken:
        count = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
        if on_error == "raise":
            raise ValueError(f"{broken[0]}{count}. `on_error: skip` in dataset leaves them out.")
        log.warning("Left out %d broken rows; the first: %s", len(broken), broken[0])
    merged = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    if not merged["text"]:
        sources = ", ".join(table.source for table in tables)
        raise ValueError(f"There are no examples in {sources}.")
    return Dataset.from_dict(merged)


# GLUE's own files


def _glue_fields(task: Task, table: _Table | None, labelled: bool) -> _Fields:
    """Fields under the names of the hub, or of the official files where a table has those."""
    texts, label = task.text_columns, "label"
    if table is not None:
        if not set(texts) <= set(table.columns):
            texts = task.official_text_columns
        if label not in table.columns or task.official_label_column in table.columns:
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
    )


def _glue_file(task: Task, split: str, path: str) -> str | None:
    """The file of a split below `path`, official or jsonl of the same name."""
    if os.path.isfile(path):
        return path
    candidates = [f"{path}/{name}" for name in task.official_files(split)]
    candidates += [f"{path}/{os.path.basename(name)}" for name in task.official_files(split)]
    candidates += [os.path.splitext(name)[0] + ".jsonl" for name in candidates]
    return next((name for name in candidates if os.path.isfile(name)), None)


def _glue_table(task: Task, split: str, path: str | None) -> _Table:
    """Read a split of a task from wherever `path` leads.

    Raises:
        ValueError: If there is nothing of that split.
    """
    if path is None:
        return _of_dataset(*_glue_from_hub(task, split, None))
    if not os.path.exists(path):
        raise ValueError(f"dataset.path: there is no file or folder {path!r}.")
    file = _glue_file(task, split, path)
    if file is not None:
        if _suffix(file) == ".tsv":
            header = task.official_columns or None
            return _read_tsv(file, task.official_text_columns, header)
        return _read_file(file)
    for folder in (path, f"{path}/{task.name}"):
        if _is_saved_dataset(folder):
            return _of_dataset(_saved_dataset(folder, split), folder)
    if any(os.path.isdir(f"{path}/{name.replace('/', '___')}") for name in HUB_NAMES):
        return _of_dataset(*_glue_from_hub(task, split, path))
    tsv = task.official_files(split)[0]
    raise ValueError(
        f"No {split} split of {task.name} below {path!r}. Looked for {tsv} (or .jsonl, also "
        f"without the folder), a dataset saved by `datasets`, and the cache of `datasets`."
    )


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
    """Tokenises, truncates and pads examples into a batch.

    Args:
        tokenizer: The run's tokenizer.
        max_seq_len: L at most; of a pair, the longer text is cut first.
        padding: "max_length" pads to `max_seq_len`, "longest" to the longest of the batch, rounded
            up to a multiple of 8.
        num_labels: Number of classes, 1 for a regression; None where the data do not say.
        min_num_labels: What the labels seen call for, where `num_labels` is None.

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
        """Make a batch of B rows with `text`, and `text_pair` and `label` where there are some.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each (B, L) int64; `labels` (B,),
            int64 or for a regression float32; and, for the model to check, how many classes the
            data have.
        """
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        longest = self.padding == "longest"
        encoded = self.tokenizer(
            [row["text"] for row in rows],
            pairs,
            truncation="longest_first",
            max_length=self.max_seq_len,
            padding=self.padding,
            # A multiple beyond max_seq_len would be longer than the model may take.
            pad_to_multiple_of=PAD_MULTIPLE if longest and not self.max_seq_len % 8 else None,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        batch = dict(encoded)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        # Plain integers: to compare them costs no wait for the device.
        return batch | {key: n for key, n in self.counts.items() if n is not None}


def _count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Tokens in a batch; its losses are one per example, which is what microbatches weigh by."""
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": len(batch["input_ids"]),
    }


def _count_samples(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"])


def _subset(examples: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """That many examples at random, in their order: files may be sorted by label."""
    if max_samples is None or max_samples >= len(examples):
        return examples
    if max_samples < 1:
        raise ValueError(f"dataset.max_samples must be at least 1, got {max_samples}.")
    chosen = np.random.default_rng(seed).choice(len(examples), max_samples, replace=False)
    return examples.select(sorted(chosen.tolist()))


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
    seed = int(dataset.get("shuffle_seed", DEFAULT_SEED))
    shuffle = dataset.get("shuffle")
    if shuffle is None:
        shuffle = dataset.get("split") == "train"
    examples = _subset(examples, dataset.get("max_samples"), seed)
    least = None
    if num_labels is None and "label" in examples.column_names:
        least = max(max(examples["label"]) + 1, 2)
    # As every DistributedSampler, it draws an epoch's order from seed + epoch, which Composer sets.
    sampler = dist.get_sampler(examples, drop_last=drop_last, shuffle=bool(shuffle), seed=seed)
    loader = build_loader(
        examples,
        num_samples=len(sampler),
        sampler=sampler,
        collate_fn=TextClassificationCollator(
            tokenizer,
            int(dataset["max_seq_len"]),
            dataset.get("padding", "max_length"),
            num_labels,
            least,
        ),
        batch_size=int(device_batch_size),
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout,
    )
    # Not the host's data spec: it takes labels for one per token.
    return DataSpec(
        dataloader=loader,
        get_num_samples_in_batch=_count_samples,
        get_num_tokens_in_batch=_count_tokens,
    )


def _check(
    name: str,
    dataset: Mapping[str, Any],
    accepted: set[str],
    required: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(f"{name} needs a tokenizer.")
    check_keys(dataset, accepted, "dataset")
    for key in required:
        if dataset.get(key) is None:
            raise ValueError(f"{name} needs the key {key!r} in dataset.")
    return copy.deepcopy(tokenizer)  # as in mlm_text: the run's own one goes into checkpoints


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
    """Build the loader of a GLUE task; `glue` in a YAML.

    Args:
        tokenizer: The run's tokenizer; the host passes it.
        device_batch_size: Examples of a batch of one rank; the host passes it.
        dataset: `task` (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli or ax), `split` by its
            name on the hub (train, validation, test, validation_matched, ...) and `max_seq_len`.
            `path` leads to a folder of the official files, where a `.jsonl` may stand for a `.tsv`;
            to such a file; to what `datasets` saved; or to the cache of `datasets`. Without it the
            hub or the usual cache is read. `padding` is max_length or longest; `shuffle` (by
            default of train only) and `shuffle_seed` set the order; `max_samples` takes that many
            examples at random; `on_error: skip` leaves broken rows out, as is usual for QQP only.
            A test split has no labels.
        drop_last: Leave out a last batch that is not full.
        num_workers: Processes that tokenise.
        pin_memory: As torch's DataLoader.
        prefetch_factor: As torch's DataLoader.
        persistent_workers: As torch's DataLoader.
        timeout: As torch's DataLoader.

    Raises:
        ValueError: If a key, the task, the split, a file, a column or a label is missing or
            wrong; names it, and for a row the file and line.
    """
    tokenizer = _check("glue", dataset, GLUE_KEYS, ("task", "split", "max_seq_len"), tokenizer)
    task, split = glue_task(dataset["task"]), dataset["split"]
    if split not in task.splits:
        raise ValueError(
            f"dataset.split: {task.name} has no split {split!r}. It has {', '.join(task.splits)}."
        )
    table = _glue_table(task, split, dataset.get("path"))
    fields = _glue_fields(task, table, labelled=split not in task.test_splits)
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


def _own_tables(dataset: Mapping[str, Any]) -> tuple[list[_Table], tuple[str, ...] | None]:
    """Tables of a `text_classification` dataset, and the classes' names if a dataset knows them."""
    path, hub, split = dataset.get("path"), dataset.get("hf_name"), dataset.get("split")
    if (path is None) == (hub is None):
        raise ValueError("text_classification needs either path or hf_name in dataset.")
    label = dataset.get("label_column", "label")
    decode = label if dataset.get("label_names") else None  # whose order may be another
    if hub is not None:
        read = _hub_dataset(hub, dataset.get("hf_subset"), split, None)
        return [_of_dataset(read, f"{hub} {split}", decode)], _class_names(read, label)
    if isinstance(path, str) and _is_saved_dataset(path):
        read = _saved_dataset(path, split)
        return [_of_dataset(read, path, decode)], _class_names(read, label)
    files = [path] if isinstance(path, str) else list(path or ())
    return [_read_file(file) for file in files], None


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
    """Build the loader of a user's own texts; `text_classification` in a YAML.

    Args:
        tokenizer: The run's tokenizer; the host passes it.
        device_batch_size: Examples of a batch of one rank; the host passes it.
        dataset: `path`, a file or a list of files (.jsonl; .csv, quoted as usual; .tsv, in which
            quotes are text) or a folder that `datasets` saved, or `hf_name` and `hf_subset` of the
            hub, with `split`. `text_column` and, for pairs, `text_pair_column`; `label_column` is
            `label` by default, null for data without labels. Labels are integers from 0, or words
            whose `label_names` are given in the order of the ids, or with `regression: true`
            numbers. The other keys are those of `build_glue_dataloader`.
        drop_last: Leave out a last batch that is not full.
        num_workers: Processes that tokenise.
        pin_memory: As torch's DataLoader.
        prefetch_factor: As torch's DataLoader.
        persistent_workers: As torch's DataLoader.
        timeout: As torch's DataLoader.

    Raises:
        ValueError: If a key, file, column or label is missing or wrong; names it, and for a row
            the file and line.
    """
    required = ("text_column", "max_seq_len")
    tokenizer = _check("text_classification", dataset, OWN_KEYS, required, tokenizer)
    tables, found_names = _own_tables(dataset)
    texts = (dataset["text_column"], dataset.get("text_pair_column"))
    names, regression = dataset.get("label_names"), dataset.get("regression", False)
    if regression and names:
        raise ValueError("dataset: label_names and regression: true exclude each other.")
    classes = names or found_names
    num_labels = 1 if regression else len(classes) if classes else None
    fields = _Fields(
        texts=tuple(name for name in texts if name is not None),
        label=dataset.get("label_column", "label"),
        spellings={str(name): i for i, name in enumerate(names)} if names else None,
        num_labels=num_labels,
    )
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
