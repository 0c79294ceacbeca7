"""The sweep: all jobs of a recipe, in parallel, resumable.

OUT/plan.json       the jobs, with a hash of each job's settings
OUT/sweep.yaml      the merged sweep file
OUT/TASK-seedN/     a job, see job.py
"""

import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from m2_plugin.constants import CHECKPOINT_SUFFIXES
from m2_plugin.executor import Workers, open_workers, visible_gpus
from m2_plugin.files import locked, read_json, write_atomically, write_json
from m2_plugin.glue import tasks as glue_tasks
from m2_plugin.glue.job import (
    BLOCKED,
    FAILED,
    FINISHED,
    RESULT,
    TRAIN,
    Job,
    job_name,
    run_job,
)
from m2_plugin.glue.recipes import (
    MNLI,
    MODEL_FOLDER,
    SINGLE_RUN,
    Sweep,
    job_config,
    predict_loader,
    to_yaml,
)

__all__ = ["local_jobs", "plan", "run_jobs", "run_sweep"]

log = logging.getLogger(__name__)

THREADS_PER_JOB = 4  # on a CPU, unless OMP_NUM_THREADS says otherwise
REFUSAL = "ConfigError"  # of foundry/errors.py


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
    waiting = [job for job in chosen if job.needs and not job.finished()]
    for job in waiting:
        assert job.needs is not None
        source = by_name.get(job.needs)
        if job.needs not in names and not (source and source.finished()):
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


def local_jobs(gpus: Sequence[str], jobs: int | None) -> tuple[int, dict[str, str]]:
    """Return how many jobs run at a time on this machine, and variables to set for them.

    Args:
        gpus: The GPUs; each job has one, shared if there are more jobs.
        jobs: The number of jobs at a time; by default one per GPU, or per four cores.
    """
    if gpus:
        return jobs or len(gpus), {}
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or max(1, cores // THREADS_PER_JOB)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    return jobs, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}


def run_jobs(
    jobs: Sequence[Job],
    workers: Workers,
    function: Callable[[Job], dict[str, Any]] = run_job,
    most: int | None = None,
) -> dict[str, str]:
    """Run the jobs that are not finished.

    A job starts when the job that it needs has finished, and is blocked if that failed; the others
    continue. If llm-foundry refuses the settings of a job, no other job is started: they share most
    of their settings.

    Args:
        jobs: The jobs in their order.
        workers: What runs them.
        function: Runs a job; returns its result.
        most: The number of jobs at a time, at most.

    Returns:
        The status by name of the job.

    Raises:
        WorkersError: If a worker died.
    """
    statuses: dict[str, str] = {}
    for job in jobs:
        if job.finished():
            with locked(job.folder / RESULT, wait=math.inf):  # removes what killed processes left
                statuses[job.name] = FINISHED
    pending = [job for job in jobs if job.name not in statuses]
    running: dict[str, Job] = {}
    refused: str | None = None

    def ready() -> Iterator[Job | None]:
        while pending:
            limit = max(1, min(workers.count(), most or sys.maxsize))
            able = (job for job in pending if not job.needs or statuses.get(job.needs) == FINISHED)
            job = next(able, None) if len(running) < limit else None
            if job is not None:
                pending.remove(job)
                running[job.name] = job
                log.info("%s started: %s", job.name, job.folder / "log.txt")
            yield job

    bar = tqdm(total=len(jobs), initial=len(statuses), unit="job", desc="glue", smoothing=0)

    def tick() -> None:
        if sys.stderr.isatty():  # a file gets one line per job
            bar.set_postfix_str("; ".join(map(_describe, running.values())))

    with bar, logging_redirect_tqdm():
        for result in workers.run(function, ready(), tick):
            job = running.pop(job_name(result["task"], result["seed"]))
            statuses[job.name] = result["status"]
            _log_result(job, result)
            if result.get("error", "").split(":")[0].endswith(REFUSAL):
                refused = refused or f"the settings of {job.name} were refused"
            bar.update()
            for other in tuple(pending):
                problem = refused
                if statuses.get(other.needs or "") in (FAILED, BLOCKED):
                    problem = problem or f"it starts from {other.needs}, which failed"
                if problem is not None:
                    pending.remove(other)
                    statuses[other.name] = BLOCKED
                    other.write_result(BLOCKED, problem=problem)
                    log.error("%s not run: %s", other.name, problem)
                    bar.update()
    return statuses


def _log_result(job: Job, result: Mapping[str, Any]) -> None:
    if result["status"] == FINISHED:
        metrics = _one_line(result["metrics"])
        log.info("%s finished after %.0f s: %s", job.name, result["seconds"], metrics)
        return
    log.error("%s FAILED: %s. %s", job.name, result["problem"], job.folder / "log.txt")
    log.error("%s", "\n".join(f"    {line}" for line in result["log_tail"]))


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
    cluster: str | None = None,
    gpus: Sequence[str] | None = None,
    program: Sequence[str] = TRAIN,
) -> dict[str, str]:
    """Run the jobs of a sweep that are not finished.

    Args:
        sweep: The sweep.
        out: The folder of the sweep.
        tasks: The tasks to run; by default all.
        seeds: The seeds to run; by default all.
        jobs: The number of jobs at a time.
        cluster: The address of a Dask scheduler, or its scheduler file, to use its workers.
        gpus: The GPUs of this machine, or of a worker; by default all visible ones.
        program: What Python runs for a job, before the path of its YAML.

    Returns:
        The status, "finished", "failed" or "blocked", by name of the job.

    Raises:
        ValueError: If `jobs` is less than 1, the selection is wrong, a job has no checkpoint to
            start from, or another sweep runs in the folder.
        WorkersError: If the cluster cannot be reached, or a worker died.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}.")
    out = Path(os.path.abspath(out))  # the workers of a cluster run in other folders
    environment: dict[str, str] = {}
    count = jobs
    if cluster is None:
        gpus = visible_gpus() if gpus is None else gpus
        count, environment = local_jobs(gpus, jobs)
    preload = [run_job.__module__]
    with _terminable(), open_workers(count, cluster, preload, gpus or ()) as workers:
        if gpus is None:
            gpus = next(workers.run(visible_gpus, [0]))
        planned = plan(sweep, out, on_cpu=not gpus)
        chosen = select(planned, tasks, seeds)
        _check_starts(chosen)
        needed = {job.needs for job in chosen} - {job.name for job in chosen}
        known = [job for job in planned if job.name in needed and job.finished()]
        with locked(out / "plan.json"):
            write_plan(sweep, planned, out)
            if not gpus and sweep.job.get("precision", "amp_bf16") != "fp32":
                log.warning("No GPU: the jobs run in fp32, as Composer requires on a CPU.")
            run = partial(run_job, program=program, folder=os.getcwd(), environment=environment)
            statuses = run_jobs([*known, *chosen], workers, run, jobs)
    return {job.name: statuses[job.name] for job in chosen}
