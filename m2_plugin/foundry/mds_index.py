"""Read the index of an MDS folder, and compare the shards with it.

Streaming reads garbage from a truncated shard, and compares hashes only after a download.
This module imports the standard library only, so that a conversion starts fast.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "INDEX",
    "ShardError",
    "check_hashes",
    "check_size",
    "is_whole",
    "read_index",
    "shard_file",
]

INDEX = "index.json"


class ShardError(ValueError):
    """A shard that differs from its index; the message names the file."""


def read_index(folder: str | Path, hint: str = "") -> list[dict[str, Any]]:
    """Read the entries of the shards in a folder's index.

    Args:
        folder: The folder of one split.
        hint: A text for the end of the message if there is no index.

    Raises:
        ValueError: If there is no index, it cannot be read, names files outside the folder, or has
            a pickled column: reading such a shard would run code in it.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: missing{hint}")
    try:
        entries = list(json.loads(path.read_text(encoding="utf-8"))["shards"])
        for entry in entries:
            _check_entry(entry)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: empty, corrupt or not an MDS index: {error!r}") from error
    for entry in entries:
        columns = zip(entry.get("column_names", []), entry.get("column_encodings", []), strict=True)
        for column, encoding in columns:
            if "pkl" in encoding:
                raise ValueError(
                    f"{path}: column {column!r} is pickled (encoding {encoding!r}), and to read it "
                    f"would run code in the shards: write it as str, bytes or ndarray"
                )
    return entries


def _check_entry(entry: Any) -> None:
    """Check the entry of a shard as far as it is used here."""
    files = [entry["raw_data"], *filter(None, [entry.get("zip_data")])]
    for name in [file["basename"] for file in files]:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"shard {name!r} is not in its folder")
    if not isinstance(entry["samples"], int):
        raise TypeError(f"samples is {entry['samples']!r}")
    names, encodings = entry.get("column_names", []), entry.get("column_encodings", [])
    if len(names) != len(encodings) or not all(isinstance(e, str) for e in encodings):
        raise ValueError("column_names and column_encodings do not fit each other")


def shard_file(entry: Mapping[str, Any], folder: str | Path | None = None) -> dict[str, Any]:
    """Return name, size and hashes of a shard's file: the compressed one if it exists.

    Args:
        entry: The shard's entry in the index.
        folder: The shard's folder. If Streaming decompressed the shard there, the result describes
            the decompressed file.
    """
    raw, compressed = entry["raw_data"], entry.get("zip_data")
    if folder is not None and os.path.isfile(os.path.join(folder, raw["basename"])):
        return dict(raw)
    return dict(compressed or raw)


def is_whole(path: str | Path, info: Mapping[str, Any]) -> bool:
    """Return whether the file of a shard exists and has the size in the index."""
    return os.path.isfile(path) and os.path.getsize(path) == info["bytes"]


def check_size(path: str | Path, info: Mapping[str, Any]) -> None:
    """Check that the file of a shard exists and has the size in the index.

    Raises:
        ShardError: If it does not.
    """
    if not os.path.isfile(path):
        raise ShardError(f"{path}: missing, although {INDEX} lists it")
    if not is_whole(path, info):
        raise ShardError(
            f"{path}: {os.path.getsize(path)} bytes, the index says {info['bytes']}: it is "
            "truncated or altered; write or copy it again"
        )


def check_hashes(
    path: str | Path,
    data: bytes,
    info: Mapping[str, Any],
    algorithms: Iterable[str],
    get_hash: Callable[[str, bytes], str],
) -> None:
    """Check the content of a shard's file.

    Args:
        path: The name of the file for the message.
        data: The content.
        info: The file's entry in the index.
        algorithms: The hashes to compare.
        get_hash: Streaming's function `get_hash`.

    Raises:
        ShardError: If a hash differs, or is not in the index.
    """
    recorded = info.get("hashes") or {}
    for algorithm in algorithms:
        if algorithm not in recorded:
            raise ShardError(
                f"{path}: validate_hash is {algorithm!r}, but the index has no {algorithm!r} hash "
                f"of this file; it has {', '.join(sorted(recorded)) or 'none'}"
            )
        if get_hash(algorithm, data) != recorded[algorithm]:
            raise ShardError(
                f"{path}: its {algorithm} hash is not the one in the index: altered; write or copy "
                "it again"
            )
