"""Run a model over the rows of a file by length, so that a killed run can go on.

`embed`, `predict` and `evaluate` share it.
"""

import argparse
import errno
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
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
from m2_plugin.files import is_disk_full, locked, read_json, write_json
from m2_plugin.models import M2BertConfig

__all__ = [
    "CHUNK",
    "DTYPES",
    "Notes",
    "add_model_arguments",
    "add_run_arguments",
    "bar",
    "batches",
    "check_options",
    "checked_rows",
    "chunks",
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
    "writing",
]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK = 1024  # progress is saved after this many rows; batches do not cross chunks
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


def chunks(
    rows: Iterable[T], done: int, count: int, file: str | Path
) -> Iterator[tuple[int, list[T]]]:
    """Yield the rows after the first `done`, up to 1024 at a time, and the number of the first.

    Raises:
        ValueError: If there are fewer than `count` rows.
    """
    rows = islice(rows, done, None)
    for start in range(done, count, CHUNK):
        size = min(CHUNK, count - start)
        chunk = list(islice(rows, size))
        if len(chunk) < size:
            raise ValueError(f"{str(file)!r} was changed while it was read: start again")
        yield start, chunk


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


# Progress


def check_options(out: Path, endings: Sequence[str], overwrite: bool, batch_tokens: int) -> None:
    """Check the file to write and the size of a batch.

    Raises:
        ValueError: If one of them is wrong; the message names the option.
    """
    if out.suffix not in endings:
        raise ValueError(f"--out must end in {' or '.join(endings)}, not {str(out)!r}")
    _check_absent(out, overwrite)
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens must be at least 1, not {batch_tokens}")


def _check_absent(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} exists already: give another name, or --overwrite")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {str(p.relative_to(path)): digest(p) for p in files}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


class Notes:
    """What a run has done, in a hidden file beside the file that it writes.

    A digest ties them to the content of the partial file, so that damage of either is seen.

    Args:
        out: The file that it writes at the end.
        job: What the results depend on. A run continues another one only if they agree.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]):
        self.job = dict(job)
        self.partial, self._file = (out.with_name(f".{out.name}.{p}") for p in ("partial", "json"))
        self._state = hashlib.sha256()  # of what is done in the partial file

    def read(self, content: Callable[[int], Iterable[Any]]) -> dict[str, Any]:
        """Return what was noted last, or `{"rows": 0}`, if the run must start anew.

        Args:
            content: Yields the bytes of so many rows of the partial file, which exists.
        """
        noted = self._noted()
        if noted and self.partial.is_file():
            changed = ", ".join(k for k in self.job if self.job[k] != noted["job"].get(k))
            if changed:
                log.warning("%s was made with another %s: starting again", self.partial, changed)
            elif not self._is_whole(noted, content):
                log.warning("%s is damaged: starting again", self.partial)
            else:
                log.info("%s: continuing after %d rows", self.partial, noted["rows"])
                return noted
        self._file.unlink(missing_ok=True)
        self._state = hashlib.sha256()
        return {"rows": 0}

    def _noted(self) -> dict[str, Any]:
        """Read the file; return nothing, after a warning, if it is damaged."""
        try:
            noted: dict[str, Any] = read_json(self._file, missing_ok=True) or {}
            job, rows = noted.get("job"), noted.get("rows")
            known = isinstance(job, dict) and type(rows) is int and 0 < rows <= sys.maxsize
            if noted and not known:
                raise ValueError(f"{str(self._file)!r} does not say which rows are done")
        except ValueError as error:
            log.warning("%s: starting again", error)
            return {}
        return noted

    def _is_whole(self, noted: Mapping[str, Any], content: Callable[[int], Iterable[Any]]) -> bool:
        for part in content(noted["rows"]):
            self._state.update(part)
        done = {key: value for key, value in noted.items() if key not in ("job", "digest")}
        return bool(noted.get("digest") == self._digest(done))

    def _digest(self, done: Mapping[str, Any]) -> str:
        state = self._state.copy()
        state.update(json.dumps(done, sort_keys=True).encode())
        return state.hexdigest()

    def write(self, content: Any, **done: Any) -> None:
        """Note what is done, `rows` at least.

        Args:
            content: The bytes of the rows since the last note; the disk must have them.
            **done: JSON values.
        """
        self._state.update(content)
        write_json(self._file, {"job": self.job, **done, "digest": self._digest(done)})

    def finish(self) -> None:
        """Remove the notes and, if it is still there, the partial file."""
        self.partial.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)


@contextmanager
def writing(out: Path, job: Mapping[str, Any], overwrite: bool) -> Iterator[Notes]:
    """Keep other processes from writing a file, and yield the notes for it.

    Args:
        out: The file that a run writes at the end. Its folder is created.
        job: As in `Notes`.
        overwrite: Whether the file may exist.

    Raises:
        ValueError: If it cannot be written, exists, or another process writes it.
        OSError: If the disk is full.
    """
    with locked(out):
        _check_absent(out, overwrite)  # another process may have finished it meanwhile
        try:
            yield Notes(out, job)
        except OSError as error:
            if is_disk_full(error):  # not a hidden file's name
                reason = error.strerror or "no space left on the disk"
                raise OSError(errno.ENOSPC, reason, str(out)) from error
            raise


def bar(count: int, done: int, unit: str, title: str) -> Any:
    """Return a progress bar."""
    return tqdm(total=count, initial=done, unit=unit, desc=title)


# Commands


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of where and how a model runs."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, a GPU if any)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of autocast (default: float32)"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run over a file that writes another file."""
    parser.add_argument(
        "--text-column", default="text", help="the column with the texts (default: text)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="the most tokens in a batch, padding included (default: 16384)",
    )
    add_model_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def log_progress() -> None:
    """Let the log of this package appear on stderr, but not that of others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("m2_plugin").setLevel(logging.INFO)
