"""Files that are whole or not there."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_atomically", "write_json"]


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


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all.

    Raises:
        ValueError: For NaN or infinity, which are no JSON.
    """
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; None if the file is not there or is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
