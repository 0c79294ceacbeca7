"""Inputs and helpers of the conversion tests."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m2_plugin.cli import run
from m2_plugin.foundry.conversion import cli
from tests import fork_server

QUICKSTART = Path(__file__).parents[2] / "data_prep" / "quickstart"
C4_SAMPLE = QUICKSTART / "c4-sample.json.gz"
TOKENIZER = QUICKSTART / "tokenizer"

# A command that cuts small inputs into many blocks, as it does large ones.
COMMAND = """
import sys
from m2_plugin.cli import run
from m2_plugin.foundry.conversion import cli
cli.choose_block_bytes = lambda *_: 50_000
sys.exit(run("convert-text"))
"""


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Import what takes long in the server that all processes of these tests are forked from."""
    names = ["streaming", "transformers.models.auto.tokenization_auto"]
    names += ["transformers.models.bert.tokenization_bert_fast"]
    fork_server.preload(*names)


class Said:
    """What commands log and write to stderr."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
        caplog.set_level("INFO")
        self.caplog, self.capsys = caplog, capsys
        self._errors = ""

    @property
    def text(self) -> str:
        self._errors += self.capsys.readouterr().err
        return self.caplog.text + self._errors

    def clear(self) -> None:
        self.caplog.clear()
        self.capsys.readouterr()
        self._errors = ""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(caplog, capsys)


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
    monkeypatch.setattr(cli, "choose_block_bytes", lambda *_: 50_000)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def convert_text(*arguments: Any) -> int:
    """Run convert_text.py in this process; return the exit status."""
    return run("convert-text", [str(argument) for argument in arguments])


def convert_c4(*arguments: Any) -> int:
    return run("convert-c4", [str(argument) for argument in arguments])


def convert_pairs(*arguments: Any) -> int:
    return run("convert-pairs", [str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(*arguments: Any, code: str = COMMAND) -> subprocess.Popen[str]:
    """Start a conversion in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the shards in the finished blocks of an unfinished conversion."""
    partial = out / ".train.partial"
    records = [json.loads(path.read_text()) for path in partial.glob("records-*/0*.json")]
    names = {entry["raw_data"]["basename"] for record in records for entry in record["shards"]}
    found = {path.name: path.stat() for path in partial.glob("shards-*/*.mds")}
    return {name: (found[name].st_ino, found[name].st_mtime_ns) for name in names}


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.mds")}
