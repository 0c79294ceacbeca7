"""Build the `DataLoader` of this package's dataloaders, and refuse one without batches."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core.data_spec import DataSpec
from composer.utils import dist
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from m2_plugin.suggest import check_keys

__all__ = [
    "ON_ERROR",
    "PADDINGS",
    "PAD_MULTIPLE",
    "SHARED_KEYS",
    "Padding",
    "build_example_loader",
    "build_loader",
    "check_section",
    "leave_out",
    "split_quietly",
    "subset",
]

log = logging.getLogger(__name__)

PAD_MULTIPLE = 8  # for rows of unequal length; tensor cores are fastest at multiples of 8
PADDINGS = ("max_length", "longest")
ON_ERROR = ("raise", "skip")
DEFAULT_SEED = 19  # the published GLUE recipe's
# The keys in `dataset` of all loaders of examples that fit in memory.
SHARED_KEYS = {
    "max_samples",
    "max_seq_len",
    "on_error",
    "padding",
    "shuffle",
    "shuffle_seed",
    "split",
}


def build_loader(
    dataset: Any,
    *,
    num_samples: int,
    batch_size: int,
    drop_last: bool,
    num_workers: int,
    prefetch_factor: int | None,
    persistent_workers: bool,
    timeout: int,
    pin_memory: bool,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Build a `torch.utils.data.DataLoader` that gives at least one batch per epoch.

    If an epoch has no batch, Composer runs for ever, or saves an untrained model.

    Without workers, `prefetch_factor`, `persistent_workers` and `timeout` are ignored; without a
    GPU, `pin_memory` is.

    Args:
        dataset: The dataset.
        num_samples: The samples of this rank in one epoch.
        batch_size: The samples of this rank in one batch.
        drop_last: Whether to leave out a last batch that is not full.
        **kwargs: Other arguments of `DataLoader`.

    Raises:
        ValueError: If an epoch has no batch.
    """
    if num_samples == 0:
        raise ValueError(
            "This rank has no samples and no batch: give more data, or use fewer ranks."
        )
    if drop_last and num_samples < batch_size:
        raise ValueError(
            f"drop_last: true leaves no batch: an epoch has {num_samples} samples per rank and a "
            f"batch has {batch_size}. Set train_loader.drop_last to false or a smaller "
            "global_train_batch_size, use fewer ranks, or give more data."
        )
    has_workers = num_workers > 0
    return DataLoader(
        dataset,
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=num_workers,
        # torch refuses these three without workers.
        prefetch_factor=prefetch_factor if has_workers else None,
        persistent_workers=persistent_workers and has_workers,
        timeout=timeout if has_workers else 0,
        pin_memory=pin_memory and torch.cuda.is_available(),  # torch would warn
        **kwargs,
    )


def check_section(
    name: str,
    dataset: Mapping[str, Any],
    accepted: set[str],
    required: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """Check the keys of a `dataset` section, and return a copy of the tokenizer.

    Raises:
        ValueError: If a key is unknown, a required one is missing, or there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError(f"{name} needs a tokenizer.")
    check_keys(dataset, accepted, "dataset")
    for key in required:
        if dataset.get(key) is None:
            raise ValueError(f"{name} needs the key {key!r} in dataset.")
    return copy.deepcopy(tokenizer)  # as in mlm_text: the run's own goes into checkpoints


def leave_out(broken: Sequence[str], on_error: str) -> None:
    """Raise an error for broken rows, or log how many are left out.

    Args:
        broken: What is wrong with each of them, with its place.
        on_error: raise or skip.

    Raises:
        ValueError: If `on_error` is unknown, or is raise and a row is broken.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"dataset.on_error must be one of {ON_ERROR}, got {on_error!r}.")
    if not broken:
        return
    count = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
    if on_error == "raise":
        raise ValueError(f"{broken[0]}{count}. To leave it out, set dataset.on_error to skip.")
    log.warning("Left out %d broken rows; the first: %s", len(broken), broken[0])


