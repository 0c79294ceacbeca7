"""An index: a folder with texts and their vectors. If the making was killed, it goes on."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2_plugin.data.write import write_rows
from m2_plugin.embed import embed_file
from m2_plugin.files import read_json, write_json

__all__ = ["NOTES", "Index", "build_index", "check_notes"]

NOTES, TEXTS, VECTORS = "index.json", "texts.jsonl", "vectors.npy"
# Why an index does not fit, by the key of its notes.
REASONS = {
    "content": "another content of its file",
    "model": "another model",
    "dtype": "another --dtype",
    "text_column": "another --text-column",
    "id_column": "another --id-column",
}


@dataclass(frozen=True)
class Index:
    """A complete index.

    Args:
        folder: The folder: `texts.jsonl` has a line for each row of `vectors.npy`.
        notes: What it was made of.
    """

    folder: Path
    notes: Mapping[str, Any]

    @property
    def vectors(self) -> Path:
        """The file with the vectors, float32 (N, D)."""
        return self.folder / VECTORS

    def read(self, rows: Collection[int]) -> dict[int, tuple[Any, str]]:
        """Return the id and the text of some rows, without the prompt.

        Raises:
            ValueError: If a row is not there.
        """
        found, start = {}, len(self.notes["prompt"])
        with (self.folder / TEXTS).open("rb") as file:
            for row, line in enumerate(file):
                if row in rows:
                    values = json.loads(line)
                    found[row] = values["id"], values["text"][start:]
        if len(found) < len(set(rows)):
            raise ValueError(f"{str(self.folder / TEXTS)!r} has fewer texts than there are vectors")
        return found


def check_notes(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that an index was made of the same things.

    Args:
        folder: The index.
        found: Its notes.
        wanted: The keys to compare, with their values.

    Raises:
        ValueError: If one differs; says how to go on.
    """
    reasons = [REASONS[key] for key in wanted if key in REASONS and wanted[key] != found.get(key)]
    if reasons:
        raise ValueError(
            f"{str(folder)!r} was made with {' and '.join(reasons)}: "
            "give --rebuild to make it anew, or another folder"
        )


def build_index(
    folder: Path,
    rows: Iterable[tuple[Any, str]],
    notes: Mapping[str, Any],
    model: str | Path,
    rebuild: bool = False,
    **run: Any,
) -> Index:
    """Make an index, go on with one that is not complete, or return one that is.

    The caller locks the folder.

    Args:
        folder: The folder.
        rows: The id and the text of each row.
        notes: What it is made of: keys of `REASONS`, and `prompt`, to put before each text.
        model: The model's folder.
        rebuild: Whether to replace an index that was made of something else.
        **run: Arguments of `embed_file`.

    Raises:
        ValueError: If the folder holds another index, or other files; or as `embed_file`.
    """
    found = read_json(folder / NOTES, missing_ok=True)
    if found is not None and not rebuild:
        check_notes(folder, found, notes)
    if found is None or any(found.get(key) != notes[key] for key in notes if key in REASONS):
        _write_texts(folder, rows, notes)
    if not (folder / VECTORS).exists():
        embed_file(folder / TEXTS, model, folder / VECTORS, **run)
    return Index(folder, notes)


def _write_texts(folder: Path, rows: Iterable[tuple[Any, str]], notes: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in (NOTES, TEXTS, VECTORS) and not path.name.startswith("."):
            raise ValueError(f"{str(path)!r} is no part of an index: give another folder")
    for name in (NOTES, VECTORS):  # the notes go first: without them nothing else counts
        (folder / name).unlink(missing_ok=True)
    prompt = notes["prompt"]
    lines = ({"id": name, "text": prompt + text} for name, text in rows)
    write_rows(folder / TEXTS, lines, ["id", "text"])
    write_json(folder / NOTES, dict(notes))
