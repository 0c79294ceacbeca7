"""The order of jobs, their failures and their files, with a small script as each job."""

import json
import logging
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from m2_plugin.executor import open_workers
from m2_plugin.glue.job import _last_error, run_job
from m2_plugin.glue.recipes import load_sweep
from m2_plugin.glue.report import load_report, to_text
from m2_plugin.glue.sweep import local_jobs, plan, select
from tests.glue import fake

from .conftest import (
    ALL,
    CONFIG,
    FEW,
    LONG,
    behave,
    finish,
    journal,
    launch,
    run,
    running,
    soon,
    started,
    wait_for,
    wait_until_halfway,
)


def result(out: Path, name: str) -> dict:
    return json.loads((out / name / "result.json").read_text())


def test_every_task_and_seed_runs_once_and_after_what_it_needs(out):
    behave(out, {"mnli-seed19": {"sleep": 2}})
    assert run(out) == dict.fromkeys(ALL, "finished")
    assert sorted(started(out)) == sorted(ALL)
    lines = [" ".join(line.split()[:2]) for line in journal(out)]
    ready = lines.index("end mnli-seed19")
    for name in ("rte-seed1", "mrpc-seed1", "stsb-seed1"):
        assert lines.index(f"start {name}") > ready
        assert result(out, name)["start"] == str(out / "mnli-seed19" / "huggingface" / "final")
    # The others did not wait for it.
    assert lines.index("end qqp-seed19") < ready
    kept = {p.parent.name for p in out.glob("*/huggingface")}
    assert kept == {"mnli-seed19"}
    found = result(out, "cola-seed1")
    assert found["metrics"] == {"cola": {"matthews": 0.5}} and found["seed"] == 1


def test_finished_jobs_are_not_rerun(out):
    run(out)
    before = started(out)
    assert run(out) == dict.fromkeys(ALL, "finished")
    assert started(out) == before


def test_jobs_with_other_settings_or_without_a_whole_result_are_rerun(out):
    run(out)
    first = len(started(out))
    run(out, "tasks.cola.lr=1.0e-3")
    assert set(started(out)[first:]) == {"cola-seed1", "cola-seed2"}
    run(out)
    (out / "cola-seed1" / "result.json").write_text('{"status": "finished"')
    (out / "cola-seed2" / "result.json").unlink()
    again = len(started(out))
    run(out)
    assert set(started(out)[again:]) == {"cola-seed1", "cola-seed2"}


def test_another_mnli_model_renews_what_started_from_it(out):
    run(out)
    first = len(started(out))
    run(out, "tasks.mnli.lr=1.0e-3")
    assert set(started(out)[first:]) == {"mnli-seed19", "rte-seed1", "mrpc-seed1", "stsb-seed1"}


def test_a_changed_checkpoint_renews_all(out, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text("{}")
    sweep = load_sweep(CONFIG, [*FEW, f"start={start}"])
    before = {job.name: job.hash for job in plan(sweep, out)}
    assert before == {job.name: job.hash for job in plan(sweep, out / "elsewhere")}
    (start / "config.json").write_text("{ }")
    after = {job.name: job.hash for job in plan(sweep, out)}
    assert set(before) == ALL and all(before[name] != after[name] for name in ALL)


def test_a_crash_is_reported_and_the_rest_goes_on(out, caplog):
    behave(out, {"cola-seed2": {"crash": "the loss is nan"}, "sst2-seed1": {"mute": True}})
    with caplog.at_level(logging.INFO, "m2_plugin"):
        statuses = run(out)
    assert {name for name, status in statuses.items() if status != "finished"} == {
        "cola-seed2", "sst2-seed1",
    }  # fmt: skip
    crashed = result(out, "cola-seed2")
    assert crashed["status"] == "failed" and crashed["problem"] == "exit code 1"
    assert crashed["error"] == "RuntimeError: the loss is nan"
    assert "about to fail" in crashed["log_tail"]
    assert "cola-seed2 FAILED" in caplog.text and "about to fail" in caplog.text
    assert "it ended without metrics: there is no" in result(out, "sst2-seed1")["problem"]
    table = to_text(load_report(out))
    assert "failed: seed 2" in table and "RuntimeError: the loss is nan" in table

    behave(out, {})
    first = len(started(out))
    assert set(run(out).values()) == {"finished"}
    assert set(started(out)[first:]) == {"cola-seed2", "sst2-seed1"}


def test_settings_that_are_refused_are_refused_once(out):
    """The jobs share them: the other jobs would end in the same way, each after its start."""
    why = "the tokenizer 'a' has another vocabulary"
    behave(out, {name: {"refused": why} for name in ALL})
    statuses = run(out, jobs=1)
    assert len(started(out)) == 1
    name = started(out)[0]
    assert statuses.pop(name) == "failed" and set(statuses.values()) == {"blocked"}
    assert result(out, name)["error"].endswith(f"ConfigError: {why}")
    assert result(out, "cola-seed2")["problem"] == f"the settings of {name} were refused"
    behave(out, {})
    assert set(run(out).values()) == {"finished"}


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (["Traceback", "ValueError: no", "ERROR:composer.cli:done"], "ValueError: no"),
        (["[rank0]: torch.OutOfMemoryError: none left"], "torch.OutOfMemoryError: none left"),
        (["KeyError: 'a'", "During handling", "RuntimeError: b"], "RuntimeError: b"),
        (["Killed"], "Killed"),
        ([], ""),
    ],
)
def test_the_error_is_the_exceptions_line(tail, error):
    assert _last_error(tail) == error


