"""Faults during a run: the message names the cause, and nothing is lost.

Each run is a small version of the quickstart's, by llm-foundry's `train` in its own process. Most
runs start again after their fault, and must then end like the unbroken run, bit for bit.
"""

import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.kill import (
    BATCHES,
    RESUMING,
    checkpoints,
    config,
    differences,
    free_port,
    kill_when,
    new_checkpoint,
    result,
    resumes_from,
    start,
    wait,
    wait_for,
)

pytestmark = pytest.mark.slow

FIRST = "ep0-ba6-rank0.pt"


class Run:
    """A run: its folder, and methods that start it."""

    def __init__(self, out: Path, mds: Path, keys: dict[str, Any] | None = None):
        self.config = config(out, mds, keys)
        self.folder, self.file = out / "run", out / "log.txt"
        out.mkdir(exist_ok=True)

    def start(self, **rank: int) -> Any:
        self.begin = self.file.stat().st_size if self.file.exists() else 0
        return start(self.config, self.file, **rank)

    def start_ranks(self, size: int) -> list[Any]:
        port = free_port()
        return [self.start(rank=rank, size=size, port=port) for rank in range(size)]

    def fails(self) -> str:
        """Start it, expect an error, and return what it wrote."""
        assert wait(self.start()) == 1, self.log()
        return self.log()

    def ends(self) -> dict[str, Any]:
        """Start it, expect success, and return the files."""
        assert wait(self.start()) == 0, self.log()
        return result(self.folder)

    @contextmanager
    def stopped_at_first_checkpoint(self) -> Iterator[Any]:
        """Start it, and hold it there for as long as the context lasts."""
        process = self.start()
        link = self.folder / "latest-rank0.pt"
        before = os.readlink(link) if link.is_symlink() else None
        moved = lambda: link.is_symlink() and os.readlink(link) != before  # noqa: E731
        assert wait_for(process, moved), self.log()
        os.kill(process.pid, signal.SIGSTOP)
        yield process
        os.kill(process.pid, signal.SIGCONT)

    def log(self) -> str:
        """What the last start wrote."""
        return self.file.read_text()[self.begin :]


@pytest.fixture(scope="module")
def unbroken(mds, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("unbroken"), mds, {"save_num_checkpoints_to_keep": -1})
    run.ends()
    return run


@pytest.fixture(scope="module")
def whole(unbroken) -> dict[str, Any]:
    return result(unbroken.folder) | {
        "kept": [unbroken.folder.joinpath("latest-rank0.pt").readlink().name]
    }


def assert_same(left: dict[str, Any], whole: dict[str, Any]) -> None:
    assert not list(differences(left, whole))


def test_sigkill(mds, whole, tmp_path):
    """Once soon after a checkpoint, once while the next one is written."""
    run = Run(tmp_path, mds)
    link = run.folder / "latest-rank0.pt"
    assert kill_when(run.start(), link.is_symlink, delay=random.Random(1).uniform(0, 0.05))
    assert RESUMING not in run.log()
    newest = resumes_from(run.folder)
    assert newest >= 6
    assert kill_when(run.start(), new_checkpoint(run.folder)), run.log()
    assert RESUMING in run.log() and newest <= resumes_from(run.folder) < BATCHES
    assert_same(run.ends(), whole)
    assert RESUMING in run.log()


def test_a_finished_run_has_nothing_to_do(unbroken):
    before = unbroken.folder.joinpath("latest-rank0.pt").stat().st_mtime_ns
    unbroken.ends()
    assert "is finished: its checkpoint is at batch 24 and max_duration is" in unbroken.log()
    assert unbroken.folder.joinpath("latest-rank0.pt").stat().st_mtime_ns == before


def test_the_end_of_another_run_at_load_path_is_no_end_of_this_one(unbroken, mds, tmp_path):
    last = unbroken.folder / f"ep0-ba{BATCHES}-rank0.pt"
    log = Run(tmp_path, mds, {"load_path": str(last)}).fails()
    assert "is less than or equal to the elapsed training duration" in log


def test_nan_loss_ends_the_run(mds, tmp_path):
    log = Run(tmp_path, mds, {"optimizer.lr": 1e30, "save_interval": "1ba"}).fails()
    assert "Train loss contains a NaN" in log
    (kept,) = checkpoints(tmp_path / "run")  # the last one before it
    weights = torch.load(tmp_path / "run" / kept, weights_only=False)["state"]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_that_are_not_finite_are_not_saved(mds, tmp_path):
    # Takes the weights beyond what fp32 holds, after a loss that is finite.
    keys = {"optimizer.weight_decay": 3e38, "scheduler.t_warmup": "0ba", "save_interval": "1ba"}
    log = Run(tmp_path, mds, keys).fails()
    assert "Weights are not finite after batch 1, first in " in log
    assert not checkpoints(tmp_path / "run")


def test_shard_that_goes_missing_or_corrupt(mds, whole, tmp_path):
    copy = tmp_path / mds.name  # the model card names the data
    shutil.copytree(mds, copy)
    run = Run(tmp_path, copy)
    names = [path.name for path in sorted(copy.joinpath("train").glob("*.mds"))]
    with run.stopped_at_first_checkpoint() as process:
        for name in names:
            copy.joinpath("train", name).unlink()
    assert wait(process) == 1
    assert "Samples cannot be read from shard" in run.log()
    log = run.fails()  # still missing at the restart
    assert f"train/{names[0]}: missing, although index.json lists it" in log
    shutil.copytree(mds, copy, dirs_exist_ok=True)
    with run.stopped_at_first_checkpoint() as process:
        for name in names:
            copy.joinpath("train", name).write_bytes(b"\xff" * 100)
    assert wait(process) == 1
    assert "cannot be read from shard" in run.log()
    shutil.copytree(mds, copy, dirs_exist_ok=True)
    assert_same(run.ends(), whole)


