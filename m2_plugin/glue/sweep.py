"""The sweep: one llm-foundry process per task and seed, in parallel, resumable.

    OUT/plan.json               the jobs, with a hash of each job's settings
    OUT/sweep.yaml              the merged sweep file
    OUT/TASK-seedN/job.yaml     the YAML that llm-foundry ran
                   log.txt      its output
                   metrics.json, predictions/, huggingface/     its results
                   result.json  the outcome, written last

A job is not run again if its result.json has the status `finished` and the same hash.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from m2_plugin.constants import CHECKPOINT_SUFFIXES
from m2_plugin.files import lock, read_json, write_atomically, write_json
from m2_plugin.glue import tasks as glue_tasks
from m2_plugin.glue.recipes import (
    MNLI,
    MODEL_FOLDER,
    SINGLE_RUN,
    Sweep,
    job_config,
    predict_loader,
    to_yaml,
)

__all__ = ["Job", "make_slots", "plan", "run_jobs", "run_sweep"]

log = logging.getLogger(__name__)

FINISHED, FAILED, BLOCKED = "finished", "failed", "blocked"
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
TAIL_LINES = 30
THREADS_PER_JOB = 4  # on a CPU, unless OMP_NUM_THREADS says otherwise

# The last line of a traceback; torch puts the rank before it.
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")

REFUSAL = "ConfigError"  # of foundry/preflight.py

Command = Callable[["Job"], Sequence[str]]


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

    def is_finished(self) -> bool:
        """Return whether its result is complete and belongs to these settings."""
        try:
            result = read_json(self.folder / "result.json", missing_ok=True)
        except ValueError as error:
            log.warning("%s: it runs again", error)
            return False
        if result is None or result.get("status") != FINISHED:
            return False
        model = not self.keeps_model or (self.model_folder / "config.json").is_file()
        return result.get("hash") == self.hash and model


def job_name(task: str, seed: int) -> str:
    """Return the name of a job and of its folder."""
    return f"{task}-seed{seed}"


# --- the plan ------------------------------------------------------------------------------------


def plan(sweep: Sweep, out: Path, *, on_cpu: bool = False) -> list[Job]:
    """List all jobs of a sweep, each after the job that it needs.

    Args:
        sweep: The sweep.
        out: The folder of the sweep.
        on_cpu: Whether to use fp32, since Composer refuses other precisions on a CPU.

    Raises:
        ValueError: If a checkpoint or the folder of the data does not exist.
    """
    _check_paths(sweep)
    mnli = sweep.tasks.get(MNLI)
    # The first seed: it is known before any run, and the published recipe has only one.
    needed = job_name(MNLI, mnli.seeds[0]) if mnli else job_name(MNLI, 0)
    starts = any(r.start for r in sweep.tasks.values()) and sweep.mnli_checkpoint is None
    jobs: dict[str, Job] = {}
    for task, recipe in sorted(sweep.tasks.items(), key=lambda item: item[1].start is not None):
        for seed in recipe.seeds:
            name = job_name(task, seed)
            needs = needed if recipe.start and sweep.mnli_checkpoint is None else None
            start = sweep.start
            if recipe.start:
                start = sweep.mnli_checkpoint or str(out / needed / MODEL_FOLDER)
            keeps_model = sweep.keep_models or (starts and name == needed)
            config = _sweep_job(sweep, task, seed, out / name, start, keeps_model, on_cpu)
            origin = jobs[needs].hash if needs in jobs else _fingerprint(start)
            jobs[name] = Job(
                task=task,
                seed=seed,
                folder=out / name,
                config=config,
                hash=_hash(config, origin),
                needs=needs,
                keeps_model=keeps_model,
            )
    return list(jobs.values())


def _check_paths(sweep: Sweep) -> None:
    given = {
        "start": sweep.start,
        "mnli_checkpoint": sweep.mnli_checkpoint,
        "variables.glue_path": sweep.variables.get("glue_path"),
        "variables.tokenizer": sweep.variables.get("tokenizer"),
    }
    for key, value in given.items():
        is_path = value is not None and str(value).startswith((".", "/", "~"))
        is_path |= key == "variables.glue_path" or str(value).endswith(CHECKPOINT_SUFFIXES)
        if value is not None and is_path and not Path(value).expanduser().exists():
            raise ValueError(f"{key}: {value!r} does not exist.")


def _sweep_job(
    sweep: Sweep,
    task: str,
    seed: int,
    folder: Path,
    start: str | None,
    keeps_model: bool,
    on_cpu: bool,
) -> dict[str, Any]:
    config = job_config(
        sweep, task, seed, run_name=f"{sweep.name}-{folder.name}", out=str(folder), start=start
    )
    config["variables"]["start"] = start  # job_config sets the start of a single run
    for key in SINGLE_RUN:
        config.pop(key)
    if on_cpu:
        config["precision"] = "fp32"
    config |= {"progress_bar": False, "log_to_console": True, "console_log_interval": "100ba"}
    config["callbacks"]["eval_results"]["progress"] = True
    if sweep.predict:
        config["callbacks"]["eval_results"]["predict"] = [
            predict_loader(sweep, source, split, prediction_label(source, split))
            for source in ((task, "ax") if task == MNLI else (task,))
            for split in glue_tasks.task(source).test_splits
        ]
    if not keeps_model:
        for name in ("hf_checkpointer", "model_card"):
            config["callbacks"].pop(name)
    return config


def prediction_label(task: str, split: str) -> str:
    """Return the name of a test split's predictions: `cola`, `mnli_matched`, ..."""
    return task + split.removeprefix("test")