def test_tasks_that_start_from_a_failed_mnli_are_blocked(out):
    behave(out, {"mnli-seed19": {"crash": "no memory"}})
    statuses = run(out)
    blocked = {name for name, status in statuses.items() if status == "blocked"}
    assert blocked == {"rte-seed1", "mrpc-seed1", "stsb-seed1"}
    assert statuses["cola-seed1"] == "finished"
    assert not blocked & set(started(out))
    assert result(out, "rte-seed1")["problem"] == "it starts from mnli-seed19, which failed"
    table = to_text(load_report(out))
    assert table.count("blocked") >= 3 and "incomplete: 4 of 8 tasks" in table


def test_a_job_that_is_killed_is_a_failed_one(out):
    behave(out, {"cola-seed1": {"kill": signal.SIGKILL}})
    statuses = run(out)
    assert statuses["cola-seed1"] == "failed" and statuses["qqp-seed19"] == "finished"
    assert result(out, "cola-seed1")["problem"] == "killed by SIGKILL"


# --- choosing ------------------------------------------------------------------------------------


def test_tasks_and_seeds_choose(out):
    assert set(run(out, tasks=["cola"], seeds=[2])) == {"cola-seed2"}
    assert started(out) == ["cola-seed2"]
    assert set(run(out, tasks=["cola", "sst2"])) == {"cola-seed1", "cola-seed2", "sst2-seed1"}
    assert started(out).count("cola-seed2") == 1
    text = to_text(load_report(out))
    assert "2/2" in text and "not run" in text and "incomplete: 2 of 8 tasks" in text


def test_a_task_from_mnli_needs_its_model(out):
    with pytest.raises(ValueError, match=r"rte start from the MNLI model.*mnli_checkpoint="):
        run(out, tasks=["rte"])
    assert not started(out) and not (out / "plan.json").exists()
    run(out, tasks=["mnli"])
    assert run(out, tasks=["rte"]) == {"rte-seed1": "finished"}
    assert started(out) == ["mnli-seed19", "rte-seed1"]


def test_an_explicit_mnli_checkpoint_frees_from_waiting(out):
    model = out / "mnli"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert run(out, f"mnli_checkpoint={model}", tasks=["rte"]) == {"rte-seed1": "finished"}
    assert result(out, "rte-seed1")["start"] == str(model)
    sweep = load_sweep(CONFIG, [*FEW, f"mnli_checkpoint={model}"])
    assert not any(job.keeps_model or job.needs for job in plan(sweep, out))


@pytest.mark.parametrize(
    "override",
    [
        "start=./gone",
        "start=gone.pt",
        "mnli_checkpoint=/gone/final",
        "variables.glue_path=gone",
        "variables.tokenizer=./gone",
    ],
)
def test_what_no_job_would_find_is_named_at_once(out, override):
    key, value = override.split("=")
    with pytest.raises(ValueError, match=f"{key}: '{value}' does not exist"):
        run(out, override)
    assert not started(out)


def test_a_sweep_without_a_checkpoint_is_refused(out):
    with pytest.raises(ValueError, match="start is missing: give --start FOLDER.*pretrained=false"):
        run(out, "model.pretrained=null", tasks=["cola"])
    assert not started(out) and not (out / "plan.json").exists()
    model = out / "mnli"  # what a task from MNLI starts from is enough
    model.mkdir()
    (model / "config.json").write_text("{}")
    run(out, "model.pretrained=null", f"mnli_checkpoint={model}", tasks=["rte"])
    assert started(out) == ["rte-seed1"]


def test_bad_choices_are_named(out):
    jobs = plan(load_sweep(CONFIG, FEW), out)
    with pytest.raises(ValueError, match="no GLUE task 'colla'. Did you mean 'cola'"):
        select(jobs, ["colla"], None)
    with pytest.raises(ValueError, match="'wnli' is not in this sweep"):
        select(jobs, ["wnli"], None)
    with pytest.raises(ValueError, match=r"no task of this sweep has seed 5.*tasks\.TASK\.seeds"):
        select(jobs, None, [5])
    with pytest.raises(ValueError, match="No job of this sweep"):
        select(jobs, ["mnli"], [2])
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        run(out, jobs=0)


# --- devices -------------------------------------------------------------------------------------


