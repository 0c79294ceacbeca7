"""Check a finished folder: sizes, hashes, samples and counts."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m2_plugin.executor import Workers
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import content_digest, read_manifest, shard_digests
from m2_plugin.foundry.conversion.job import FORMAT_VERSION
from m2_plugin.foundry.mds_index import (
    INDEX,
    ShardError,
    check_hashes,
    check_size,
    read_index,
    shard_file,
)

log = logging.getLogger(__name__)


def _read_samples(data: bytes, entry: dict[str, Any], folder: Path) -> None:
    """Decode all samples of a shard."""
    from streaming.base.format.mds.reader import MDSReader

    count = int(np.frombuffer(data, np.uint32, 1)[0])
    if count != entry["samples"]:
        raise ValueError(f"it has {count} samples, the index says {entry['samples']}")
    offsets = np.frombuffer(data, np.uint32, count + 1, offset=4).astype(np.int64)
    if (np.diff(offsets) < 0).any() or offsets[-1] != len(data):
        raise ValueError("its table of samples does not fit its size")
    reader = MDSReader.from_json(str(folder), None, entry)
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        reader.decode_sample(data[begin:end])


def _check_shard(task: tuple[Path, dict[str, Any]]) -> str | None:
    """Return what is wrong with a shard, or None."""
    from streaming.base.compression import decompress
    from streaming.base.hashing import get_hash

    folder, entry = task
    info = shard_file(entry)
    path = folder / info["basename"]
    try:
        check_size(path, info)
        data = path.read_bytes()
        check_hashes(path, data, info, info["hashes"], get_hash)
        if entry["zip_data"]:
            data = decompress(entry["compression"], data)
            raw = entry["raw_data"]
            check_hashes(path, data, raw, raw["hashes"], get_hash)
        _read_samples(data, entry, folder)
    except ShardError as error:
        return str(error)
    except Exception as error:  # decoding a broken file can raise anything
        return f"{path}: {error}"
    return None


def _check_manifest(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    manifest = read_manifest(folder)
    if manifest is None or manifest["settings"]["format_version"] != FORMAT_VERSION:
        log.warning("%s has no manifest of this version: only its index is compared", folder)
        return []
    problems = []
    samples = sum(entry["samples"] for entry in entries)
    if samples != manifest["samples"]:
        problems.append(
            f"{folder / INDEX}: {samples} samples, the conversion wrote {manifest['samples']}"
        )
    if shard_digests(entries) != manifest["shards"]:
        problems.append(f"{folder / INDEX}: its shards are not those that the conversion wrote")
    if content_digest(manifest["shards"]) != manifest["content_digest"]:
        problems.append(f"{folder}: the manifest's digest does not match its shards")
    return problems


def verify(folder: Path, workers: Workers) -> int:
    """Read all shards of a folder and compare them with its index and manifest.

    Args:
        folder: The folder of a split, from this program, or any MDS folder.
        workers: What reads the shards.

    Returns:
        The number of samples.

    Raises:
        ConversionError: If anything differs; the message names every damaged shard.
        WorkersError: If a worker died.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        entries = read_index(folder, ": its conversion is not finished" if partial.exists() else "")
    except ValueError as error:
        raise ConversionError(str(error)) from error
    results = workers.run(_check_shard, [(folder, entry) for entry in entries])
    bar = tqdm(results, desc=f"verify {folder.name}", unit="shards", total=len(entries))
    problems = _check_manifest(folder, entries) + sorted(filter(None, bar))
    if problems:
        raise ConversionError(f"{folder} is damaged:\n  " + "\n  ".join(problems))
    samples = sum(entry["samples"] for entry in entries)
    log.info("%s: %d samples in %d shards are as written", folder, samples, len(entries))
    return int(samples)
