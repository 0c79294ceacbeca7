"""Files for the GLUE server (https://gluebenchmark.com/submit), from a sweep's predictions."""

import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2_plugin.files import read_json, write_atomically
from m2_plugin.glue import tasks as glue_tasks
from m2_plugin.glue.job import FINISHED, job_name
from m2_plugin.glue.recipes import MNLI
from m2_plugin.glue.report import SCORED, Report, TaskReport, load_report
from m2_plugin.glue.sweep import prediction_label

__all__ = ["write_submission"]

log = logging.getLogger(__name__)

# Rows of the official test files.
TEST_ROWS = {
    "CoLA.tsv": 1_063,
    "SST-2.tsv": 1_821,
    "MRPC.tsv": 1_725,
    "STS-B.tsv": 1_379,
    "QQP.tsv": 390_965,
    "MNLI-m.tsv": 9_796,
    "MNLI-mm.tsv": 9_847,
    "QNLI.tsv": 5_463,
    "RTE.tsv": 3_000,
    "WNLI.tsv": 146,
    "AX.tsv": 1_104,
}
# The server needs a file for WNLI, which the paper leaves out: the most frequent training class.
WNLI_CLASS = 0


def format_predictions(task: glue_tasks.Task, logits: Any) -> str:
    """Format predictions for the server.

    Args:
        task: The task.
        logits: (N, num_labels), or (N, 1) for a regression, in the order of the test file.

    Returns:
        A header, and lines of index and prediction: the class as in the official files, or the
        number, clipped to the task's range.
    """
    if task.is_regression:
        predictions = [f"{value:.3f}" for value in np.clip(logits[:, 0], *task.label_range)]
    else:
        predictions = [task.official_labels[i] for i in logits.argmax(axis=1)]
    lines = [f"{index}\t{prediction}" for index, prediction in enumerate(predictions)]
    return "\n".join(["index\tprediction", *lines]) + "\n"


def write_submission(out: Path, folder: Path) -> list[Path]:
    """Write one file per test split, and `submission.zip` with all of them.

    The predictions of each task are those of the seed with the best score on the development set.
    The model of MNLI predicts AX.

    Args:
        out: The folder of a finished sweep.
        folder: The folder to write; created if missing.

    Returns:
        The files.

    Raises:
        ValueError: If a task is not finished or was not predicted; the message names everything
            that is missing. Nothing is written then.
    """
    report = load_report(out)
    problems: list[str] = []
    files: dict[str, str] = {}
    by_task = {task.task: task for task in report.tasks}
    for name in SCORED:
        seed = _best_seed(by_task.get(name), name, problems)
        if seed is None:
            continue
        for source in (name, "ax") if name == MNLI else (name,):
            task = glue_tasks.task(source)
            for split, file in zip(task.test_splits, task.submission_files, strict=True):
                logits = _load(out / job_name(name, seed), prediction_label(source, split))
                if isinstance(logits, str):
                    problems.append(f"{file}: {logits}")
                else:
                    files[file] = format_predictions(task, logits)
    if problems:
        raise ValueError("No submission: " + _join(problems))
    wnli = glue_tasks.task("wnli")
    constant = np.eye(2)[[WNLI_CLASS] * TEST_ROWS["WNLI.tsv"]]
    files[wnli.submission_files[0]] = format_predictions(wnli, constant)
    _check_rows(files)
    folder.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for file, text in files.items():
            write_atomically(folder / file, text)
            zipped.writestr(file, text)
    write_atomically(folder / "submission.zip", archive.getvalue())
    _log_choice(report)
    return [folder / file for file in (*files, "submission.zip")]


def _best_seed(task: TaskReport | None, name: str, problems: list[str]) -> int | None:
    if task is None:
        problems.append(f"{name} is not in the sweep")
        return None
    if not task.is_complete:
        problems.append(f"{name} is not finished ({task.note})")
        return None
    return max(task.seeds, key=lambda seed: task.scores[seed] or 0.0)


def _load(folder: Path, label: str) -> Any:
    """Return the logits, or the reason why there are none, as text."""
    result = read_json(folder / "result.json")
    assert result["status"] == FINISHED
    entry = result.get("predictions", {}).get(label)
    if entry is None:
        return f"{folder.name} has no predictions of {label}; run it again with predict=true"
    if "error" in entry:
        return f"{folder.name} could not read the test file: {entry['error']}"
    path = folder / "predictions" / f"{label}.npy"
    if not path.is_file():
        return f"{path} does not exist"
    return np.load(path)


def _check_rows(files: dict[str, str]) -> None:
    for file, text in files.items():
        rows = text.count("\n") - 1
        if rows != TEST_ROWS[file]:
            log.warning(
                "%s has %d rows, the official test file has %d: the server will refuse it.",
                file, rows, TEST_ROWS[file],
            )  # fmt: skip


def _log_choice(report: Report) -> None:
    for task in report.tasks:
        if len(task.seeds) > 1:
            seed = max(task.seeds, key=lambda seed: task.scores[seed] or 0.0)
            log.info("%s: predictions of seed %d, the best on the development set", task.task, seed)
    log.info("WNLI.tsv has one class only: the paper does not train this task.")


def _join(problems: Sequence[str]) -> str:
    return "\n  ".join(["", *problems])
