"""`m2-plugin embed`: a vector for each text of a file."""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value, load_dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.files import check_writable, read_json, write_json
from m2_plugin.models import M2BertForTextEmbedding

__all__ = ["embed_file", "main"]

log = logging.getLogger(__name__)

# Ending of a file, less a .gz: who reads it in `datasets`, and how.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # else the text "None" would be no text
    ".parquet": ("parquet", {}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK = 1024  # texts between two notes of what is done; batches do not cross them


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
    """Writes the embeddings of all texts of a file; goes on where a killed run stopped.

    Texts are sorted by length and batched by tokens, some thousand at a time. A model without
    `mask_padding` gets texts of equal length together only, since padding would change its vectors.

    Args:
        file: `.txt` (a text per line), `.json`, `.jsonl`, `.csv` or `.parquet`, or one with `.gz`.
        model: a transformers folder with an `M2BertForTextEmbedding` and a tokenizer. Longer texts
            than it takes are cut.
        out: the `.npy` file to write, float32 (N, D), row i for text i. It appears when it is
            whole; until then a hidden file beside it holds what is done.
        text_column: the column with the texts; a `.txt` has this one only.
        batch_tokens: tokens of a batch, padding included.
        device: `auto` (CUDA where there is any), or as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.
        overwrite: replace `out` if it is there.

    Returns:
        N and D.

    Raises:
        ValueError: if something cannot be read or has no texts, the model has no pooler or no
            tokenizer, the device is none, or `out` is there or cannot be written; the message names
            it.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"--out must end in .npy, not {str(out)!r}")
    if out.exists() and not overwrite:
        raise ValueError(f"{str(out)!r} is there already: give another name, or --overwrite")
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens must be at least 1, not {batch_tokens}")
    texts = _read_texts(file, text_column)
    encoder, tokenizer = _load(model)
    place = _move(encoder, device)
    size = len(texts), encoder.config.hidden_size
    job = {
        "file": _digest(Path(file)),
        "model": _digest(Path(model)),
        "text_column": text_column,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    check_writable(out)
    partial, notes = (out.with_name(f".{out.name}.{part}") for part in ("partial", "json"))
    vectors, done = _open(partial, notes, job, size)
    autocast = torch.autocast(place.type, DTYPES[dtype], dtype != "float32")
    with tqdm(total=size[0], initial=done, unit="text", desc="embed") as bar:
        for start in range(done, size[0], CHUNK):
            rows = texts[start : start + CHUNK][text_column]
            tokens = tokenizer(
                rows, truncation=True, max_length=encoder.config.max_sequence_length
            )["input_ids"]
            for batch in batches(
                [len(ids) for ids in tokens], batch_tokens, _padding_counts(encoder)
            ):
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
    """Groups texts by length.

    Args:
        lengths: of each text.
        tokens: of a batch at most, padding included; a longer text is alone.
        equal: whether all texts of a batch must be of one length.

    Yields:
        Places in `lengths`, those of short texts first.
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
    """Whether padding changes what the encoder computes: convolutions take it for text."""
    return model.config.sequence_mixer == "monarch_mixer" and not model.config.mask_padding


def _read_texts(file: str | Path, column: str) -> Dataset:
    path = Path(file)
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        raise ValueError(f"there is no file {str(file)!r}")
    if ending not in READERS:
        raise ValueError(f"{str(file)!r} ends in none of {', '.join(READERS)}")
    reader, options = READERS[ending]
    try:
        texts = load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"{str(file)!r} cannot be read as {reader}: {reason}") from error
    if reader == "text":
        texts = texts.rename_column("text", column) if column != "text" else texts
    if column not in texts.column_names:
        raise ValueError(
            f"{str(file)!r} has no column {column!r}: give --text-column, one of "
            f"{', '.join(texts.column_names)}"
        )
    if len(texts) == 0:
        raise ValueError(f"{str(file)!r} has no texts")
    found = texts.features[column]
    if found not in (Value("string"), Value("large_string")):
        raise ValueError(f"column {column!r} of {str(file)!r} holds no texts, but {found}")
    empty = texts.data.column(column).is_null().to_pylist()
    if any(empty):
        raise ValueError(f"row {empty.index(True)} of {str(file)!r} has no {column!r}")
    return texts


def _load(folder: str | Path) -> tuple[M2BertForTextEmbedding, PreTrainedTokenizerBase]:
    config, weights = load_folder(folder)
    if "pooler.dense.weight" not in weights:
        advice = "fine-tune it for retrieval first (yamls/finetune/retrieval)"
        if (Path(folder) / "modules.json").is_file():
            advice = (
                "its modules.json names others than sentence-transformers' Pooling (cls or mean), "
                "Dense with tanh and Normalize, so encode with sentence-transformers"
            )
        raise ValueError(
            f"{str(folder)!r} lacks pooler.dense.weight, which embeddings need: {advice}"
        )
    model = build_model(M2BertForTextEmbedding, config, weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} has no tokenizer: save one there") from error
    return model, tokenizer


def _move(model: M2BertForTextEmbedding, device: str) -> torch.device:
    """Moves the model to where it is to compute, and says where that is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r} is none that torch has here: {reason}") from error
    return model.device


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {str(p.relative_to(path)): _digest(p) for p in files}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _open(
    partial: Path, notes: Path, job: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[np.memmap, int]:
    """The array to fill, and how many rows of it are done."""
    noted = read_json(notes)
    if noted and partial.is_file():
        changed = ", ".join(key for key in job if job[key] != noted["job"].get(key))
        if changed:
            log.warning("%s was begun with another %s: starting anew", partial, changed)
        elif not _holds(partial, shape):
            log.warning("%s is damaged: starting anew", partial)
        else:
            log.info("%s: going on after %d texts", partial, noted["rows"])
            return np.lib.format.open_memmap(partial, mode="r+"), noted["rows"]
    notes.unlink(missing_ok=True)
    return np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape), 0


def _holds(file: Path, shape: tuple[int, int]) -> bool:
    """Whether a file is an array of this shape; written to, a shorter one would get zeros."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except ValueError:
        return False
    whole = array.offset + array.nbytes == file.stat().st_size
    return whole and array.shape == shape and array.dtype == np.float32


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `m2-plugin embed`.

    Args:
        argv: arguments, without the program's name.

    Returns:
        0; 1 if something was refused; 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin embed",
        description="Write a vector for each text of a file. A killed run goes on when repeated.",
    )
    parser.add_argument("file", help=f"a file of texts: {', '.join(READERS)}, also with .gz")
    parser.add_argument(
        "--model", required=True, help="a transformers folder of an embedding model"
    )
    parser.add_argument("--out", required=True, help="the .npy file to write, float32 (N, D)")
    parser.add_argument("--text-column", default="text", help="the column to embed (text)")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="tokens of a batch with padding (16384)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of autocast (float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows, width = embed_file(**vars(args))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run it again to go on\n")
        return 130
    sys.stdout.write(f"{rows} vectors of {width} numbers\n{args.out}\n")
    return 0
