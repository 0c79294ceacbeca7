"""Embed the texts of a file: the command `m2-plugin embed` writes a vector for each."""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.data.formats import ENDINGS
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.data.tokenizer import load_tokenizer
from m2_plugin.files import check_writable, read_json, write_json
from m2_plugin.models import M2BertForTextEmbedding

__all__ = ["embed_file", "main"]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK = 1024  # progress is saved after this many texts; batches do not cross chunks


def embed_file(
    file: str | Path,
    model: str | Path,
    out: str | Path,
    text_column: str = "text",
    batch_tokens: int = 16384,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write the embeddings of all texts of a file. If a run was killed, a new one continues it.

    1024 texts at a time are sorted by length and batched by tokens. If padding would change vectors
    (a Monarch mixer with neither `mask_padding` nor `pad_inputs`), all texts of a batch have the
    same length.

    Args:
        file: A file of any format in `m2_plugin.data.formats`; in a text file each line is a text.
            It is read twice, in order, so that memory does not grow with its size.
        model: A transformers folder with an `M2BertForTextEmbedding` and a tokenizer. Texts longer
            than its maximum are cut.
        out: The `.npy` file to write, float32 (N, D), row i for text i. It appears when it is
            complete; until then a hidden file beside it holds the finished rows.
        text_column: The column with the texts; ignored for a text file.
        batch_tokens: The most tokens in a batch, padding included.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.
        overwrite: Whether to replace `out` if it exists.

    Returns:
        N, the number of texts, and D, the width of the vectors.

    Raises:
        ValueError: If the file cannot be read or has no texts, the model has no pooler or no
            tokenizer, torch has no such device, or `out` exists or cannot be written. The message
            names the file or option.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"--out must end in .npy, not {str(out)!r}")
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} exists already: give another name, or --overwrite")
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens must be at least 1, not {batch_tokens}")
    count, digest = _survey(file, text_column)
    encoder, tokenizer = _load(model)
    place = _move(encoder, device)
    size = count, encoder.config.hidden_size
    job = {
        "file": digest,
        "model": _digest(Path(model)),
        "text_column": text_column,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    check_writable(out)
    partial, notes = (out.with_name(f".{out.name}.{part}") for part in ("partial", "json"))
    vectors, done = _open(partial, notes, job, size)
    autocast = torch.autocast(place.type, DTYPES[dtype], dtype != "float32")
    texts = islice(_read_texts(file, text_column), done, None)
    with tqdm(total=count, initial=done, unit="text", desc="embed") as bar:
        for start in range(done, count, CHUNK):
            rows = list(islice(texts, min(CHUNK, count - start)))
            if len(rows) < min(CHUNK, count - start):
                raise ValueError(f"{str(file)!r} was changed while it was read: start again")
            tokens = tokenizer(
                rows, truncation=True, max_length=encoder.config.max_sequence_length
            )["input_ids"]
            full = encoder.config.padded_length
            lengths = [full or len(ids) for ids in tokens]
            for batch in batches(lengths, batch_tokens, _padding_counts(encoder)):
                inputs = tokenizer.pad(
                    {"input_ids": [tokens[i] for i in batch]}, return_tensors="pt"
                )
                with torch.inference_mode(), autocast:
                    found: Tensor = encoder(**inputs.to(place)).sentence_embedding
                vectors[[start + i for i in batch]] = found.float().cpu().numpy()
                bar.update(len(batch))
            vectors.flush()
            write_json(notes, {"job": job, "rows": start + len(rows)})
    del vectors
    os.replace(partial, out)
    notes.unlink()
    return size


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


def _padding_counts(model: M2BertForTextEmbedding) -> bool:
    """Tell whether the padding of a batch changes outputs."""
    config = model.config
    padding_is_seen = config.sequence_mixer == "monarch_mixer" and not config.mask_padding
    return padding_is_seen and config.padded_length is None


def _read_texts(file: str | Path, column: str) -> Iterator[str]:
    """Yield the texts of a file.

    Raises:
        ValueError: If the file or a row cannot be read; the message names the line.
    """
    for row in read_rows(str(file), text_column=column, columns=[column]):
        try:
            if row.problem:
                raise ValueError(row.problem)
            text = text_of(row.values, column, "--text-column")
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        yield text


def _survey(file: str | Path, column: str) -> tuple[int, str]:
    """Count and hash the texts of a file, so that errors in it appear before the work starts."""
    count, state = 0, hashlib.sha256()
    for text in _read_texts(file, column):
        data = text.encode()
        state.update(b"%d\n" % len(data))
        state.update(data)
        count += 1
    if not count:
        raise ValueError(f"{str(file)!r} has no texts")
    return count, state.hexdigest()


def _load(folder: str | Path) -> tuple[M2BertForTextEmbedding, PreTrainedTokenizerBase]:
    config, weights = load_folder(folder)
    if config.embedding_pooler and "pooler.dense.weight" not in weights:
        advice = "fine-tune it for retrieval first (yamls/finetune/retrieval)"
        if (Path(folder) / "modules.json").is_file():
            advice = (
                "its modules.json has modules other than Pooling (cls or mean), Dense with tanh "
                "and Normalize, so encode with sentence-transformers"
            )
        raise ValueError(
            f"{str(folder)!r} lacks pooler.dense.weight, which an embedding model needs: {advice}"
        )
    model = build_model(M2BertForTextEmbedding, config, weights)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer in {str(folder)!r} has no padding token")
    return model, tokenizer


def _move(model: M2BertForTextEmbedding, device: str) -> torch.device:
    """Move the model to a device by name, or `auto`, and return the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: torch has no device {device!r} here: {reason}") from error
    return model.device


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {str(p.relative_to(path)): _digest(p) for p in files}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _open(
    partial: Path, notes: Path, job: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[np.memmap, int]:
    """Return the array to fill, and the number of its rows that are done."""
    noted = read_json(notes)
    if noted and partial.is_file():
        changed = ", ".join(key for key in job if job[key] != noted["job"].get(key))
        if changed:
            log.warning("%s was made with another %s: starting again", partial, changed)
        elif not _is_array(partial, shape):
            log.warning("%s is damaged: starting again", partial)
        else:
            log.info("%s: continuing after %d texts", partial, noted["rows"])
            return np.lib.format.open_memmap(partial, mode="r+"), noted["rows"]
    notes.unlink(missing_ok=True)
    return np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape), 0


def _is_array(file: Path, shape: tuple[int, int]) -> bool:
    """Tell whether a file holds a complete fp32 array of this shape.

    Opened for writing, a truncated file would be filled up with zeros.
    """
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except ValueError:
        return False
    whole = array.offset + array.nbytes == file.stat().st_size
    return whole and array.shape == shape and array.dtype == np.float32


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin embed`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0 on success, 1 after an error, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin embed",
        description="Write a vector for each text of a file. If a run was stopped, run the same "
        "command again to continue.",
    )
    parser.add_argument("file", help=f"a file of texts: {ENDINGS}")
    parser.add_argument(
        "--model", required=True, help="a transformers folder with an embedding model"
    )
    parser.add_argument("--out", required=True, help="the .npy file to write, float32 (N, D)")
    parser.add_argument(
        "--text-column", default="text", help="the column with the texts (default: text)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="the most tokens in a batch, padding included (default: 16384)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, a GPU if any)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of autocast (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows, width = embed_file(**vars(args))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to continue\n")
        return 130
    sys.stdout.write(f"{rows} vectors of {width} numbers\n{args.out}\n")
    return 0
