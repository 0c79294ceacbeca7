"""Files that are whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "whole", "write_atomically", "write_json"]


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it; the folder must be there."""
    folder, name = os.path.split(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: The file; its folder must be there.
        value: What JSON can hold.
        indent: Spaces a level; None for one line, where only programs read it.

    Raises:
        ValueError: For NaN or infinity, which are no JSON.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; None if the file is not there or is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside a path, which becomes the path if nothing is raised.

    Raises:
        ValueError: If there is something at the path already.
    """
    if path.exists():
        raise ValueError(f"{str(path)!r} is there already: give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
