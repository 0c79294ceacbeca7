"""A Dask cluster of two worker processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[Path, list["subprocess.Popen[bytes]"]]]:
    """Start a scheduler and two workers; yield the scheduler's file, and the workers."""
    file = folder / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def dask(*arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", *arguments, "--scheduler-file", str(file)]
        command += ["--host", "127.0.0.1", "--no-dashboard"]
        with (folder / "dask.log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    processes = [dask("distributed.cli.dask_scheduler", "--port", "0", "--dashboard-address", ":0")]
    try:
        wait_for(lambda: file.exists() or processes[0].poll() is not None)
        assert file.exists(), (folder / "dask.log").read_text()
        worker = ("distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny")
        processes += [dask(*worker, "--local-directory", str(folder)) for _ in range(2)]
        yield file, processes[1:]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    """The scheduler's file, and the two worker processes."""
    pytest.importorskip("distributed")
    with dask_cluster(tmp_path) as started:
        yield started
