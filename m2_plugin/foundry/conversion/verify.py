"""Check a finished folder: sizes, hashes and counts."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2_plugin.data.formats import DataError, is_remote
from m2_plugin.executor import Workers
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import (
    MANIFEST,
    content_digest,
    partial_folder,
    read_manifest,
    shard_digests,
)
from m2_plugin.foundry.conversion.job import FORMAT_VERSION
from m2_plugin.foundry.conversion.remote import at_hand
from m2_plugin.foundry.mds_index import (
    INDEX,
    ShardError,
    check_hashes,
    check_size,
    read_index,
    shard_file,
)

log = logging.getLogger(__name__)


def _check_shard(task: tuple[str, dict[str, Any]]) -> str | None:
    """Return what is wrong with a shard, or None."""
    place, entry = task
    name = shard_file(entry)["basename"]
    shown = f"{place}/{name}"
    path = Path(shown)
    try:
        with at_hand(place, name) as path:
            _check_file(path, entry)
    except Exception as error:  # decoding a broken file can raise anything
        text = str(error) if isinstance(error, ShardError | DataError) else f"{path}: {error}"
        return text.replace(str(path), shown)  # a downloaded file has another name
    return None


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    from streaming.base.compression import decompress
    from streaming.base.hashing import get_hash

    info = shard_file(entry)
    check_size(path, info)
    data = path.read_bytes()
    check_hashes(path, data, info, info["hashes"], get_hash)
    if entry["zip_data"]:
        data = decompress(entry["compression"], data)
        raw = entry["raw_data"]
        check_hashes(path, data, raw, raw["hashes"], get_hash)
    count = int.from_bytes(data[:4], "little")  # how an MDS shard begins
    if count != entry["samples"]:
        raise ShardError(f"{path}: {count} samples, the index says {entry['samples']}")


def _check_manifest(place: str, entries: list[dict[str, Any]]) -> list[str]:
    manifest = None
    with suppress(DataError), at_hand(place, MANIFEST) as path:  # a URL without one
        manifest = read_manifest(path.parent)
    if manifest is None or manifest["settings"]["format_version"] != FORMAT_VERSION:
        log.warning("%s has no manifest of this version: only its index is compared", place)
        return []
    problems = []
    samples = sum(entry["samples"] for entry in entries)
    if samples != manifest["samples"]:
        problems.append(
            f"{place}/{INDEX}: {samples} samples, the conversion wrote {manifest['samples']}"
        )
    if shard_digests(entries) != manifest["shards"]:
        problems.append(f"{place}/{INDEX}: its shards are not those that the conversion wrote")
    if content_digest(manifest["shards"]) != manifest["content_digest"]:
        problems.append(f"{place}: the manifest's digest does not match its shards")
    return problems


def _read_index(place: str) -> list[dict[str, Any]]:
    if is_remote(place):
        with at_hand(place, INDEX) as path:
            return read_index(path.parent)
    partial = partial_folder(Path(place))
    return read_index(place, ": its conversion is not finished" if partial.exists() else "")


def verify(place: str, workers: Workers) -> int:
    """Read all shards of a split and compare them with its index and manifest.

    Args:
        place: The folder of a split, or its URL, from this program, or any MDS folder.
        workers: What reads the shards.

    Returns:
        The number of samples.

    Raises:
        ValueError: If anything differs; the message names every damaged shard.
        OSError: If the storage of a URL does not answer.
        WorkersError: If a worker died.
    """
    entries = _read_index(place)
    results = workers.run(_check_shard, [(place, entry) for entry in entries])
    bar = tqdm(results, f"verify {Path(place).name}", len(entries), unit="shards")
    problems = _check_manifest(place, entries) + sorted(filter(None, bar))
    if problems:
        raise ConversionError(f"{place} is damaged: {'; '.join(problems)}")
    samples = sum(entry["samples"] for entry in entries)
    log.info("%s: %d samples in %d shards are as written", place, samples, len(entries))
    return int(samples)
