"""Predict the rows of a file: the command `m2-plugin predict` adds a model's answers to them."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from m2_plugin.chunks import Rows, Work, check_absent, run_chunks, writing
from m2_plugin.data.formats import ENDINGS, DataError
from m2_plugin.data.rows import arrow_schema, text_bytes
from m2_plugin.data.write import ENDINGS as OUT_ENDINGS
from m2_plugin.data.write import infer_schema, write_rows
from m2_plugin.inference import (
    Settings,
    add_run_arguments,
    check_options,
    default_batch,
    load_model,
    log_progress,
    model_folder,
    own_tokenizer,
    survey,
)
from m2_plugin.tasks import TASKS, Task

__all__ = ["predict_file"]


def predict_file(
    file: str | Path,
    model: str | Path,
    out: str | Path,
    text_column: str = "text",
    pair_column: str | None = None,
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    num_workers: int | None = None,
    cluster: str | None = None,
) -> dict[str, int]:
    """Write the rows of a file with a model's answers. If a run was killed, a new one continues it.

    Up to 1024 rows at a time are sorted by length and batched by tokens. A model whose outputs
    depend on padding (a Monarch mixer with neither `mask_padding` nor `pad_inputs`) gets every text
    padded to its maximum, as in training. The answers do not depend on the number of workers.

    Args:
        file: A file of any format in `m2_plugin.data.formats`; in a text file each line is a text.
            It is read three times, in order, so that memory does not grow with its size.
        model: A transformers folder of any model type with a classifier of texts or words, or a
            model that answers questions; or a Composer checkpoint (.pt) of an M2-BERT. Texts longer
            than a classifier's maximum are cut, with a warning; the others read them in windows.
        out: The `.csv`, `.jsonl` or `.parquet` file to write: all columns of the input, and
            `prediction` (the name of the class, the tags, the answer) with the columns of the task
            (see `m2_plugin.tasks`): `probability_NAME` for each class, `probability`, ...;
            for a regression only `score`. It appears when it is complete; until then a hidden
            folder beside it holds the finished answers.
        text_column: The column with the texts, and the name for the lines of a text file.
        pair_column: The column with the second texts of pairs.
        batch_tokens: The most tokens in a batch, padding included; None means 16,384, on a CPU
            4,096.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.
        overwrite: Whether to replace `out` if it exists.
        num_workers: The processes on this machine; None means one per GPU, or per core. With one,
            the calling process does the work.
        cluster: The address of a Dask scheduler, or its scheduler file, to use its workers.

    Returns:
        The number of rows for each predicted class; for other tasks `{"": rows}`.

    Raises:
        ValueError: If a row cannot be read, the file has no rows or has columns with the names of
            the answers, the model has no head or no tokenizer, torch has no such device, or
            `out` exists or cannot be written. The message names the file, line or option.
        WorkersError: If the cluster cannot be reached, or a worker died.
    """
    out = Path(out)
    check_options(out, OUT_ENDINGS, batch_tokens, num_workers)
    check_absent(out, overwrite)
    batch = batch_tokens or default_batch(device)
    settings = Settings(text_column, pair_column, batch, device, dtype)
    work = Work.of(load, model, settings)
    source = _Source(file, work.model())
    schema = source.schema() if out.suffix == ".parquet" else None
    counts: Counter[str] = Counter()
    with writing(out, source.rows.job(work), overwrite) as parts:
        spans = run_chunks(source.rows, work, parts, "predict", num_workers, cluster)
        joined = _joined(source, parts.contents(spans), counts)
        write_rows(out, joined, source.out_columns, schema)
    return dict(counts)


def load(path: str, settings: Settings) -> Task:
    """Load a model with a head, and what it answers, on the CPU.

    Raises:
        ValueError: If there is none, no tokenizer, or no prediction for such a model.
    """
    with model_folder(path) as folder:
        model, kind = load_model(folder)
        if kind not in TASKS:
            raise ValueError(f"{path!r} is a model {kind}, for which there is no prediction")
        tokenizer = own_tokenizer(folder, model.config.vocab_size)
    return TASKS[kind](model, tokenizer, settings)


class _Source:
    """The rows of the input file, which is read once to check them all.

    Raises:
        ValueError: If one is wrong, or a column has the name of an answer's.
    """

    def __init__(self, file: str | Path, task: Task):
        self.file, self.task = file, task
        self.columns: dict[str, None] = {}
        self.rows = Rows(str(file), *survey(self._checked(), file))
        self.out_columns = [*self.columns, *task.fields.names]
        if clash := [column for column in task.fields.names if column in self.columns]:
            raise ValueError(
                f"{str(file)!r} has a column {clash[0]!r}, as the predictions will have: rename it"
            )

    def read(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield each row's values, and what the task needs of them."""
        return self.task.rows(str(self.file))

    def _checked(self) -> Iterator[dict[str, Any]]:
        for number, (values, _) in enumerate(self.read(), 1):
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
            own = infer_schema((values for values, _ in self.read()), list(self.columns))
        # Without the metadata: `datasets` would expect its columns to be all.
        return pyarrow.schema([*own, *self.task.fields])


def _joined(
    source: _Source, parts: Iterable[bytes], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield each row with its answer, and count the predictions."""
    lines = (line for part in parts for line in part.splitlines())
    for (values, _), line in zip(source.read(), lines, strict=True):
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
        "and probability_NAME for each class; score for a regression; tags, probability and "
        "entities for words; or an answer, its place and scores",
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