def test_full_disk_at_a_checkpoint(mds, whole, tmp_path):
    run = Run(tmp_path, mds)
    with run.stopped_at_first_checkpoint() as process:
        # Files cannot grow beyond it: what a write gets that finds the disk full.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    assert wait(process) == 1
    assert "PytorchStreamWriter" in run.log() or "File too large" in run.log()
    assert torch.load(run.folder / FIRST, weights_only=False)["state"]["timestamp"]
    assert_same(run.ends(), whole)


def test_two_runs_in_one_folder(mds, whole, tmp_path):
    first = Run(tmp_path, mds)
    second = Run(tmp_path, mds)
    second.file = tmp_path / "second.txt"
    with first.stopped_at_first_checkpoint() as process:
        ranks = second.start_ranks(2)  # the one that does not look at the folder ends as well
        assert [wait(rank) for rank in ranks] == [1, 1]
        assert f"run' is in use by another run: process {process.pid} on " in second.log()
    assert wait(process) == 0
    assert_same(result(first.folder), whole)


def test_dead_rank(mds, whole, tmp_path):
    """The other rank ends by itself, and a rerun continues from the last checkpoint."""
    run = Run(tmp_path, mds, {"device_train_microbatch_size": 4})
    ranks = run.start_ranks(2)
    assert wait_for(ranks[0], (run.folder / "latest-rank0.pt").is_symlink), run.log()
    ranks[1].kill()
    assert wait(ranks[0], 120) == 1
    assert "Connection closed by peer" in run.log() or "Connection reset by peer" in run.log()
    assert checkpoints(run.folder) and f"ep0-ba{BATCHES}-rank0.pt" not in checkpoints(run.folder)
    left = run.ends()  # on one process: the same losses
    assert RESUMING in run.log()
    for name, weight in whole["model"].items():
        torch.testing.assert_close(left["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_killed_while_a_sharded_checkpoint_is_written(mds, tmp_path):
    """Both ranks are killed; a rerun continues from the checkpoint before, and counts it."""
    keys = {
        "fsdp_config": {"state_dict_type": "sharded"},
        "device_train_microbatch_size": 4,
        "algorithms.gradient_clipping.clipping_threshold": 1e-3,  # see test_fsdp.py
        "max_duration": "4ba",
        "save_interval": "2ba",
        "eval_interval": "4ba",
    }
    curves = []
    for name in ("unbroken", "killed"):
        run = Run(tmp_path / name, mds, keys)
        if name == "killed":
            ranks = run.start_ranks(2)
            assert wait_for(ranks[0], run.folder.joinpath("ep0-ba4").exists), run.log()
            for process in ranks:
                process.kill()
            assert [wait(process) for process in ranks] == [-signal.SIGKILL] * 2
            assert not run.folder.joinpath("ep0-ba4", ".metadata").exists()
        assert [wait(process) for process in run.start_ranks(2)] == [0, 0], run.log()
        assert (RESUMING in run.log()) == (name == "killed")
        assert {path.name for path in run.folder.glob("ep*")} == {"ep0-ba4"}
        curves.append((run.folder / "loss_curve.csv").read_text())
    assert curves[0] == curves[1]


def test_wrong_checkpoint_at_load_path(mds, unbroken, tmp_path):
    good = unbroken.folder / FIRST
    cut, text = tmp_path / "cut.pt", tmp_path / "text.pt"
    cut.write_bytes(good.read_bytes()[:-1000])
    text.write_text("no checkpoint\n" * 10)
    wider = {"load_path": str(good), "model.config_overrides.hidden_size": 64}
    assert "has another hidden_size of 32" in Run(tmp_path / "a", mds, wider).fails()
    for file in (cut, text):
        log = Run(tmp_path / file.stem, mds, {"load_path": str(file)}).fails()
        assert f"load_path '{file}' is not a whole checkpoint" in log
    sharded = tmp_path / "sharded" / "run" / "ep0-ba4"
    sharded.mkdir(parents=True)
    log = Run(tmp_path / "whole", mds, {"load_path": str(sharded)}).fails()
    assert (
        f"load_path '{sharded}' is a sharded checkpoint, but the checkpoints of this run are files"
        in log
    )
    sharded.with_name("latest-rank0.pt").symlink_to(sharded.name)
    log = Run(tmp_path / "sharded", mds).fails()
    assert f"the checkpoint in save_folder, '{sharded}' is a sharded checkpoint" in log
    none = str(tmp_path / "none.pt")
    log = Run(tmp_path / "none", mds, {"load_path": none}).fails()
    assert "FileNotFoundError" in log and none in log


def test_older_checkpoint_at_load_path(mds, unbroken, whole, tmp_path):
    """A new run begins there; a run that has its own checkpoints continues from them."""
    keys = {"load_path": str(unbroken.folder / FIRST), "save_num_checkpoints_to_keep": -1}
    run = Run(tmp_path, mds, keys)
    left = run.ends()
    assert FIRST not in left["kept"] and len(left["kept"]) == BATCHES // 6 - 1
    assert_same(left | {"kept": whole["kept"]}, whole)
    run.folder.joinpath(f"ep0-ba{BATCHES}-rank0.pt").unlink()
    left = run.ends()
    assert f"Continuing from ep0-ba{BATCHES - 6}-rank0.pt in save_folder" in run.log()
    assert f"not from load_path {keys['load_path']}" in run.log()
    assert_same(left | {"kept": whole["kept"]}, whole)
