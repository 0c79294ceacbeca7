"""Predict the rows of a file: the command `m2-plugin predict` adds a model's answers to them."""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from m2_plugin.data.formats import ENDINGS, DataError
from m2_plugin.data.rows import arrow_schema, text_bytes
from m2_plugin.data.write import ENDINGS as OUT_ENDINGS
from m2_plugin.data.write import infer_schema, write_rows
from m2_plugin.inference import (
    Notes,
    add_run_arguments,
    bar,
    check_options,
    checked_rows,
    chunks,
    digest,
    forward,
    load_model,
    log_progress,
    model_folder,
    move,
    own_tokenizer,
    survey,
    writing,
)
from m2_plugin.tasks import TASKS, Task

__all__ = ["predict_file"]

log = logging.getLogger(__name__)


def predict_file(
    file: str | Path,
    model: str | Path,
    out: str | Path,
    text_column: str = "text",
    pair_column: str | None = None,
    batch_tokens: int = 16384,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the rows of a file with a model's answers. If a run was killed, a new one continues it.

    1024 rows at a time are sorted by length and batched by tokens. A model whose outputs depend on
    padding (a Monarch mixer with neither `mask_padding` nor `pad_inputs`) gets every text padded to
    its maximum, as in training.

    Args:
        file: A file of any format in `m2_plugin.data.formats`; in a text file each line is a text.
            It is read three times, in order, so that memory does not grow with its size.
        model: A transformers folder of any model type with a classifier of texts or words, or a
            model that answers questions; or a Composer checkpoint (.pt) of an M2-BERT. Texts longer
            than a classifier's maximum are cut, with a warning; the others read them in windows.
        out: The `.csv`, `.jsonl` or `.parquet` file to write: all columns of the input, and
            `prediction` (the name of the class, the tags, the answer) with the columns of the task
            (see `m2_plugin.tasks`): `probability_NAME` for each class, `entities`, `start` ...;
            for a regression only `score`. It appears when it is complete; until then hidden files
            beside it hold the finished answers.
        text_column: The column with the texts, and the name for the lines of a text file.
        pair_column: The column with the second texts of pairs.
        batch_tokens: The most tokens in a batch, padding included.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.
        overwrite: Whether to replace `out` if it exists.

    Returns:
        The number of rows for each predicted class; for other tasks `{"": rows}`.

    Raises:
        ValueError: If a row cannot be read, the file has no rows or has columns with the names of
            the answers, the model has no head or no tokenizer, torch has no such device, or
            `out` exists or cannot be written. The message names the file, line or option.
    """
    out = Path(out)
    check_options(out, OUT_ENDINGS, overwrite, batch_tokens)
    with model_folder(model) as folder:
        encoder, kind = load_model(folder)
        if kind not in TASKS:
            raise ValueError(f"{str(model)!r} is a model {kind}, for which there is no prediction")
        tokenizer = own_tokenizer(folder, encoder.config.vocab_size)
    task = TASKS[kind](encoder, tokenizer, text_column, pair_column)
    source = _Source(file, task)
    move(encoder, device)
    job = {
        "file": source.content,
        "model": digest(Path(model)),
        "text_column": text_column,
        "pair_column": pair_column,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    schema = source.schema() if out.suffix == ".parquet" else None
    counts: Counter[str] = Counter()
    with writing(out, job, overwrite) as notes:
        _answer(source, task, encoder, tokenizer, notes)
        write_rows(out, _joined(source, notes.partial, counts), source.out_columns, schema)
        notes.finish()
    return dict(counts)


class _Source:
    """The rows of the input file, which is read once to check them all.

    Raises:
        ValueError: If one is wrong, or a column has the name of an answer's.
    """

    def __init__(self, file: str | Path, task: Task):
        self.file, self.task = file, task
        self.columns: dict[str, None] = {}
        self.count, self.content = survey(self._checked(), file)
        self.out_columns = [*self.columns, *task.fields.names]
        if clash := [column for column in task.fields.names if column in self.columns]:
            raise ValueError(
                f"{str(file)!r} has a column {clash[0]!r}, as the predictions will have: rename it"
            )

    def rows(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield each row's values, and what the task needs of them."""
        return checked_rows(self.task.rows(str(self.file)), self.task.read)

    def _checked(self) -> Iterator[dict[str, Any]]:
        for number, (values, _) in enumerate(self.rows(), 1):
            self.columns |= dict.fromkeys(values)
            for column, value in values.items():
                if isinstance(value, str) and not value.isascii():
                    try:
                        text_bytes(value, column)
                    except ValueError as error:
                        raise ValueError(f"{str(self.file)!r}, row {number}: {error}") from error
            yield values

    def schema(self) -> Any:
        """Return the Arrow schema of the rows with answers; the input's, if it has one."""
        try:
            own = arrow_schema(str(self.file))
        except DataError:  # not damaged, since it was read; but a format of the task's own
            own = None
        if own is None:
            own = infer_schema((values for values, _ in self.rows()), list(self.columns))
        # Without the metadata: `datasets` would expect its columns to be all.
        return pyarrow.schema([*own, *self.task.fields])


def _answer(
    source: _Source,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    notes: Notes,
) -> None:
    """Write the answers to the partial file, a line of JSON for each row."""
    job, noted = notes.job, notes.read(lambda rows: _lines(notes.partial, rows))
    done, cut = noted["rows"], noted.get("cut", 0)
    inputs = (made for _, made in source.rows())
    with (
        notes.partial.open("r+b" if done else "wb") as file,
        bar(source.count, done, "row", "predict") as progress,
    ):
        file.seek(sum(map(len, _lines(notes.partial, done))))
        file.truncate()  # a killed run may have written more than it noted
        for start, chunk in chunks(inputs, done, source.count, source.file):
            encoded = task.encode(chunk)
            cut += encoded.cut
            outputs: list[Any] = [None] * len(encoded.features["input_ids"])
            ready = 0
            found = forward(
                model, tokenizer, encoded.features, job["batch_tokens"], job["dtype"], task.pad_to
            )
            for batch, output in found:
                kept = [output[name].float().cpu().numpy() for name in task.output]
                for position, i in enumerate(batch):
                    outputs[i] = tuple(values[position] for values in kept)
                ready += len(batch)
                progress.update(start + len(chunk) * ready // len(outputs) - progress.n)
            progress.update(start + len(chunk) - progress.n)
            answers = task.answer(chunk, encoded, outputs)
            lines = "".join(f"{json.dumps(answer, ensure_ascii=False)}\n" for answer in answers)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
            notes.write(lines.encode(), rows=start + len(chunk), cut=cut)
    if cut:
        log.warning("%d texts of %d were cut to the model's maximum", cut, source.count)


def _lines(file: Path, count: int) -> Iterator[bytes]:
    """Yield the first lines of a file."""
    with file.open("rb") as lines:
        yield from islice(lines, count)


def _joined(source: _Source, partial: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield each row with its answer, and count the predictions."""
    with partial.open("rb") as lines:
        for (values, _), line in zip(source.rows(), lines, strict=True):
            answer = json.loads(line)
            counts[answer["prediction"] if source.task.has_classes else ""] += 1
            yield values | answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin predict`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: As `predict_file`.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin predict",
        description="Write the rows of a file with a fine-tuned model's predictions. If a run was "
        "stopped, run the same command again to continue.",
    )
    parser.add_argument(
        "file",
        help=f"a file of texts: {ENDINGS}; for words also CoNLL, for questions SQuAD's JSON",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a transformers folder for text classification, token classification or question "
        "answering, or a Composer checkpoint (.pt)",
    )
    parser.add_argument(
        "--out",
        required=True,
        help=f"the file to write ({', '.join(OUT_ENDINGS)}): all columns of the input, prediction "
        "and probability_NAME for each class; score for a regression; tags and entities for words; "
        "or an answer, its place and scores",
    )
    parser.add_argument("--pair-column", help="the column with the second texts of pairs")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    log_progress()
    counts = predict_file(**vars(args))
    classes = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if name)
    rows = f"{sum(counts.values())} rows{': ' if classes else ''}{classes}"
    sys.stdout.write(f"{rows}\n{args.out}\n")
    return 0
