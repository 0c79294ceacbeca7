"""Re-reading of a finished folder: sizes, hashes, samples, counts."""

import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import INDEX, content_digest, read_manifest
from m2_plugin.foundry.conversion.mds import mds
from m2_plugin.foundry.conversion.worker import samples_digest

log = logging.getLogger(__name__)


def shard_file(entry: dict[str, Any]) -> dict[str, Any]:
    """Return name, size and hashes of the file that holds a shard."""
    return entry["zip_data"] or entry["raw_data"]


def _check_file(data: bytes, info: dict[str, Any]) -> None:
    if len(data) != info["bytes"]:
        raise ValueError(f"{len(data)} bytes, the index says {info['bytes']}")
    for algorithm, wanted in info["hashes"].items():
        if mds().get_hash(algorithm, data) != wanted:
            raise ValueError(f"its {algorithm} is not the one in the index: the content changed")


def _read_samples(data: bytes, entry: dict[str, Any], folder: Path) -> list[Any]:
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    if count != entry["samples"]:
        raise ValueError(f"{count} samples, the index says {entry['samples']}")
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
    if not path.exists():
        return f"{path}: missing"
    try:
        data = path.read_bytes()
        _check_file(data, info)
        if entry["zip_data"]:
            data = mds().decompress(entry["compression"], data)
            _check_file(data, entry["raw_data"])
        samples = _read_samples(data, entry, folder)
        if digest is not None and samples_digest(samples) != digest:
            raise ValueError("its samples are not those of the conversion")
    except Exception as error:  # whatever decoding made of a broken file
        return f"{path}: {error}"
    return None


def _read_index(folder: Path) -> list[dict[str, Any]]:
    path = folder / INDEX
    if not path.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        hint = ": its conversion is not finished" if partial.exists() else ""
        raise ConversionError(f"{path}: missing{hint}")
    try:
        return json.loads(path.read_text())["shards"]
    except (ValueError, KeyError) as error:
        raise ConversionError(f"{path}: not an index of shards ({error!r})") from error


def _check_manifest(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    manifest = read_manifest(folder)
    if manifest is None:
        log.warning("%s has no manifest: checked against its index alone", folder)
        return []
    problems = []
    samples = sum(entry["samples"] for entry in entries)
    if samples != manifest["samples"]:
        problems.append(
            f"{folder / INDEX}: {samples} samples, the conversion wrote {manifest['samples']}"
        )
    if [shard_file(entry)["basename"] for entry in entries] != list(manifest["shards"]):
        problems.append(f"{folder / INDEX}: not the shards that the conversion wrote")
    if content_digest(list(manifest["shards"].values())) != manifest["content_digest"]:
        problems.append(f"{folder}: the manifest's digest is not that of its shards")
    return problems


def verify(folder: Path, num_workers: int | None = None) -> int:
    """Read all shards of a folder again and compare them with its index and manifest.

    Args:
        folder: A split's folder, ours or any other MDS folder of one column.
        num_workers: Processes that read; None takes one for each core.

    Returns:
        The number of samples.

    Raises:
        ConversionError: If anything is wrong; it names every shard.
    """
    entries = _read_index(folder)
    problems = _check_manifest(folder, entries)
    digests = {
        name: shard["digest"]
        for name, shard in ((read_manifest(folder) or {}).get("shards") or {}).items()
    }
    mds()  # imported once, before the fork
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