def _fingerprint(start: str | None) -> str:
    """Hash names, sizes and times of a checkpoint's files; return a hub's name as it is."""
    if start is None:
        return "random"
    path = Path(start).expanduser()
    if not path.exists():
        return start
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _hash(config: Mapping[str, Any], origin: str) -> str:
    """Hash the settings, without names, folders and reporting."""
    config = copy.deepcopy(dict(config))
    for key in ("run_name", "out", "start"):
        del config["variables"][key]
    for name in ("hf_checkpointer", "model_card"):
        config["callbacks"].pop(name, None)
    text = json.dumps([config, origin], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def select(
    jobs: Sequence[Job], tasks: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Job]:
    """Select the jobs of some tasks and seeds.

    Raises:
        ValueError: If a task or seed is not in the plan, or if a job needs the MNLI model and the
            selection neither has it nor trains it.
    """
    for name in tasks or ():
        if name not in {job.task for job in jobs}:
            glue_tasks.task(name)
            raise ValueError(f"--tasks: {name!r} is not in this sweep.")
    for seed in seeds or ():
        known = sorted({job.seed for job in jobs})
        if seed not in known:
            raise ValueError(
                f"--seeds: no task of this sweep has seed {seed}, only "
                f"{', '.join(map(str, known))}. To add it: tasks.TASK.seeds=[{seed}]."
            )
    chosen = [
        job for job in jobs if (not tasks or job.task in tasks) and (not seeds or job.seed in seeds)
    ]
    if not chosen:
        raise ValueError("No job of this sweep has one of these tasks and one of these seeds.")
    by_name = {job.name: job for job in jobs}
    names = {job.name for job in chosen}
    waiting = [job for job in chosen if job.needs and not job.is_finished()]
    for job in waiting:
        assert job.needs is not None
        source = by_name.get(job.needs)
        if job.needs not in names and not (source and source.is_finished()):
            which = ", ".join(sorted({job.task for job in waiting}))
            raise ValueError(
                f"{which} start from the MNLI model, which does not exist: run mnli too"
                f"{f' (seed {source.seed})' if source else ''}, or set "
                f"mnli_checkpoint=CHECKPOINT, or tasks.{job.task}.start=null to start from `start`."
            )
    return chosen


def _check_starts(jobs: Sequence[Job]) -> None:
    for job in jobs:
        model = job.config["model"]
        if job.config["variables"]["start"] is None and model.get("pretrained") is not False:
            raise ValueError(
                "start is missing: give --start FOLDER, the checkpoint to fine-tune (a "
                "transformers folder, or a .pt file of Composer or of the M2 release). To train "
                "from random weights, set model.pretrained=false too."
            )


# --- running -------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """Return the names of the GPUs for CUDA_VISIBLE_DEVICES."""
    import torch  # slow to import, and not needed for a report

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if len(named) >= count else [str(i) for i in range(count)]


def make_slots(gpus: Sequence[str], jobs: int | None) -> list[dict[str, str]]:
    """Return the environments of jobs that run at the same time.

    Args:
        gpus: The names of the GPUs; each job has one, shared if there are more jobs.
        jobs: The number of jobs at a time; by default one per GPU, or per four cores.

    Raises:
        ValueError: If `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}.")
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or max(1, cores // THREADS_PER_JOB)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}] * jobs


def train_command(job: Job) -> list[str]:
    """Return the command that runs llm-foundry's training in its own process."""
    yaml = str(job.folder / "job.yaml")
    return [sys.executable, "-m", "llmfoundry.cli.cli", "train", yaml]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: TextIO
    started: float


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    command: Command = train_command,
    held: int | None = None,
) -> dict[str, str]:
    """Run the jobs that are not finished, as many at a time as there are slots.

    A job starts when the job that it needs has finished, and is blocked if that failed; the others
    continue. If llm-foundry refuses the settings of a job, no other job is started: they share most
    of their settings. When this function ends, for any reason, its processes end too.

    Args:
        jobs: The jobs in their order.
        slots: The environment variables of each slot.
        command: A function that returns the command line of a job.
        held: A file descriptor that the processes inherit.

    Returns:
        The status by name of the job.
    """
    statuses = {job.name: FINISHED for job in jobs if job.is_finished()}
    pending = [job for job in jobs if job.name not in statuses]
    running: dict[int, _Running] = {}
    bar = tqdm(total=len(jobs), initial=len(statuses), unit="job", desc="glue", smoothing=0)
    shown = ""
    refused: str | None = None
    try:
        with bar, logging_redirect_tqdm():
            while pending or running:
                for slot in range(len(slots)):
                    if slot not in running:
                        job = _next(pending, statuses)
                        if job is not None:
                            running[slot] = _start(job, command(job), slots[slot], held)
                for slot, current in list(running.items()):
                    if current.process.poll() is not None:
                        del running[slot]
                        statuses[current.job.name] = _finish(current)
                        refused = refused or _refused(current.job)
                        bar.update()
                for job in list(pending):
                    problem = refused or _blocked_by(job, statuses)
                    if problem is not None:
                        pending.remove(job)
                        statuses[job.name] = _block(job, problem)
                        bar.update()
                text = "; ".join(_describe(current.job) for current in running.values())
                if text != shown and sys.stderr.isatty():  # a file gets one line per job
                    shown = text
                    bar.set_postfix_str(text)
                if running:
                    time.sleep(POLL_SECONDS)
    finally:
        _stop(list(running.values()))
    return statuses


