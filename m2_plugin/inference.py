"""Read rows, load a model, and run it over texts in batches by length.

`embed`, `predict` and `evaluate` share it.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import LARGE_INTEGER

from m2_plugin import models
from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.checkpoints.read import is_checkpoint_file
from m2_plugin.data.rows import Row
from m2_plugin.data.tokenizer import load_tokenizer, vocabulary_size
from m2_plugin.files import read_json
from m2_plugin.models import M2BertConfig

__all__ = [
    "DTYPES",
    "LONGEST",
    "Settings",
    "add_batch_arguments",
    "add_model_arguments",
    "add_run_arguments",
    "batches",
    "check_options",
    "checked_rows",
    "default_batch",
    "digest",
    "forward",
    "load_model",
    "log_progress",
    "max_length",
    "model_folder",
    "move",
    "own_tokenizer",
    "padding_counts",
    "survey",
]

LONGEST = 512  # tokens of a window, if neither model nor tokenizer says how many it takes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}

T = TypeVar("T")


# Rows


def checked_rows(
    rows: Iterable[Row], read: Callable[[Any], T]
) -> Iterator[tuple[dict[str, Any], T]]:
    """Yield the values of each row, and what `read` makes of them.

    Args:
        rows: The rows of a file.
        read: Raises a ValueError if the values are not what they should be.

    Raises:
        ValueError: If the file or a row cannot be read; the message names the line.
    """
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            made = read(row.values)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        yield row.values, made


def survey(rows: Iterable[Any], file: str | Path) -> tuple[int, str]:
    """Count and hash the rows of a file, so that errors in it appear before the work starts.

    Raises:
        ValueError: If there are none.
    """
    count, state = 0, hashlib.sha256()
    for row in rows:
        data = repr(row).encode()
        state.update(b"%d\n" % len(data))
        state.update(data)
        count += 1
    if not count:
        raise ValueError(f"{str(file)!r} has no rows")
    return count, state.hexdigest()


# The model


@contextmanager
def model_folder(path: str | Path) -> Iterator[Path]:
    """Yield a transformers folder: the path itself, or one made of a Composer checkpoint (.pt).

    Raises:
        ValueError: If the file holds no M2-BERT, or no tokenizer.
    """
    if not is_checkpoint_file(str(path)):
        yield Path(path)
        return
    with TemporaryDirectory() as made:
        folder = Path(made) / "model"
        if import_checkpoint(path, folder).tokenizer is None:
            raise ValueError(
                f"{str(path)!r} has no tokenizer: make a folder of it with m2-plugin import "
                "--tokenizer TOKENIZER"
            )
        yield folder


def load_model(folder: Path) -> tuple[Any, str]:
    """Load the model of a transformers folder, of any kind in `HEADS`; no code in it is run.

    Returns:
        The model, in fp32 and in evaluation mode; and its kind.

    Raises:
        ValueError: If the folder holds no such model, or lacks a tensor of it (transformers would
            give it random values).
    """
    saved = read_json(folder / "config.json")
    config, weights = None, dict[str, Any]()
    if saved.get("model_type") == M2BertConfig.model_type:
        config, weights = load_folder(folder)
    architecture = ((config.architectures if config else saved.get("architectures")) or [""])[0]
    kind = next((kind for kind in HEADS if architecture.endswith(kind)), None)
    if kind is None:
        raise ValueError(
            f"{str(folder)!r} holds no model with a head: architectures in its config.json is "
            f"{architecture!r}, which should end in {', '.join(HEADS)}"
        )
    if config is not None:
        return build_model(getattr(models, architecture), config, weights), kind
    try:
        model, info = HEADS[kind].from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises errors of many types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{str(folder)!r} holds no model that can be loaded: {reason}") from error
    if info["missing_keys"]:
        raise ValueError(f"{str(folder)!r} lacks {sorted(info['missing_keys'])[0]}")
    return model.eval(), kind


def own_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder.

    Raises:
        ValueError: If there is none, it has no padding token, or it has ids beyond the model's.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer in {str(folder)!r} has no padding token")
    if (needed := vocabulary_size(tokenizer)) > vocab_size:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has ids up to {needed - 1}, but the model's "
            f"vocab_size is only {vocab_size}"
        )
    # transformers would advise to pad by calling the tokenizer, which cannot pad by length.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return tokenizer


def move(model: Any, device: str) -> torch.device:
    """Move the model to a device by name, or `auto`, and return the device.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: torch has no device {device!r} here: {reason}") from error
    return model.device


