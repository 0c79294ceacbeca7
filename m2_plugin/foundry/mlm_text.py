"""The `mlm_text` dataloader: llm-foundry's `text` loader with deterministic masking.

Dataset, streams and data spec are llm-foundry's; the collator is ours. It masks as BERT does. The
masks depend on the seed, the epoch and the tokens of the sample only, not on workers, ranks or the
other samples of a batch, so that a resumed run has the masks of an unbroken run.
"""

import copy
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core.data_spec import DataSpec
from composer.utils import dist
from llmfoundry import registry
from llmfoundry.data.text_data import (
    ConcatenatedSequenceCollatorWrapper,
    StreamingTextDataset,
    build_streams,
)
from llmfoundry.utils.registry_utils import construct_from_registry
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from transformers import PreTrainedTokenizerBase

from m2_plugin.data.tokenizer import vocabulary_size
from m2_plugin.foundry.errors import one_line
from m2_plugin.foundry.loaders import PAD_MULTIPLE, build_loader, split_quietly
from m2_plugin.foundry.mds_index import INDEX, check_hashes, check_size, read_index, shard_file
from m2_plugin.foundry.private import get_hash, release_shard, stop_reading
from m2_plugin.foundry.token_streams import first_lengths, local_streams
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX
from m2_plugin.suggest import check_keys

__all__ = ["DRAWS", "MLMCollator", "MLMTextDataset", "build_mlm_text_dataloader", "threshold"]

log = logging.getLogger(__name__)

DEFAULT_SEED = 9176  # llm-foundry's default shuffle_seed

OWN_KEYS = frozenset({"mlm_probability", "mask_seed", "remask_each_epoch"})
FOUNDRY_COLLATOR_KEYS = frozenset(
    {
        "eos_token_id",
        "bos_token_id",
        "override_eos_token_id_mismatch_error",
        "override_bos_token_id_mismatch_error",
        "seq_parallel_replication",
    }
)
SET_BY_BUILDER = frozenset({"self", "tokenizer", "batch_size", "kwargs"})

