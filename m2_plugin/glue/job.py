"""A job of the sweep: one task and seed, trained by llm-foundry in a process of its own.

    OUT/TASK-seedN/job.yaml     the YAML that llm-foundry ran
                   log.txt      its output
                   metrics.json, predictions/, huggingface/     its results
                   result.json  the outcome, written last

A job is not run again if its result.json has the status `finished` and the same hash.
"""

import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2_plugin.executor import is_wanted
from m2_plugin.files import locked, read_json, write_atomically, write_json
from m2_plugin.glue import child
from m2_plugin.glue.recipes import MODEL_FOLDER, to_yaml

__all__ = ["TRAIN", "Job", "job_name", "run_job"]

log = logging.getLogger(__name__)

FINISHED, FAILED, BLOCKED = "finished", "failed", "blocked"
RESULT = "result.json"
TRAIN = ("-m", "llmfoundry.cli.cli", "train")  # what Python runs, before the YAML
VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "_TYPER_STANDARD_TRACEBACK": "1",  # without the boxes around llm-foundry's tracebacks
}
POLL_S = 0.5
TAIL_LINES = 30

# The last line of a traceback; torch puts the rank before it.
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")


@dataclass(frozen=True)
class Job:
    """One task and seed.

    Attributes:
        task: The name of the task.
        seed: The seed.
        folder: The folder of its results.
        config: The YAML for llm-foundry.
        hash: A hash of everything that its result depends on.
        needs: The name of the job whose model it starts from, or None.
        keeps_model: Whether it writes a transformers folder.
    """

    task: str
    seed: int
    folder: Path
    config: dict[str, Any]
    hash: str
    needs: str | None = None
    keeps_model: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        return job_name(self.task, self.seed)

    @property
    def model_folder(self) -> Path:
        """The folder of its model, if it keeps one."""
        return self.folder / MODEL_FOLDER

    def finished(self) -> dict[str, Any] | None:
        """Return its result if that is complete and belongs to these settings."""
        try:
            result: dict[str, Any] | None = read_json(self.folder / RESULT, missing_ok=True)
        except ValueError as error:
            log.warning("%s: it runs again", error)
            return None
        if result is None or result.get("status") != FINISHED or result.get("hash") != self.hash:
            return None
        model = not self.keeps_model or (self.model_folder / "config.json").is_file()
        return result if model else None

    def write_result(self, status: str, **values: Any) -> dict[str, Any]:
        """Write its result, and return it."""
        self.folder.mkdir(exist_ok=True)
        result = {"status": status, "task": self.task, "seed": self.seed, "hash": self.hash}
        write_json(self.folder / RESULT, result | values)
        return result | values


def job_name(task: str, seed: int) -> str:
    """Return the name of a job and of its folder."""
    return f"{task}-seed{seed}"


def run_job(
    job: Job,
    program: Sequence[str] = TRAIN,
    folder: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a job if it is not finished, and return its result.

    Other processes may do the same at the same time: one of them runs it, and the others wait.

    Args:
        job: The job.
        program: What Python runs, before the path of the YAML.
        folder: The folder to run it in, which its relative paths start from.
        environment: Variables to set for it.

    Raises:
        ValueError: If the folder of the sweep is not there, or cannot be written.
        OSError: If a file cannot be written.
    """
    for path in (job.folder.parent, Path(folder or ".")):
        if not path.is_dir():
            raise ValueError(
                f"{str(path)!r} does not exist on {socket.gethostname()}: the workers must see the "
                "folder of the sweep, and the folder in which you started it, under the same paths"
            )
    with locked(job.folder / RESULT, wait=math.inf) as held:
        handles = (held.fileno(),) if held else ()  # the process holds the lock, too
        variables = {**os.environ, **VARIABLES, **(environment or {})}
        return job.finished() or _train(job, program, cwd=folder, env=variables, pass_fds=handles)


def _train(job: Job, program: Sequence[str], **process: Any) -> dict[str, Any]:
    """Run a job; `process` is for `Popen`."""
    # Remove files of an earlier attempt, so that they do not count as results of this one.
    for path in job.folder.glob("[!.]*"):  # not the lock
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    yaml = job.folder / "job.yaml"
    write_atomically(yaml, to_yaml(job.config))
    started = time.time()
    code = _run([sys.executable, *program, str(yaml)], job.folder / "log.txt", **process)
    values = {
        "start": job.config["variables"]["start"],
        "seconds": round(time.time() - started, 1),
    }
    problem, report = None, {}
    try:
        report = read_json(job.folder / "metrics.json")
    except ValueError as error:
        problem = f"it ended without metrics: {error}"
    if code != 0:
        problem = f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"
    elif problem is None and job.keeps_model and not (job.model_folder / "config.json").is_file():
        problem = f"it wrote no model to {job.model_folder}"
    if problem is None:
        return job.write_result(FINISHED, **values, **report)
    tail = _tail(job.folder / "log.txt")
    values |= {"problem": problem, "error": _last_error(tail), "log_tail": tail}
    return job.write_result(FAILED, **values)


def _run(command: Sequence[str], output: Path, **process: Any) -> int:
    """Run a command, which ends with this process; return its exit code, or minus its signal.

    Args:
        command: The command.
        output: A file for what it writes.
        process: For `Popen`.

    Raises:
        CancelledError: If nobody waits for the task any more.
    """
    command = [sys.executable, "-I", child.__file__, *command]
    pipe = subprocess.PIPE  # closed at the end of the block
    with (
        open(output, "wb") as file,
        subprocess.Popen(
            command, stdin=pipe, stdout=file, stderr=subprocess.STDOUT, **process
        ) as running,
    ):
        while is_wanted():
            try:
                return running.wait(POLL_S)
            except subprocess.TimeoutExpired:
                pass
        raise CancelledError


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    # A progress bar rewrites its line: keep only its last text.
    return [line.rsplit("\r", 1)[-1] for line in lines if line.strip()][-TAIL_LINES:]


def _last_error(tail: Sequence[str]) -> str:
    """Return the line that names the exception, or the last line."""
    found = [match[1] for line in tail if (match := EXCEPTION.match(line))]
    return found[-1] if found else tail[-1] if tail else ""