def max_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the largest number of tokens that model and tokenizer take; None if it is unknown."""
    own = getattr(config, "max_position_embeddings", None)
    if isinstance(config, M2BertConfig):
        own = config.max_sequence_length
    limits = [own or LARGE_INTEGER, tokenizer.model_max_length]
    return min(limits) if min(limits) < LARGE_INTEGER else None


def padding_counts(config: Any) -> bool:
    """Tell whether the padding of a batch changes outputs."""
    return (
        isinstance(config, M2BertConfig)
        and config.sequence_mixer == "monarch_mixer"
        and not config.mask_padding
        and config.padded_length is None
    )


def batches(lengths: Sequence[int], tokens: int, equal: bool) -> Iterator[list[int]]:
    """Group texts by length.

    Args:
        lengths: The number of tokens of each text.
        tokens: The most tokens in a batch, padding included. A longer text is a batch by itself.
        equal: Whether all texts of a batch must have the same length.

    Yields:
        The indices in `lengths` of the texts of a batch; batches of short texts come first.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batch) + 1) * lengths[i] > tokens
        if batch and (full or (equal and lengths[i] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def forward(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    features: Mapping[str, list[Any]],
    batch_tokens: int,
    dtype: str,
    pad_to: int | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """Run the model over tokenised texts in batches by length.

    If padding would change outputs, all texts of a batch have the same length.

    Args:
        model: A transformers model in evaluation mode.
        tokenizer: Its tokenizer.
        features: Input of the model → one list for each text; `input_ids` at least.
        batch_tokens: The most tokens in a batch, padding included.
        dtype: A name in `DTYPES`; other than `float32` it is autocast's.
        pad_to: The length to pad all texts to; None pads to the longest of a batch.

    Yields:
        The indices of the texts of a batch, and the model's output for them.
    """
    full = pad_to or getattr(model.config, "padded_length", None)
    lengths = [full or len(ids) for ids in features["input_ids"]]
    autocast = torch.autocast(model.device.type, DTYPES[dtype], dtype != "float32")
    for batch in batches(lengths, batch_tokens, padding_counts(model.config)):
        inputs = tokenizer.pad(
            {name: [values[i] for i in batch] for name, values in features.items()},
            padding="max_length" if pad_to else True,
            max_length=pad_to,
            return_tensors="pt",
        )
        with torch.inference_mode(), autocast:
            yield batch, model(**inputs.to(model.device))


# Settings


@dataclass(frozen=True)
class Settings:
    """How a model runs over the rows of a file.

    Args:
        text_column: The column with the texts, and the name for the lines of a text file.
        pair_column: The column with the second texts of pairs.
        batch_tokens: The most tokens in a batch, padding included.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: A name in `DTYPES`; other than `float32` it is autocast's.
    """

    text_column: str = "text"
    pair_column: str | None = None
    batch_tokens: int = 16384
    device: str = "auto"
    dtype: str = "float32"


def default_batch(device: str) -> int:
    """Return the tokens of a batch: 16,384; on a CPU 4,096, since longer batches have more padding.

    On a cluster the calling process decides for all.
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return 4096 if on_cpu else 16384


def check_options(
    out: Path, endings: Sequence[str], batch_tokens: int | None, num_workers: int | None = None
) -> None:
    """Check the ending of the file to write, the size of a batch and the number of workers.

    Raises:
        ValueError: If one of them is wrong; the message names the option.
    """
    if out.suffix not in endings:
        raise ValueError(f"--out must end in {' or '.join(endings)}, not {str(out)!r}")
    for option, value in (("batch-tokens", batch_tokens), ("num-workers", num_workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, not {value}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder; a process reads each once.

    A file that was changed is read again: its stamp says so.
    """
    if path.is_file():
        at = path.stat()
        stamp = at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns
        return _file_digest(path, stamp)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {str(p.relative_to(path)): digest(p) for p in files}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, stamp: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Commands


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of where and how a model runs."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, a GPU if any)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of autocast (default: float32)"
    )


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model that runs over many texts, in many processes."""
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="the most tokens in a batch, padding included (default: 16384, on a CPU 4096)",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes; default: one per GPU, or per core. The output does not depend on it",
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS|FILE",
        help="the workers of a Dask cluster instead: the address of its scheduler, or its "
        "scheduler file. They must see the model and the folder of --out under the same paths",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run over a file that writes another file."""
    parser.add_argument(
        "--text-column", default="text", help="the column with the texts (default: text)"
    )
    add_batch_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def log_progress() -> None:
    """Let the log of this package appear on stderr, but not that of others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("m2_plugin").setLevel(logging.INFO)
