"""Write MDS shards, byte for byte those of Streaming's `MDSWriter`.

To import `MDSWriter` takes more time than to convert 100 MB of text, and most of a worker's memory,
since it imports all of Streaming, torchvision and scikit-learn. The format is Streaming's public
one; a test compares both.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2_plugin.files import write_atomically
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.mds_index import shard_file

HASH = "xxh64"
SIZE_LIMIT = 1 << 26  # of a shard: the default of `MDSWriter`
_SHAPE_TYPES = ("uint8", "uint16", "uint32")


def encode_array(array: np.ndarray) -> bytes:
    """Encode an array that is not empty, as the encoding `ndarray:DTYPE` does."""
    sizes = np.array(array.shape)
    kind = next(i for i, t in enumerate(_SHAPE_TYPES) if sizes.max() <= np.iinfo(t).max)
    head = bytes([array.ndim << 2 | kind])
    return head + sizes.astype(_SHAPE_TYPES[kind]).tobytes() + array.tobytes()


def check_compression(compression: str | None) -> None:
    """Check the name of a compression.

    Raises:
        ConversionError: If Streaming does not know it.
    """
    if compression is not None:
        from streaming.base.compression import is_compression

        if not is_compression(compression):
            raise ConversionError(f"--compression {compression}: unknown; try zstd or zstd:7")


def write_shards(
    samples: Iterable[Sequence[bytes]],
    columns: Mapping[str, str],
    compression: str | None,
    folder: Path,
    name: str = "shard",
    size_limit: int = SIZE_LIMIT,
) -> list[dict[str, Any]]:
    """Write samples to shards; each file is complete or absent.

    Args:
        samples: The samples, each with the encoded value of every column, sorted by column name.
        columns: Column → encoding, of encodings without a fixed size.
        compression: The compression, such as "zstd" or "zstd:7".
        folder: The folder, which must exist.
        name: How the names of the shards begin.
        size_limit: The bytes of a shard, unless one sample has more.

    Returns:
        The entries of the shards in the index.
    """
    config = {
        "version": 2,
        "format": "mds",
        "compression": compression,
        "hashes": [HASH],
        "size_limit": size_limit,
        "column_names": sorted(columns),
        "column_encodings": [columns[column] for column in sorted(columns)],
        "column_sizes": [None] * len(columns),
    }
    head = json.dumps(config, sort_keys=True).encode()
    entries = []
    for number, rows in enumerate(_groups(samples, size_limit - len(head) - 8)):
        data = _encode_shard(rows, head)
        entry = {"samples": len(rows), "raw_data": _about(f"{name}.{number:05}.mds", data)}
        entry |= {"zip_data": None} | config
        if compression is not None:
            from streaming.base.compression import compress, get_compression_extension

            data = compress(compression, data)
            ending = get_compression_extension(compression)
            entry["zip_data"] = _about(f"{name}.{number:05}.mds.{ending}", data)
        write_atomically(folder / shard_file(entry)["basename"], data)
        entries.append(entry)
    return entries


def _groups(samples: Iterable[Sequence[bytes]], limit: int) -> Iterator[list[bytes]]:
    """Yield the encoded samples of each shard."""
    group: list[bytes] = []
    size = 0
    for values in samples:
        row = np.array([len(v) for v in values], np.uint32).tobytes() + b"".join(values)
        if group and size + len(row) + 4 > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row) + 4
    if group:
        yield group


def _encode_shard(rows: list[bytes], head: bytes) -> bytes:
    first = 4 + 4 * (len(rows) + 1) + len(head)
    offsets = np.fromiter(itertools.accumulate(map(len, rows), initial=first), np.uint32)
    return b"".join([np.uint32(len(rows)).tobytes(), offsets.tobytes(), head, *rows])


def _about(basename: str, data: bytes) -> dict[str, Any]:
    import xxhash

    return {
        "basename": basename,
        "bytes": len(data),
        "hashes": {HASH: xxhash.xxh64_hexdigest(data)},
    }
