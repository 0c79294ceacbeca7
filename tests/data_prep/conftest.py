"""Inputs and helpers of the conversion tests."""

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2_plugin.foundry.conversion import cli

QUICKSTART = Path(__file__).parents[2] / "data_prep" / "quickstart"
C4_SAMPLE = QUICKSTART / "c4-sample.json.gz"
TOKENIZER = QUICKSTART / "tokenizer"


@pytest.fixture(scope="session")
def c4_texts() -> list[str]:
    with gzip.open(C4_SAMPLE, "rt") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture
def jsonl(tmp_path: Path, c4_texts: list[str]) -> Path:
    """200 documents, 0.4 MB, not compressed."""
    return write_jsonl(tmp_path / "input" / "docs.jsonl", c4_texts[:200])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the small inputs of these tests into many blocks, as large ones are."""
    monkeypatch.setattr(cli, "choose_block_bytes", lambda _: 50_000)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_fork(action: Callable[[], Any]) -> int:
    """Run a function in a forked process; return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    finally:
        os._exit(0)


def kill_when(pid: int, condition: Callable[[], bool], seconds: float = 30) -> None:
    """Kill a forked process as soon as a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
