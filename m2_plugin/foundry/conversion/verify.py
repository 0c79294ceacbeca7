"""Check a finished folder: sizes, hashes, samples and counts."""

import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import content_digest, read_manifest
from m2_plugin.foundry.conversion.mds import mds
from m2_plugin.foundry.conversion.worker import samples_digest
from m2_plugin.foundry.mds_index import (
    INDEX,
    ShardError,
    check_hashes,
    check_size,
    read_index,
    shard_file,
)

log = logging.getLogger(__name__)


def _read_samples(data: bytes, entry: dict[str, Any], folder: Path) -> list[Any]:
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    if count != entry["samples"]:
        raise ValueError(f"it has {count} samples, the index says {entry['samples']}")
    offsets = np.frombuffer(data, np.uint32, count + 1, offset=4).astype(np.int64)
    if (np.diff(offsets) < 0).any() or offsets[-1] != len(data):
        raise ValueError("its table of samples does not fit its size")
    reader = mds().MDSReader.from_json(str(folder), None, entry)
    column = entry["column_names"][0]
    bounds = zip(offsets[:-1], offsets[1:], strict=True)
    return [reader.decode_sample(data[begin:end])[column] for begin, end in bounds]


def _check_shard(folder: Path, entry: dict[str, Any], digest: str | None) -> str | None:
    """Return what is wrong with a shard, or None."""
    info = shard_file(entry)
    path = folder / info["basename"]
    try:
        check_size(path, info)
        data = path.read_bytes()
        check_hashes(path, data, info, info["hashes"], mds().get_hash)
        if entry["zip_data"]:
            data = mds().decompress(entry["compression"], data)
            raw = entry["raw_data"]
            check_hashes(path, data, raw, raw["hashes"], mds().get_hash)
        samples = _read_samples(data, entry, folder)
        if digest is not None and samples_digest(samples) != digest:
            raise ValueError("its samples differ from those that the conversion wrote")
    except ShardError as error:
        return str(error)
    except Exception as error:  # decoding a broken file can raise anything
        return f"{path}: {error}"
    return None


def _check_manifest(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    manifest = read_manifest(folder)
    if manifest is None:
        log.warning("%s has no manifest: it is compared with its index only", folder)
        return []
    problems = []
    samples = sum(entry["samples"] for entry in entries)
    if samples != manifest["samples"]:
        problems.append(
            f"{folder / INDEX}: {samples} samples, the conversion wrote {manifest['samples']}"
        )
    if [shard_file(entry)["basename"] for entry in entries] != list(manifest["shards"]):
        problems.append(f"{folder / INDEX}: its shards are not those that the conversion wrote")
    if content_digest(list(manifest["shards"].values())) != manifest["content_digest"]:
        problems.append(f"{folder}: the manifest's digest does not match its shards")
    return problems


def verify(folder: Path, num_workers: int | None = None) -> int:
    """Read all shards of a folder and compare them with its index and manifest.

    Args:
        folder: The folder of a split, from this program, or any MDS folder with one column.
        num_workers: The processes that read; None means one per core.

    Returns:
        The number of samples.

    Raises:
        ConversionError: If anything differs; the message names every damaged shard.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        entries = read_index(folder, ": its conversion is not finished" if partial.exists() else "")
    except ValueError as error:
        raise ConversionError(str(error)) from error
    problems = _check_manifest(folder, entries)
    digests = {
        name: shard["digest"]
        for name, shard in ((read_manifest(folder) or {}).get("shards") or {}).items()
    }
    mds()  # import once, before the fork
    with ProcessPoolExecutor(
        num_workers or len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("fork")
    ) as pool:
        futures = [
            pool.submit(_check_shard, folder, entry, digests.get(shard_file(entry)["basename"]))
            for entry in entries
        ]
        bar = tqdm(futures, desc=f"verify {folder.name}", unit="shards")
        problems += [problem for future in bar if (problem := future.result())]
    if problems:
        raise ConversionError(f"{folder} is damaged:\n  " + "\n  ".join(problems))
    samples = sum(entry["samples"] for entry in entries)
    log.info("%s: %d samples in %d shards are as written", folder, samples, len(entries))
    return int(samples)
