"""Embed the texts of a file: the command `m2-plugin embed` writes a vector for each."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.data.formats import ENDINGS
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.files import publish
from m2_plugin.inference import (
    Notes,
    add_run_arguments,
    bar,
    check_options,
    checked_rows,
    chunks,
    digest,
    forward,
    log_progress,
    move,
    own_tokenizer,
    survey,
    writing,
)
from m2_plugin.models import M2BertForTextEmbedding

__all__ = ["embed_file", "main"]


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
    check_options(out, [".npy"], overwrite, batch_tokens)
    count, content = survey(_read_texts(file, text_column), file)
    encoder, tokenizer = _load(model)
    move(encoder, device)
    size = count, encoder.config.hidden_size
    job = {
        "file": content,
        "model": digest(Path(model)),
        "text_column": text_column,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    with writing(out, job, overwrite) as notes:
        _write(file, notes, size, encoder, tokenizer)
        publish(notes.partial, out)
        notes.finish()
    return size


def _write(
    file: str | Path,
    notes: Notes,
    size: tuple[int, int],
    encoder: M2BertForTextEmbedding,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the rows of the array that are not done."""
    count, job = size[0], notes.job
    vectors, done = _open(notes, size)
    texts = _read_texts(file, job["text_column"])
    with bar(count, done, "text", "embed") as progress:
        for start, chunk in chunks(texts, done, count, file):
            tokens = tokenizer(
                chunk, truncation=True, max_length=encoder.config.max_sequence_length
            )
            features = {"input_ids": tokens["input_ids"]}
            found = forward(encoder, tokenizer, features, job["batch_tokens"], job["dtype"])
            for batch, output in found:
                rows = [start + i for i in batch]
                vectors[rows] = output.sentence_embedding.float().cpu().numpy()
                progress.update(len(batch))
            vectors.flush()
            notes.write(vectors[start : start + len(chunk)], rows=start + len(chunk))


def _read_texts(file: str | Path, column: str) -> Iterator[str]:
    """Yield the texts of a file."""

    def read(values: Mapping[str, Any]) -> str:
        return text_of(values, column, "--text-column")

    rows = read_rows(str(file), text_column=column, columns=[column])
    return (text for _, text in checked_rows(rows, read))


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
    return model, own_tokenizer(Path(folder), config.vocab_size)


def _open(notes: Notes, shape: tuple[int, int]) -> tuple[np.memmap, int]:
    """Return the array to fill, and the number of its rows that are done."""

    def noted(rows: int) -> Iterator[Any]:
        if _is_array(notes.partial, shape):
            yield np.lib.format.open_memmap(notes.partial, mode="r")[:rows]

    if done := notes.read(noted)["rows"]:
        return np.lib.format.open_memmap(notes.partial, mode="r+"), done
    vectors = np.lib.format.open_memmap(notes.partial, mode="w+", dtype=np.float32, shape=shape)
    try:
        with notes.partial.open("r+b") as file:  # a full disk would end the process at a write
            os.posix_fallocate(file.fileno(), 0, vectors.offset + vectors.nbytes)
    except OSError as error:
        notes.partial.unlink()
        needed = f"{error.strerror}: {vectors.nbytes / 2**20:,.1f} MiB are needed"
        raise OSError(error.errno, needed, str(notes.partial)) from error
    return vectors, 0


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
        0.

    Raises:
        ValueError: As `embed_file`.
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
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    log_progress()
    rows, width = embed_file(**vars(args))
    sys.stdout.write(f"{rows} vectors of {width} numbers\n{args.out}\n")
    return 0