def test_as_many_jobs_as_gpus_or_as_the_cores_allow(monkeypatch):
    assert local_jobs(["2", "5"], None) == (2, {}) and local_jobs(["0"], 3) == (3, {})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local_jobs([], 2) == (2, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"})
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for jobs, count, threads in [(None, 2, "4"), (1, 1, "8"), (3, 3, "2")]:
        found = local_jobs([], jobs)
        assert found == (count, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads})


def test_a_job_sees_the_gpu_of_its_worker(out, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    job = plan(load_sweep(CONFIG, FEW), out)[0]
    assert run_job(job, fake.PROGRAM, environment={"OMP_NUM_THREADS": "5"})["status"] == "finished"
    assert all(line.endswith("threads=5 gpus=7") for line in journal(out))


def test_each_local_worker_sees_one_gpu(out):
    behave(out, {"cola-seed1": {"sleep": 2}, "cola-seed2": {"sleep": 2}})
    run(out, gpus=["7", "9"], jobs=2, tasks=["cola"])
    seen = {line.split()[1]: line.split("gpus=")[1] for line in journal(out)}
    assert sorted(seen.values()) == ["7", "9"]


def test_a_cpu_gets_fp32_and_a_gpu_what_the_recipe_says(out):
    sweep = load_sweep(CONFIG, FEW)
    assert {job.config["precision"] for job in plan(sweep, out, on_cpu=True)} == {"fp32"}
    on_gpu = {job.task: job.config["precision"] for job in plan(sweep, out)}
    assert on_gpu.pop("stsb") == "fp32" and set(on_gpu.values()) == {"amp_bf16"}


def test_a_job_predicts_its_test_splits_and_keeps_no_checkpoint(out):
    jobs = {job.name: job.config for job in plan(load_sweep(CONFIG, FEW), out)}
    predict = jobs["mnli-seed19"]["callbacks"]["eval_results"]["predict"]
    assert [p["label"] for p in predict] == ["mnli_matched", "mnli_mismatched", "ax"]
    assert [p["dataset"]["task"] for p in predict] == ["mnli", "mnli", "ax"]
    assert all(p["dataset"]["on_error"] == "raise" for p in predict)
    assert "save_folder" not in jobs["mnli-seed19"] and "autoresume" not in jobs["mnli-seed19"]
    assert "hf_checkpointer" in jobs["mnli-seed19"]["callbacks"]
    assert "hf_checkpointer" not in jobs["cola-seed1"]["callbacks"]
    sweep = load_sweep(CONFIG, [*FEW, "predict=false", "keep_models=true"])
    other = {job.name: job for job in plan(sweep, out)}
    assert "predict" not in other["cola-seed1"].config["callbacks"]["eval_results"]
    assert all(job.keeps_model for job in other.values())


# --- being stopped -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_sweep_ends_its_jobs_and_goes_on_without_repeating(out, name, unbroken):
    behave(out, LONG)
    process = launch(out)
    wait_until_halfway(out, process)
    # The jobs, their children, and what ends them with their worker.
    assert soon(lambda: running(out) == 6)
    os.kill(process.pid, getattr(signal, name))  # the sweep alone, which is to end its jobs
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0, output
    assert soon(lambda: running(out) == 0)
    done = {path.parent.name for path in out.glob("*/result.json")}
    assert done == {"mnli-seed19", "qqp-seed19", "qnli-seed19"}

    behave(out, {})
    finish(out, launch(out), unbroken, again=dict.fromkeys(LONG, 1))


def test_a_killed_worker_ends_its_job(out, unbroken):
    behave(out, LONG)
    process = launch(out)
    wait_until_halfway(out, process)
    os.kill(int((out / "cola-seed1" / "worker").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "a worker process ended unexpectedly" in output
    assert "Traceback" not in output
    assert soon(lambda: running(out) == 0)

    behave(out, {})
    finish(out, launch(out), unbroken, again=dict.fromkeys(LONG, 1))


def test_a_job_runs_once_at_a_time(out):
    """Two workers have the same job: a cluster has lost sight of one of them."""
    behave(out, {"mnli-seed19": {"sleep": 0.5}})
    job = plan(load_sweep(CONFIG, FEW), out)[0]
    with open_workers(2) as workers:
        first, second = workers.run(partial(run_job, program=fake.PROGRAM), [job, job])
    assert first == second and first["status"] == "finished"
    assert started(out) == ["mnli-seed19"] and not list(out.rglob(".*"))


def test_a_folder_that_a_worker_does_not_see(out):
    job = plan(load_sweep(CONFIG, FEW), out / "elsewhere")[0]
    with pytest.raises(ValueError, match=r"elsewhere' does not exist on .*same paths"):
        run_job(job, fake.PROGRAM)


def test_two_sweeps_do_not_share_a_folder(out):
    behave(out, {"mnli-seed19": {"sleep": 60}})
    process = launch(out)
    try:
        wait_for(lambda: "mnli-seed19" in started(out), process)
        message = rf"plan.json' is being written by another process: process {process.pid}"
        with pytest.raises(ValueError, match=message):
            run(out)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