DRAWS = "mask_draws"  # the key of the draws in a batch, which `mlm_probability_schedule` takes out

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
KIND_SALT = np.uint64(0xD1B54A32D192ED03)
MASK_BELOW = np.uint64(int(0.8 * 2**32))  # 80 % [MASK]
KEEP_FROM = np.uint64(int(0.9 * 2**32))  # 10 % unchanged; between the two, 10 % a random id


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words in place (the finaliser of splitmix64), and return `x`."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _key64(*words: int) -> np.uint64:
    """Fold integers into one 64-bit key."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = _mix64(key + GOLDEN + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(key[0])


class MLMTextDataset(StreamingTextDataset):
    """llm-foundry's text dataset, with the epoch in each item.

    The collator needs the epoch, and its worker processes have no other way to learn it. The value
    comes from Streaming's counter in shared memory. It is `epoch + 1` from the barrier at the start
    of an epoch until all workers have left that epoch, also with persistent workers and after
    `load_state_dict`.
    """

    failure: str | None = None
    is_checked = False  # whether a sample of tokens was looked at

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's samples of one epoch.

        Raises:
            RuntimeError: If a shard cannot be read; the message names its file.
        """
        yield from super().__iter__()
        if self.failure is not None:  # Streaming ends the epoch as if it were over
            raise RuntimeError(self.failure)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Read and tokenise one sample.

        Returns:
            `input_ids` (L,), `attention_mask` (L,) if the sample was text, and `epoch`.

        Raises:
            RuntimeError: If the sample cannot be read; the message names the shard's file.
        """
        try:
            sample = super().__getitem__(idx)
            if not self.is_checked and isinstance(sample, torch.Tensor):
                self.is_checked = True
                self._check_length(idx)
        except Exception as error:
            self._fail(self.spanner[idx][0], error)
            raise RuntimeError(self.failure) from error
        epoch = max(self.next_epoch - 1, 0)
        if isinstance(sample, torch.Tensor):
            return {"input_ids": sample.numpy(), "epoch": epoch}
        return {
            "input_ids": np.array(sample["input_ids"], dtype=np.int64),
            "attention_mask": np.array(sample["attention_mask"], dtype=bool),
            "epoch": epoch,
        }

    def _check_length(self, idx: int) -> None:
        """Refuse to train on samples that are all too short; known only once a shard is there.

        Raises:
            ValueError: If the only stream has samples of one length below `max_seq_len`.
        """
        if len(self.streams) > 1 or not self.shuffle:
            return
        lengths = first_lengths(self.shards[self.spanner[idx][0]], self.token_encoding_type)
        if len(lengths) == 1 and (length := lengths.pop()) < self.max_seq_len:
            raise ValueError(
                f"samples have only {length} tokens, but dataset.max_seq_len is "
                f"{self.max_seq_len}: positions after them would never be trained. Set it to "
                f"{length}, or convert the data again with --concat_tokens {self.max_seq_len}"
            )

    def _read_binary_tokenized_sample(self, sample: dict[str, Any]) -> torch.Tensor:
        """Read a sample of tokens; llm-foundry's method would cut a longer one off.

        Raises:
            ValueError: If it is longer than `max_seq_len`.
        """
        tokens = sample["tokens"]
        if isinstance(tokens, bytes):
            tokens = np.frombuffer(tokens, dtype=self.token_encoding_type)
        if len(tokens) > self.max_seq_len:
            raise ValueError(
                f"a sample has {len(tokens)} tokens, but dataset.max_seq_len is "
                f"{self.max_seq_len}: set it to {len(tokens)}, or convert the data again with "
                f"--concat_tokens {self.max_seq_len}"
            )
        return super()._read_binary_tokenized_sample(sample)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard if it is not local; a failure ends the run.

        Without this method, Streaming would leave the shard marked as in preparation, so that other
        workers wait for ever, and would lose errors in threads that download ahead.

        Args:
            shard_id: The number of the shard.
            blocking: Whether to wait for another worker that prepares the shard, as reading does.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            release_shard(self, shard_id)
            self._fail(shard_id, error)
            if blocking:
                raise

    def _fail(self, shard_id: int, error: Exception) -> None:
        """Keep the first error, and end Streaming's threads."""
        if self.failure is None:
            file = self._shard_file(shard_id)
            self.failure = f"Samples cannot be read from shard {file}: {error}"
        stop_reading(self)

    def _shard_file(self, shard_id: int) -> str:
        stream = self.streams[self.stream_per_shard[shard_id]]
        raw_info, _ = self.shards[shard_id].file_pairs[0]
        return os.path.join(stream.local, stream.split or "", raw_info.basename)


