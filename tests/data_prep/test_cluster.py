"""Conversion on a Dask cluster of two workers."""

import gzip
import os
import signal
import subprocess
import sys

import pytest

from m2_plugin.foundry.conversion import cli

from .conftest import TOKENIZER, content, finished_shards, shards, start, wait_for, write_jsonl

pytest.importorskip("distributed")

TOKENS = ["--concat_tokens", "64", "--tokenizer", str(TOKENIZER)]


@pytest.fixture
def cluster(tmp_path):
    """The scheduler's file, and the two worker processes."""
    file = tmp_path / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def dask(*arguments):
        command = [sys.executable, "-m", *arguments, "--scheduler-file", str(file)]
        command += ["--host", "127.0.0.1", "--no-dashboard"]
        with (tmp_path / "dask.log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    processes = [dask("distributed.cli.dask_scheduler", "--port", "0", "--dashboard-address", ":0")]
    try:
        wait_for(lambda: file.exists() or processes[0].poll() is not None)
        assert file.exists(), (tmp_path / "dask.log").read_text()
        worker = ("distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny")
        processes += [dask(*worker, "--local-directory", str(tmp_path)) for _ in range(2)]
        yield file, processes[1:]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def arguments(out, source, *flags):
    return ["--out_root", str(out), "--splits", "train", "--local_files", str(source), *flags]


@pytest.mark.usefixtures("small_blocks")
def test_the_same_bytes_as_on_this_machine(tmp_path, cluster, jsonl):
    file, _ = cluster
    packed = jsonl.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    for i, (source, flags) in enumerate([(jsonl, []), (jsonl, TOKENS), (packed, TOKENS)]):
        here, there = tmp_path / f"here{i}", tmp_path / f"there{i}"
        assert cli.main_text([*arguments(here, source, *flags), "--num_workers", "2"]) == 0
        assert cli.main_text([*arguments(there, source, *flags), "--cluster", str(file)]) == 0
        assert content(here) == content(there)


@pytest.mark.usefixtures("small_blocks")
def test_a_bad_line_is_named(tmp_path, cluster, jsonl, caplog):
    file, _ = cluster
    with jsonl.open("a") as lines:
        lines.write("{\n")
    out = tmp_path / "out"
    assert cli.main_text([*arguments(out, jsonl), "--cluster", str(file)]) == 1
    assert f"{jsonl}:201: not JSON" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.usefixtures("small_blocks")
def test_a_worker_is_killed(tmp_path, cluster, c4_texts):
    """Dask gives its task to the other worker, which repeats nothing that was whole."""
    file, workers = cluster
    source = write_jsonl(tmp_path / "input" / "many.jsonl", c4_texts * 3)
    assert cli.main_text(arguments(tmp_path / "unbroken", source, *TOKENS)) == 0
    out = tmp_path / "out"
    process = start(*arguments(out, source, *TOKENS, "--cluster", str(file)))
    wait_for(lambda: len(list(out.glob(".train.partial/records-*/0*.json"))) >= 3)
    workers[0].send_signal(signal.SIGKILL)
    finished = finished_shards(out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(finished) >= 3
    assert content(out) == content(tmp_path / "unbroken")
    assert finished.items() <= shards(out / "train").items()