def _next(pending: list[Job], statuses: Mapping[str, str]) -> Job | None:
    for job in pending:
        if job.needs is None or statuses.get(job.needs) == FINISHED:
            pending.remove(job)
            return job
    return None


def _blocked_by(job: Job, statuses: Mapping[str, str]) -> str | None:
    """Return why a job cannot run, or None."""
    if statuses.get(job.needs or "") in (FAILED, BLOCKED):
        return f"it starts from {job.needs}, which failed"
    return None


def _refused(job: Job) -> str | None:
    """Return a note if the settings of a job that has ended were refused, or None."""
    error = read_json(job.folder / "result.json").get("error")
    if isinstance(error, str) and error.split(":")[0].endswith(REFUSAL):
        return f"the settings of {job.name} were refused"
    return None


def _start(job: Job, command: Sequence[str], slot: Mapping[str, str], held: int | None) -> _Running:
    # Remove files of an earlier attempt, so that they do not count as results of this one.
    if job.folder.exists():
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True)
    write_atomically(job.folder / "job.yaml", to_yaml(job.config))
    output = open(job.folder / "log.txt", "w", encoding="utf-8")  # noqa: SIM115 (open as it runs)
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "_TYPER_STANDARD_TRACEBACK": "1",  # without the boxes around llm-foundry's tracebacks
        **slot,
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=() if held is None else (held,),
    )
    log.info("%s started: %s", job.name, job.folder / "log.txt")
    return _Running(job, process, output, time.time())