def subset(examples: Dataset, dataset: Mapping[str, Any]) -> Dataset:
    """Choose `max_samples` examples at random, since files may be sorted; keep their order.

    Raises:
        ValueError: If `max_samples` is less than 1.
    """
    max_samples = dataset.get("max_samples")
    if max_samples is None or max_samples >= len(examples):
        return examples
    if max_samples < 1:
        raise ValueError(f"dataset.max_samples must be at least 1, got {max_samples}.")
    draw = np.random.default_rng(int(dataset.get("shuffle_seed", DEFAULT_SEED)))
    return examples.select(sorted(draw.choice(len(examples), max_samples, replace=False).tolist()))


class Padding:
    """Pad rows of token ids, or of other values of tokens, to tensors.

    Args:
        tokenizer: A tokenizer with a padding token.
        max_seq_len: The largest L.
        padding: "max_length" pads to `max_seq_len`, "longest" to the longest of the batch, rounded
            up to a multiple of 8.

    Raises:
        ValueError: If the padding is unknown or the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, padding: str):
        if padding not in PADDINGS:
            raise ValueError(f"dataset.padding must be one of {PADDINGS}, got {padding!r}.")
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no padding token.")
        self.fill = tokenizer.pad_token_id
        self.max_seq_len = max_seq_len
        self.longest = padding == "longest"

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `token_type_ids`, (B, L) int64, of rows."""
        ids = [row["input_ids"] for row in rows]
        kinds = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in rows]
        return {
            "input_ids": self(ids, self.fill),
            "attention_mask": self([[1] * len(own) for own in ids], 0),
            "token_type_ids": self(kinds, 0),
        }

    def __call__(self, rows: Sequence[Sequence[Any]], fill: int) -> Tensor:
        """Return (B, L, ...) int64 of B rows of at most `max_seq_len` values, filled at the end."""
        length = self.max_seq_len
        if self.longest:
            longest = max(map(len, rows))
            length = min(length, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        first = torch.tensor(rows[0])
        out = torch.full((len(rows), length, *first.shape[1:]), fill)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out


def build_example_loader(
    examples: Dataset,
    collate_fn: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    count_tokens: Callable[[Mapping[str, Any]], dict[str, int]],
    dataset: Mapping[str, Any],
    device_batch_size: int | float,
    drop_last: bool,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int | None,
    persistent_workers: bool,
    timeout: int,
) -> DataSpec:
    """Build the loader of examples in memory, and Composer's data spec.

    The batches of an epoch depend on the data, the seed and the epoch alone.

    Args:
        examples: The examples.
        collate_fn: Makes a batch of examples, with `input_ids` (B, L).
        count_tokens: Counts the tokens of a batch, `total` and `loss_generating`.
        dataset: The section, with `shuffle` (default: true for the split train only) and
            `shuffle_seed`.
    """
    seed = int(dataset.get("shuffle_seed", DEFAULT_SEED))
    shuffle = dataset.get("shuffle")
    if shuffle is None:
        shuffle = dataset.get("split") == "train"
    # The sampler draws the order of an epoch from seed + epoch; Composer sets the epoch.
    sampler = dist.get_sampler(examples, drop_last=drop_last, shuffle=bool(shuffle), seed=seed)
    loader = build_loader(
        examples,
        num_samples=len(sampler),
        sampler=sampler,
        collate_fn=collate_fn,
        batch_size=int(device_batch_size),
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout,
    )
    # llm-foundry's data spec does not fit: it expects a label for each token.
    spec = DataSpec(
        dataloader=loader,
        get_num_samples_in_batch=_count_samples,
        get_num_tokens_in_batch=count_tokens,
    )
    return split_quietly(spec)


def _count_samples(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"])


def split_quietly(spec: DataSpec) -> DataSpec:
    """Let a data spec split a batch that is smaller than a microbatch without a warning.

    The last batch of an evaluation usually is. The batch has `input_ids`, a row per sample.
    """
    split = spec.split_batch

    def split_batch(batch: Any, microbatch_size: int | float) -> Sequence[Any]:
        small = len(batch["input_ids"]) <= microbatch_size
        return [batch] if small else split(batch, microbatch_size)

    spec.split_batch = split_batch
    return spec
