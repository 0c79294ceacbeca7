"""Write files that are either complete or absent."""

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
    """Write a file through a temporary one beside it; the folder must exist."""
    folder, name = os.path.split(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, complete or not at all; the folder must exist.

    Args:
        path: The file.
        value: A value that JSON can represent.
        indent: The spaces per level; None writes one line.

    Raises:
        ValueError: If the value contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; return None if it does not exist or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_writable(path: Path) -> None:
    """Create the folder of a path, and check that files can be written there.

    Raises:
        ValueError: If files cannot be written there. The writers of tensors would raise unclear
            errors, or none.
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
    """Yield a temporary path, and rename it to the given path if no exception is raised.

    Raises:
        ValueError: If the path exists already, or cannot be written.
    """
    if path.exists():
        raise ValueError(f"{str(path)!r} exists already: give another name, or remove it")
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
