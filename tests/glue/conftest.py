"""Sweeps of small scripts, and what they have done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2_plugin.glue.recipes import load_sweep
from m2_plugin.glue.sweep import run_sweep
from tests.glue import fake
from tests.utils import ROOT

CONFIG = ROOT / "yamls" / "finetune" / "glue" / "sweep-m2-bert-base.yaml"
FEW = ["tasks.cola.seeds=[1,2]", "tasks.rte.seeds=[1]", "tasks.mrpc.seeds=[1]"]
FEW += ["tasks.sst2.seeds=[1]", "tasks.stsb.seeds=[1]", "model.pretrained=false"]
FAKES = ("behaviour.json", "journal.txt")  # of fake.py
ALL = {
    "mnli-seed19", "qqp-seed19", "qnli-seed19", "sst2-seed1", "cola-seed1", "cola-seed2",
    "rte-seed1", "mrpc-seed1", "stsb-seed1",
}  # fmt: skip


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    behave(folder, {})
    return folder


def behave(out: Path, behaviour: dict) -> None:
    (out / "behaviour.json").write_text(json.dumps(behaviour))


def run(out: Path, *overrides: str, jobs: int = 3, **kwargs) -> dict[str, str]:
    sweep = load_sweep(CONFIG, [*FEW, *overrides])
    keys = {"jobs": jobs, "gpus": [], "program": fake.PROGRAM} | kwargs
    return run_sweep(sweep, out, **keys)


def journal(out: Path) -> list[str]:
    path = out / "journal.txt"
    return path.read_text().splitlines() if path.exists() else []


def started(out: Path) -> list[str]:
    return [line.split()[1] for line in journal(out) if line.startswith("start ")]


def launch(out: Path, cluster: str = "-") -> subprocess.Popen:
    command = [sys.executable, fake.__file__, "sweep", str(CONFIG), str(out), cluster, *FEW]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def ended(process: subprocess.Popen) -> None:
    """Wait for the end of a sweep; if it hangs, fail with the stacks of its threads."""
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler writes them
        raise AssertionError(process.communicate()[0]) from None


def running(out: Path) -> int:
    """Job processes of this sweep that are alive."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        count += b"job" in words and any(w.startswith(str(out).encode()) for w in words)
    return count


def soon(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def content(out: Path) -> dict[str, bytes]:
    """What jobs and sweep have written, but for times, logs and the names of folders."""
    found = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.is_file() and path.name not in ("log.txt", "worker", *FAKES):
            data = path.read_bytes().replace(str(out).encode(), b"OUT")
            found[name] = re.sub(rb'"seconds": .*', b"", data)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    behave(out, {})
    run(out)
    return content(out)


# The last two jobs of the first ones: the others have ended when both run.
LONG = {job: {"sleep": 60, "child": True} for job in ("sst2-seed1", "cola-seed1")}


def wait_until_halfway(out: Path, process: subprocess.Popen) -> None:
    wait_for(lambda: set(LONG) <= set(started(out)), process)
    wait_for(lambda: (out / "qnli-seed19" / "result.json").exists(), process)


def finish(out: Path, process: subprocess.Popen, unbroken: dict, again: dict[str, int]) -> None:
    """Check that a sweep finishes all, and has begun each job once, and some as often again."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert {job: started(out).count(job) for job in ALL} == {
        job: 1 + again.get(job, 0) for job in ALL
    }
    assert content(out) == unbroken
    assert not list(out.rglob(".*")) and not running(out)