def _finish(current: _Running) -> str:
    """Write the result of a process that has ended, and return its status."""
    current.log.close()
    job, code = current.job, current.process.returncode
    seconds = round(time.time() - current.started, 1)
    result: dict[str, Any] = {
        "task": job.task,
        "seed": job.seed,
        "hash": job.hash,
        "start": job.config["variables"]["start"],
        "seconds": seconds,
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
        write_json(job.folder / "result.json", {"status": FINISHED, **result, **report})
        log.info("%s finished after %.0f s: %s", job.name, seconds, _one_line(report["metrics"]))
        return FINISHED
    tail = _tail(job.folder / "log.txt")
    result |= {"problem": problem, "error": _last_error(tail), "log_tail": tail}
    write_json(job.folder / "result.json", {"status": FAILED, **result})
    log.error("%s FAILED: %s. %s", job.name, problem, job.folder / "log.txt")
    log.error("%s", "\n".join(f"    {line}" for line in tail))
    return FAILED


def _block(job: Job, problem: str) -> str:
    job.folder.mkdir(parents=True, exist_ok=True)
    result = {"task": job.task, "seed": job.seed, "hash": job.hash}
    write_json(job.folder / "result.json", {"status": BLOCKED, **result, "problem": problem})
    log.error("%s not run: %s", job.name, problem)
    return BLOCKED


def _stop(running: Sequence[_Running]) -> None:
    """Terminate the processes, and kill those that do not end within some seconds."""
    for current in running:
        current.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for current in running:
        try:
            current.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            current.process.kill()
            current.process.wait()
        current.log.close()


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


def _one_line(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    return ", ".join(
        f"{label} {name} {'undefined' if value is None else format(value, '.4f')}"
        for label, values in metrics.items()
        for name, value in values.items()
    )


def _describe(job: Job) -> str:
    try:
        progress = read_json(job.folder / "progress.json")
    except ValueError:
        return f"{job.name} starts"
    loss = progress.get("loss")
    return (
        f"{job.name} {progress.get('done', 0):.0%} loss {'nan' if loss is None else f'{loss:.3f}'}"
    )


# --- the whole sweep -----------------------------------------------------------------------------


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that `finally` ends the jobs."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_plan(sweep: Sweep, jobs: Sequence[Job], out: Path) -> None:
    """Write the files that a report needs."""
    write_atomically(out / "sweep.yaml", to_yaml(_plain(dataclasses.asdict(sweep))))
    entries = [{"task": job.task, "seed": job.seed, "hash": job.hash} for job in jobs]
    write_json(
        out / "plan.json",
        {
            "name": sweep.name,
            "start": sweep.start,
            "pretrained": sweep.model.get("pretrained") is not False,
            "paper_average": sweep.paper_average,
            "jobs": entries,
        },
    )


def _plain(value: Any) -> Any:
    """Turn tuples into lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    gpus: Sequence[str] | None = None,
    command: Command = train_command,
) -> dict[str, str]:
    """Run the jobs of a sweep that are not finished.

    Args:
        sweep: The sweep.
        out: The folder of the sweep.
        tasks: The tasks to run; by default all.
        seeds: The seeds to run; by default all.
        jobs: The number of jobs at a time.
        gpus: The GPUs to use; by default all visible ones.
        command: A function that returns the command line of a job.

    Returns:
        The status, "finished", "failed" or "blocked", by name of the job.

    Raises:
        ValueError: If the selection is wrong, a job has no checkpoint to start from, or another
            sweep runs in the folder.
    """
    gpus = visible_gpus() if gpus is None else gpus
    planned = plan(sweep, out, on_cpu=not gpus)
    chosen = select(planned, tasks, seeds)
    _check_starts(chosen)
    slots = make_slots(gpus, jobs)
    out.mkdir(parents=True, exist_ok=True)
    what = f"{str(out)!r} is in use by another sweep, or by a job that it left running"
    held = lock(out / ".lock", what, "set another --out")  # by the jobs too
    with held or nullcontext(), _terminable():
        write_plan(sweep, planned, out)
        if not gpus and sweep.job.get("precision", "amp_bf16") != "fp32":
            log.warning("No GPU: the jobs run in fp32, as Composer requires on a CPU.")
        needed = {job.needs for job in chosen} - {job.name for job in chosen}
        known = [job for job in planned if job.name in needed and job.is_finished()]
        statuses = run_jobs([*known, *chosen], slots, command, held.fileno() if held else None)
    return {job.name: statuses[job.name] for job in chosen}
