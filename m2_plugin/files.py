"""Files that are whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["check_writable", "read_json", "whole", "write_atomically", "write_json"]


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


def check_writable(path: Path) -> None:
    """Make the folder of a path, and see that files can be written into it.

    Raises:
        ValueError: If not. What writes tensors says so in its own words, if at all.
    """
    probe = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside a path, which becomes the path if nothing is raised.

    Raises:
        ValueError: If there is something at the path already, or it cannot be written.
    """
    if path.exists():
        raise ValueError(f"{str(path)!r} is there already: give another name, or remove it")
    check_writable(path)
    temporary = _beside(path)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
