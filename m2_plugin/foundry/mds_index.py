"""The index of an MDS folder, and whether its shards are what the index says.

Streaming reads a shard that was cut short as garbage, and compares hashes only after a download.
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
    """A shard that is not what its index says; the message names the file."""


def read_index(folder: str | Path, hint: str = "") -> list[dict[str, Any]]:
    """Read the entries of the shards in a folder's index.

    Args:
        folder: The folder of one split.
        hint: What the message adds if there is no index.

    Raises:
        ValueError: If there is no index, or it cannot be read.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: missing{hint}")
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: empty, corrupt or not an MDS index: {error!r}") from error


def shard_file(entry: Mapping[str, Any], folder: str | Path | None = None) -> dict[str, Any]:
    """Return name, size and hashes of the file that holds a shard: the compressed one if any.

    Args:
        entry: The shard's entry in the index.
        folder: Its folder, where Streaming may have decompressed the shard: that file then counts.
    """
    raw, compressed = entry["raw_data"], entry.get("zip_data")
    if folder is not None and os.path.isfile(os.path.join(folder, raw["basename"])):
        return dict(raw)
    return dict(compressed or raw)


def is_whole(path: str | Path, info: Mapping[str, Any]) -> bool:
    """Whether the file of a shard is there and has its size."""
    return os.path.isfile(path) and os.path.getsize(path) == info["bytes"]


def check_size(path: str | Path, info: Mapping[str, Any]) -> None:
    """Check that the file of a shard is there and has the size in the index.

    Raises:
        ShardError: If not.
    """
    if not os.path.isfile(path):
        raise ShardError(f"{path}: missing, although {INDEX} lists it")
    if not is_whole(path, info):
        raise ShardError(
            f"{path}: {os.path.getsize(path)} bytes, the index says {info['bytes']}: truncated or "
            "altered; write or copy it again"
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
        path: The file's name for the message.
        data: The content.
        info: The file's entry in the index.
        algorithms: The hashes to compare.
        get_hash: Streaming's function of that name.

    Raises:
        ShardError: If a hash differs, or the index does not have it.
    """
    recorded = info.get("hashes") or {}
    for algorithm in algorithms:
        if algorithm not in recorded:
            raise ShardError(
                f"{path}: the index has no {algorithm!r} hash of it, which validate_hash asks for; "
                f"it has {', '.join(sorted(recorded)) or 'none'}"
            )
        if get_hash(algorithm, data) != recorded[algorithm]:
            raise ShardError(f"{path}: its {algorithm} hash is not that of the index: altered")