class MLMCollator:
    """Pad samples into a batch, and mask it as BERT does.

    Each position that is neither padding nor a special token is chosen independently with
    `mlm_probability`. Of the chosen positions 80% become [MASK], 10% a random id, and 10% stay.
    Labels hold the original id at chosen positions and -100 elsewhere.

    The random numbers are counters hashed with one key per row (splitmix64). The key is a hash of
    the seed, the epoch and the row's tokens. Two equal samples in one epoch are therefore masked
    alike, for example if a stream's `repeat` gives a sample several times.

    Args:
        tokenizer: The tokenizer, for the special ids and the vocabulary size.
        mlm_probability: The share of the positions to predict, strictly between 0 and 1.
        max_seq_len: The longest row; rows of unequal length are padded to a multiple of 8.
        seed: The seed of the masks.
        remask_each_epoch: Whether each epoch has new masks. False keeps the masks of epoch 0, so
            that evaluation losses can be compared.

    Raises:
        ValueError: If the probability is out of range or the tokenizer has no mask or pad token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float,
        max_seq_len: int,
        seed: int = DEFAULT_SEED,
        remask_each_epoch: bool = True,
    ):
        _check_probability(mlm_probability)
        for token in ("mask_token", "pad_token"):
            if getattr(tokenizer, token) is None:
                raise ValueError(
                    f"mlm_text needs a tokenizer with a {token}; "
                    f"{tokenizer.name_or_path!r} has none."
                )
        self.mlm_probability = mlm_probability
        self.max_seq_len = max_seq_len
        self.seed = seed
        self.remask_each_epoch = remask_each_epoch
        self.pad_id = int(tokenizer.pad_token_id)
        self.mask_id = int(tokenizer.mask_token_id)
        self.vocab_size = vocabulary_size(tokenizer)
        self.is_special = np.zeros(self.vocab_size, dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        # If a tokenizer pads with its end-of-text token, a stored pad id is text, not padding.
        others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
        self.pad_id_is_padding = self.pad_id not in others
        self.choose_below = np.uint64(threshold(mlm_probability))
        self.give_draws = False

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch of B samples.

        Args:
            samples: Dicts with `input_ids` and optionally `attention_mask` and `epoch`, or 1-D
                tensors of ids, in any mixture.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` and `labels`, each (B, L) int64, and
            llm-foundry's token counts per row, `total_tokens` and `loss_generating_tokens`. With
            `give_draws` also `mask_draws`, (B, L) int64: a position is chosen if its draw is below
            half the `threshold` of the probability.

        Raises:
            ValueError: If an id lies outside the tokenizer's vocabulary.
        """
        ids, attention, epochs = self._stack(samples)
        self._check_ids(ids)
        input_ids, chosen, draws = self._mask(ids, attention, epochs)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention.astype(np.int64)),
            "token_type_ids": torch.zeros(ids.shape, dtype=torch.int64),
            "labels": torch.from_numpy(np.where(chosen, ids, IGNORE_INDEX)),
            # Lists with one entry per row: Composer splits them with the microbatches.
            "total_tokens": attention.sum(axis=1).tolist(),
            "loss_generating_tokens": chosen.sum(axis=1).tolist(),
        }
        if self.give_draws:
            # Halved, to be signed as torch needs it. Thresholds are even: nothing is rounded.
            batch[DRAWS] = torch.from_numpy((draws >> np.uint64(1)).view(np.int64))
        return batch

    def _stack(
        self, samples: Sequence[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        rows = [self._row(sample) for sample in samples]
        lengths = {len(ids) for ids, _, _ in rows}
        width = max(lengths)
        if len(lengths) > 1:
            width = max(width, min(-(-width // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_seq_len))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (B, L)
        attention = np.zeros((len(rows), width), dtype=bool)  # (B, L)
        for i, (row_ids, row_attention, _) in enumerate(rows):
            ids[i, : len(row_ids)] = row_ids
            attention[i, : len(row_ids)] = row_attention
        return ids, attention, np.array([epoch for _, _, epoch in rows], dtype=np.int64)

    def _row(self, sample: Any) -> tuple[Any, Any, int]:
        if not isinstance(sample, Mapping):
            sample = {"input_ids": sample}
        ids = np.asarray(sample["input_ids"])
        attention = sample.get("attention_mask")
        if attention is None:
            attention = ids != self.pad_id if self.pad_id_is_padding else np.ones(len(ids), bool)
        return ids, attention, sample.get("epoch", 0)

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"Token id {low if low < 0 else high} is outside the tokenizer's vocabulary of "
                f"{self.vocab_size} tokens: use the tokenizer that the data was written with."
            )

    def _row_keys(
        self, ids: NDArray[np.int64], attention: NDArray[np.bool_], epochs: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """Compute one key per row, (B,), from seed, epoch and the tokens without padding."""
        positions = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
        content = _mix64(ids.view(np.uint64) + positions)  # (B, L)
        content *= attention
        if not self.remask_each_epoch:
            epochs = np.zeros_like(epochs)
        by_epoch = {epoch: _key64(self.seed, epoch) for epoch in set(epochs.tolist())}
        salt = np.array([by_epoch[epoch] for epoch in epochs.tolist()], dtype=np.uint64)
        return _mix64(content.sum(axis=1, dtype=np.uint64) ^ salt)

    def _mask(
        self, ids: NDArray[np.int64], attention: NDArray[np.bool_], epochs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint64]]:
        """Return a masked copy of `ids`, where it was masked, and the draws, each (B, L)."""
        keys = self._row_keys(ids, attention, epochs)
        counters = np.arange(1, ids.shape[1] + 1, dtype=np.uint64) * GOLDEN
        draws = _mix64(keys[:, None] + counters)  # (B, L), uniform over 64 bits
        chosen = (draws < self.choose_below) & attention & ~self.is_special[ids]

        words = _mix64(draws[chosen] ^ KIND_SALT)  # high half: the kind; low half: a random id
        kinds = words >> np.uint64(32)
        random_ids = (words & np.uint64(0xFFFFFFFF)) * np.uint64(self.vocab_size) >> np.uint64(32)
        originals = ids[chosen]
        replaced = np.where(kinds < KEEP_FROM, random_ids.astype(np.int64), originals)
        replaced[kinds < MASK_BELOW] = self.mask_id
        masked = ids.copy()
        masked[chosen] = replaced
        return masked, chosen, draws


def threshold(probability: float) -> int:
    """Return the number that a draw of 64 bits is below with this probability; it is even."""
    return int(probability * 2**64) & ~1


def _check_probability(probability: Any) -> None:
    is_number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not is_number or not 0.0 < probability < 1.0:
        raise ValueError(
            "dataset.mlm_probability must be a number strictly between 0 and 1, "
            f"got {probability!r}."
        )


def _check_dataset_cfg(dataset: Mapping[str, Any]) -> None:
    """Raise an error about keys that llm-foundry would ignore silently."""
    foundry = set(inspect.signature(StreamingTextDataset).parameters)
    foundry |= set(inspect.signature(StreamingDataset).parameters)
    check_keys(dataset, (foundry - SET_BY_BUILDER) | OWN_KEYS | FOUNDRY_COLLATOR_KEYS, "dataset")
    stream_keys = set(inspect.signature(Stream).parameters)
    for name, stream in (dataset.get("streams") or {}).items():
        check_keys(stream, stream_keys, f"dataset.streams.{name}")
    for key in ("mlm_probability", "max_seq_len"):
        if dataset.get(key) is None:
            raise ValueError(f"mlm_text needs the key {key!r} in dataset.")
    _check_probability(dataset["mlm_probability"])


def _check_shards(local: str, split: str, validate_hash: str | None) -> None:
    """Check an MDS folder against its index before any worker opens it.

    Raises:
        ValueError: If there is no such split, or a shard is missing, truncated or altered; names
            the folder or the file.
    """
    folder = os.path.join(local, split)
    hint = f". Splits in {local!r} are {', '.join(_splits(local)) or 'none'}"
    for shard in read_index(folder, hint):
        if shard.get("raw_data") is None:  # several files per shard: Streaming checks them
            continue
        info = shard_file(shard, folder)
        path = os.path.join(folder, info["basename"])
        check_size(path, info)
        # One rank per node, since a hash needs a pass over the data.
        if validate_hash and dist.get_local_rank() == 0:
            check_hashes(path, Path(path).read_bytes(), info, [validate_hash], get_hash)


def _splits(local: str) -> list[str]:
    return sorted(path.parent.name for path in Path(local).glob(f"*/{INDEX}"))


def _build_dataset(
    tokenizer: PreTrainedTokenizerBase, dataset: dict[str, Any], batch_size: int
) -> MLMTextDataset:
    ours = OWN_KEYS | FOUNDRY_COLLATOR_KEYS | {"streams"}
    return MLMTextDataset(
        tokenizer=tokenizer,
        streams=build_streams(streams=dataset.get("streams")),
        batch_size=batch_size,
        **{key: value for key, value in dataset.items() if key not in ours},
    )


def _build_collator(tokenizer: PreTrainedTokenizerBase, dataset: Mapping[str, Any]) -> Any:
    seed = dataset.get("mask_seed")
    if seed is None:
        seed = dataset.get("shuffle_seed", DEFAULT_SEED)
    remask = dataset.get("remask_each_epoch")
    collator = MLMCollator(
        tokenizer=tokenizer,
        mlm_probability=dataset["mlm_probability"],
        max_seq_len=dataset["max_seq_len"],
        seed=int(seed),
        remask_each_epoch=bool(dataset.get("shuffle", False)) if remask is None else bool(remask),
    )
    eos, bos = dataset.get("eos_token_id"), dataset.get("bos_token_id")
    if eos is None and bos is None:
        return collator
    return ConcatenatedSequenceCollatorWrapper(collator, eos_token_id=eos, bos_token_id=bos)


@one_line()
def build_mlm_text_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int | float,
    dataset: dict[str, Any],
    drop_last: bool,
    num_workers: int,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: int = 0,
) -> DataSpec:
    """Build the loader for masked language modelling over MDS streams of text or tokens.

    A YAML of llm-foundry's `text` loader works if its name is changed and `mlm_probability` is
    added. `dataset` takes the keys of that loader and

    * `mlm_probability` (required): 0.3 in M2-BERT's pretraining, 0.15 in evaluation;
    * `mask_seed` (default: `shuffle_seed`): the seed of the masks;
    * `remask_each_epoch` (default: `shuffle`): whether each epoch has new masks. Without `shuffle`
      the loader is for evaluation: it keeps its masks, so that losses can be compared.

    The data spec counts `total` tokens (all but padding) and `loss_generating` tokens (the masked
    positions). With `accumulate_train_batch_on_tokens: true`, llm-foundry's default, Composer
    weights each microbatch of each rank by its masked positions: loss and gradient are the mean
    over all masked tokens of the global batch. With false they are a mean of the microbatches'
    means.

    `num_workers` to `timeout` are the arguments of `torch.utils.data.DataLoader`.

    Args:
        tokenizer: A tokenizer with mask and padding tokens.
        device_batch_size: The samples per batch on this device.
        dataset: The keys above.
        drop_last: Whether to leave out a last batch that is not full.

    Returns:
        llm-foundry's data spec, with the batches of `MLMCollator`.

    Raises:
        ValueError: If a key is unknown or missing, the probability is out of range, the tokenizer
            has no mask token, a split does not exist, a local shard differs from its index, or
            the samples do not fill a batch and `drop_last` is true.
    """
    if tokenizer is None:
        raise ValueError("mlm_text needs a tokenizer.")
    # Calls change the truncation and padding settings of a tokenizer. The run's tokenizer goes into
    # its checkpoints, and a sharded checkpoint loads only if the tokenizer has the same keys.
    tokenizer = copy.deepcopy(tokenizer)
    dataset = dict(dataset)
    _check_dataset_cfg(dataset)
    for folder in local_streams(dataset)[0]:
        _check_shards(*folder)

    dataset["replication"], batch_size = construct_from_registry(
        name="dataset_replication_validator",
        registry=registry.dataset_replication_validators,
        partial_function=False,
        kwargs={
            "dataset_cfg": dataset,
            "tokenizer": tokenizer,
            "device_batch_size": device_batch_size,
        },
    )
    collator = _build_collator(tokenizer, dataset)  # first: it checks the tokenizer
    texts = _build_dataset(tokenizer, dataset, batch_size)
    loader = build_loader(
        texts,
        num_samples=len(texts),
        collate_fn=collator,
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout,
    )
    spec = construct_from_registry(
        name="data_spec",
        registry=registry.data_specs,
        partial_function=False,
        kwargs={"dl": loader, "dataset_cfg": dataset},
    )
    return split_quietly(spec)
