"""Imports run one way: foundry → models → layers → ops → torch, triton."""

import ast
from pathlib import Path

import pytest

import m2_plugin

PACKAGE = Path(m2_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ["ops", "layers", "models", "foundry"]  # each may import those before it
LIGHT = [
    *(PACKAGE / name for name in ("cli.py", "curves.py", "files.py", "recipes.py")),
    *sorted((PACKAGE / "glue").glob("*.py")),
    *sorted((PACKAGE / "train_report").glob("*.py")),
]
HOST = {"llmfoundry", "composer", "streaming"}


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Names of imported modules; of those at the top of the file only, where `at_once`."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
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


@pytest.mark.parametrize("path", LIGHT, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_command_line_starts_light(path):
    """A sweep runs the host in other processes; its own imports neither it nor the models."""
    names = imported(path, at_once=True)
    assert not {n.split(".")[0] for n in names} & {"torch", "transformers", "matplotlib"}
    assert not {".".join(n.split(".")[:2]) for n in names} & {f"m2_plugin.{r}" for r in ROOMS}
    assert not {n.split(".")[0] for n in imported(path)} & HOST


def test_every_room_is_walked():
    assert {p.relative_to(PACKAGE).parts[0] for p in FILES} >= {*ROOMS, "glue", "cli.py"}
