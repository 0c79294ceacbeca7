"""The folder of a split during its conversion.

    out_root/.train.partial/
        lock                       held by the command that runs
        settings.json              the settings; only the same settings can continue
        shards-DIGEST/             renamed to out_root/train at the end
        records-DIGEST/            DIGEST is that of the settings
            00000-00012.json       exists if block 12 of stream 0 is finished: its index entries
            00000.ended            exists if stream 0 was read to its end

A record gets its final name after its shards. So any process may be killed at any point, and two
may write the same block. A worker of another run cannot write into this one, because of the digest.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2_plugin.files import lock, read_json, write_atomically, write_json
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.job import digest
from m2_plugin.foundry.mds_index import INDEX, is_whole, shard_file

# Not *.json: Streaming's merge_index takes every .json below a folder for an index.
MANIFEST = "conversion.manifest"

Key = tuple[int, int]  # (stream, block)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished folder; None if this program did not write the folder."""
    return read_json(folder / MANIFEST, missing_ok=True)


def finished_samples(folder: Path, settings: dict[str, Any]) -> int | None:
    """Return the samples of a finished split; None if the folder is missing or empty.

    Raises:
        ConversionError: If the folder has other settings or content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    return check_manifest(folder, read_manifest(folder), settings)


def check_manifest(
    place: Path | str, manifest: dict[str, Any] | None, settings: Mapping[str, Any]
) -> int | None:
    """Return the samples in the manifest of a split; None if it is not finished.

    Raises:
        ConversionError: If it is missing, or has other settings.
    """
    if manifest is None:
        raise ConversionError(
            f"{place} exists, is not empty, and was not written by this program. Choose another "
            "--out_root, or pass --overwrite to remove it"
        )
    if changed := differences(manifest["settings"], settings):
        raise ConversionError(
            f"{place} has a split with other settings ({changed}). Choose another --out_root, "
            "or pass --overwrite to convert again"
        )
    return manifest.get("samples")


def shard_digests(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Return name → hash of the uncompressed shard for entries of an index."""
    return {
        shard_file(entry)["basename"]: entry["raw_data"]["hashes"].get("xxh64") for entry in entries
    }


def content_digest(digests: dict[str, str]) -> str:
    """Combine the digests of all shards, in order."""
    return hashlib.sha256("".join(f"{d}\n" for d in digests.values()).encode()).hexdigest()


def write_index(folder: Path, entries: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Write the manifest and the index of a folder that has all its shards."""
    digests = shard_digests(entries)
    manifest = manifest | {"content_digest": content_digest(digests), "shards": digests}
    write_json(folder / MANIFEST, manifest, indent=None)
    write_json(folder / INDEX, {"version": 2, "shards": entries}, indent=None)


@dataclass(frozen=True)
class Blocks:
    """The shards and records of the blocks that are finished; workers and the main process use it.

    Args:
        partial: The partial folder.
        digest: The digest of the settings.
    """

    partial: Path
    digest: str

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.partial / f"shards-{self.digest}"

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.partial / f"records-{self.digest}"

    def create(self) -> None:
        """Create the folders; remove what killed processes were writing."""
        for path in (self.shards, self.records):
            path.mkdir(exist_ok=True)
            for unfinished in path.glob(".*"):
                _remove(unfinished)

    def _record(self, key: Key) -> Path:
        return self.records / f"{key[0]:05}-{key[1]:05}.json"

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Write the record of a block whose shards are written; from now on it counts."""
        write_json(self._record(key), record, indent=None)

    def find(self, key: Key) -> dict[str, Any] | None:
        """Return the record of a block, or None if it is not finished."""
        try:
            record: dict[str, Any] = json.loads(self._record(key).read_text())
        except FileNotFoundError:
            return None
        whole = all(
            is_whole(self.shards / shard_file(entry)["basename"], shard_file(entry))
            for entry in record["shards"]
        )
        return record if whole else None

    def finished(self) -> list[Key]:
        """Return the keys of all records, in order."""
        names = [name[:-5] for name in os.listdir(self.records) if name.endswith(".json")]
        return sorted((int(n[:5]), int(n[6:])) for n in names if not n.startswith("."))

    def samples_before(self, key: Key) -> int:
        """Count the samples in the finished blocks before a block."""
        records = [self.find(before) for before in self.finished() if before < key]
        return sum(record["samples"] for record in records if record is not None)

    def end(self, stream: int, blocks: int) -> None:
        """Note that a stream was read to its end, and how many blocks it has."""
        write_atomically(self.records / f"{stream:05}.ended", str(blocks))

    def has_all(self, stream: int) -> bool:
        """Return whether a stream was read to its end, and all its blocks are finished."""
        path = self.records / f"{stream:05}.ended"
        if not path.exists():
            return False
        return all(self.find((stream, block)) for block in range(int(path.read_text())))


def _remove(path: Path) -> None:
    """Remove a file, or the folder in which a killed process was writing one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def partial_folder(final: Path) -> Path:
    """Return the folder of a split while it is converted."""
    return final.with_name(f".{final.name}.partial")


class PartialFolder:
    """The partial folder of one split, for the main process.

    Args:
        final: The final folder of the split.
    """

    def __init__(self, final: Path):
        self.final = final
        self.path = partial_folder(final)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it; wait while another command converts this split.

        If an error comes before a block is finished, the folder is removed.
        """
        what = f"{self.path} is in use by another conversion"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                held = lock(self.path / "lock", what, "give another --out_root", wait=math.inf)
                break
            except FileNotFoundError:  # the other one has just finished, and removed the folder
                continue
        try:
            yield
        except BaseException:
            if not any(self.path.glob("records-*/*.json")):
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            if held is not None:
                held.close()

    def open(self, settings: dict[str, Any]) -> Blocks:
        """Begin a conversion or continue it.

        Raises:
            ConversionError: If it was begun with other settings.
        """
        path = self.path / "settings.json"
        found = json.loads(path.read_text()) if path.exists() else settings
        if changed := differences(found, settings):
            raise ConversionError(
                f"{self.path} has an unfinished conversion with other settings ({changed}). Run "
                "its command again to finish it, or pass --overwrite to remove it"
            )
        blocks = Blocks(self.path, digest(found))
        write_json(path, found, indent=None)
        blocks.create()
        return blocks

    def finish(
        self, blocks: Blocks, entries: list[dict[str, Any]], manifest: dict[str, Any]
    ) -> None:
        """Write the index and the manifest, and give the split its name."""
        names = shard_digests(entries).keys()
        for path in blocks.shards.iterdir():
            if path.name not in names:  # a part of a killed run, or a block too many
                _remove(path)
        write_index(blocks.shards, entries, manifest)
        os.replace(blocks.shards, self.final)
        self.clean()

    def clean(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.path)

    def remove(self) -> None:
        """Remove the split, finished or not; the lock stays."""
        if self.final.exists():
            shutil.rmtree(self.final)
        (self.path / "settings.json").unlink(missing_ok=True)
        for path in self.path.glob("*-*"):
            shutil.rmtree(path)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Describe the settings that differ."""
    changed = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old != new:
            short = len(f"{old}{new}") < 80
            changed.append(f"{key}: {old!r} before, {new!r} now" if short else f"other {key}")
    return "; ".join(changed)
