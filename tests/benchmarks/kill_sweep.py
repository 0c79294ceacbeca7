"""Kill GLUE sweeps by SIGKILL at random times, and run them again; see kill_commands.py.

A sweep has four jobs, two at a time, each a script in place of llm-foundry that starts a process of
its own: none may live on, and no job that had finished may begin again.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.benchmarks.kill_commands import ROOT, half_written


def start_sweep(work: Path, out: Path) -> "subprocess.Popen[bytes]":
    """Start a sweep that finds a script in the place of llm-foundry."""
    from tests.glue.conftest import CONFIG, FEW

    module = work / "stub" / "llmfoundry" / "cli" / "cli.py"
    if not module.exists():
        module.parent.mkdir(parents=True)
        for folder in (module.parent, module.parents[1]):
            (folder / "__init__.py").touch()
        script = "import pathlib, sys, tests.glue.fake as fake; fake.job(pathlib.Path(sys.argv[2]))"
        module.write_text(script)
    paths = os.pathsep.join([str(work / "stub"), str(ROOT)])
    command = [sys.executable, "-m", "m2_plugin.cli", "glue", "--config", str(CONFIG)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--jobs", "2", "--tasks", "mnli", "rte", "cola", *FEW],
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def check_sweep(work: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill the main process of a sweep some times, and say what went wrong.

    Args:
        work: The folder to work in.
        kills: The number of kills.
        rng: It says when.

    Returns:
        A tally, as of `check`.
    """
    from tests.glue.conftest import ALL, behave, content, running, soon, started

    def prepare(name: str) -> Path:
        out = work / name / "out"
        out.mkdir(parents=True)
        behave(out, {job: {"sleep": 0.2, "child": True} for job in ALL})
        return out

    tally: Counter[str] = Counter()
    first = prepare("unbroken-glue")
    began = time.monotonic()
    assert start_sweep(work, first).wait() == 0
    seconds, unbroken = time.monotonic() - began, content(first)
    for i in range(kills):
        out = prepare(f"killed-glue-{i}")
        process = start_sweep(work, out)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        tally["kills"] += 1
        killed = process.wait() == -signal.SIGKILL
        tally["before the end"] += killed
        if not killed:  # the machine was slower before: aim earlier
            seconds /= 2
        tally["orphans"] += not soon(lambda out=out: not running(out))
        tally["left something hidden"] += bool(list(out.rglob(".*")))
        done = {path.parent.name for path in out.glob("*/result.json")}
        found = {
            name: data
            for name, data in content(out).items()
            if "/." not in f"/{name}" and ("/" not in name or name.split("/")[0] in done)
        }
        tally["half written"] += bool(half_written(found, unbroken, True))
        counts = {job: started(out).count(job) for job in done}
        tally["jobs finished"] += len(done)
        assert start_sweep(work, out).wait() == 0
        tally["repeated"] += sum(started(out).count(job) != counts[job] for job in done)
        tally["different"] += bool(half_written(content(out), unbroken, False))
        tally["hidden after the rerun"] += bool(list(out.parent.rglob(".*")))
        tally["orphans"] += not soon(lambda out=out: not running(out))
    return dict(tally)
