"""Imports run one way: foundry → models → layers → ops → torch, triton."""

import ast
from pathlib import Path

import pytest

import m2_plugin

PACKAGE = Path(m2_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ["ops", "layers", "models", "foundry"]  # each may import those before it
HOST = {"llmfoundry", "composer", "streaming"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room not in ROOMS:
        return
    names = imported(path)
    later = {f"m2_plugin.{r}" for r in ROOMS[ROOMS.index(room) + 1 :]}
    assert not {n for n in names if ".".join(n.split(".")[:2]) in later}
    if room != "foundry":
        assert not {n.split(".")[0] for n in names} & HOST
    if room in ("ops", "layers"):
        assert not {n.split(".")[0] for n in names} & {"transformers"}


def test_every_room_is_walked():
    assert {p.relative_to(PACKAGE).parts[0] for p in FILES} >= set(ROOMS)
