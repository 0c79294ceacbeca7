"""The folder of a split during its conversion; it gets its final name when it is complete.

    out_root/.train.partial/        renamed to out_root/train at the end
        settings.json               the settings; only the same settings can continue
        records/00000-00012.json    exists if block 12 of stream 0 is finished: its index entries
        streams/00000.json          the number of blocks in stream 0
        part-00000-00012.00000.mds  the first shard of that block
        tmp/                        shards being written

A record gets its final name after its shards, so the process may be killed at any point.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from m2_plugin.files import write_json
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.mds_index import INDEX, is_whole, shard_file

log = logging.getLogger(__name__)

# Not *.json: Streaming's merge_index takes every .json below a folder for an index.
MANIFEST = "conversion.manifest"
# Workers of a killed run hold the lock until they notice this, at the latest after their block.
LOCK_WAIT_S = 120

Key = tuple[int, int]  # (stream, block)


def content_digest(shards: list[dict[str, Any]]) -> str:
    """Combine the digests of the shards' samples, in order."""
    lines = "".join(f"{shard['samples']} {shard['digest']}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished folder; None if this program did not write the folder."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else None


class PartialFolder:
    """The partial folder of one split.

    Args:
        final: The final folder of the split.
        settings: The settings that determine the output, as JSON.
    """

    def __init__(self, final: Path, settings: dict[str, Any]):
        self.final = final
        self.settings = settings
        self.path = final.with_name(f".{final.name}.partial")
        self.records_path = self.path / "records"
        self.streams_path = self.path / "streams"
        self.tmp_path = self.path / "tmp"
        self.used_records_path = final.with_name(f".{final.name}.records")
        self._lock: int | None = None

    # --- opening ---

    def open(self) -> dict[Key, dict[str, Any]]:
        """Create the folder or continue it; return the records of finished blocks."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_settings()
        if self.is_indexed():  # killed while renaming: nothing is left to write
            return {}
        shutil.rmtree(self.tmp_path, ignore_errors=True)
        for path in (self.records_path, self.streams_path, self.tmp_path):
            path.mkdir(exist_ok=True)
        return self.records()

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.path, os.O_RDONLY)
        deadline = time.monotonic() + LOCK_WAIT_S
        waiting = False
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    log.warning("%s is in use; waiting for its processes to end", self.path)
                waiting = True
            if time.monotonic() > deadline:
                self.close()
                raise ConversionError(f"{self.path} is in use by another conversion")
            time.sleep(0.1)

    def _check_settings(self) -> None:
        path = self.path / "settings.json"
        if not path.exists():
            write_json(path, self.settings, indent=None)
            return
        found = json.loads(path.read_text())
        if found != self.settings:
            changed = differences(found, self.settings)
            raise ConversionError(
                f"{self.path} has an unfinished conversion with other settings ({changed}). Run "
                "its command again to finish it, or pass --overwrite to remove it"
            )

    def records(self) -> dict[Key, dict[str, Any]]:
        """Read the records of the blocks whose shards are complete."""
        records = {}
        for path in sorted(self.records_path.glob("*.json")):
            record = json.loads(path.read_text())
            if self._has_shards(record):
                stream, block = path.stem.split("-")
                records[int(stream), int(block)] = record
        return records

    def _has_shards(self, record: dict[str, Any]) -> bool:
        if self.is_indexed():
            return True
        for shard in record["shards"]:
            if not is_whole(self.path / shard["file"], shard_file(shard["entry"])):
                return False
        return True

    # --- streams ---

    def stream_blocks(self, stream: int) -> int | None:
        """Return the number of blocks in a stream, or None if it is not known yet."""
        path = self.streams_path / f"{stream:05}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def set_stream_blocks(self, stream: int, blocks: int) -> None:
        """Write the number of blocks in a stream, once it was read to its end."""
        write_json(self.streams_path / f"{stream:05}.json", blocks, indent=None)

    # --- finishing ---

    def is_indexed(self) -> bool:
        """Return whether all shards are written, so that only renaming is left."""
        return (self.path / INDEX).exists()

    def finish(self, records: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
        """Write the manifest and the index of all records in order, then publish."""
        shards = [shard for record in records for shard in record["shards"]]
        names = [_rename_entry(shard["entry"], number) for number, shard in enumerate(shards)]
        manifest["shards"] = {
            name: {"samples": shard["samples"], "digest": shard["digest"]}
            for name, shard in zip(names, shards, strict=True)
        }
        write_json(self.path / MANIFEST, manifest, indent=None)
        index = {"version": 2, "shards": [shard["entry"] for shard in shards]}
        write_json(self.path / INDEX, index, indent=None)
        self.publish()

    def publish(self) -> None:
        """Number the shards and rename the folder; safe to repeat after a kill."""
        shards = [
            shard for _, record in sorted(self.records().items()) for shard in record["shards"]
        ]
        for number, shard in enumerate(shards):
            source = self.path / shard["file"]
            if source.exists():
                os.replace(source, self.path / _rename_entry(shard["entry"], number))
        for path in (self.tmp_path, self.streams_path):
            shutil.rmtree(path, ignore_errors=True)
        # Remove the records in one step: from only some of them, a repetition would number wrongly.
        self.clean()
        if self.records_path.exists():
            os.replace(self.records_path, self.used_records_path)
        (self.path / "settings.json").unlink(missing_ok=True)
        for name in (MANIFEST, INDEX, "settings.json"):
            for unfinished in self.path.glob(f".{name}.*"):  # temporary files of a killed write
                unfinished.unlink()
        os.replace(self.path, self.final)
        self.clean()

    def clean(self) -> None:
        """Remove what a kill between the last two steps of `publish` leaves behind."""
        shutil.rmtree(self.used_records_path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the split, finished or not."""
        for path in (self.final, self.path):
            if path.exists():
                shutil.rmtree(path)


def _rename_entry(entry: dict[str, Any], number: int) -> str:
    """Give an index entry its final number; return the name of the shard's file."""
    name = f"shard.{number:05}.mds"
    entry["raw_data"]["basename"] = name
    if not entry["zip_data"]:
        return name
    suffix = entry["zip_data"]["basename"].rpartition(".")[2]
    entry["zip_data"]["basename"] = f"{name}.{suffix}"
    return f"{name}.{suffix}"


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe the settings that differ."""
    changed = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old != new:
            short = len(f"{old}{new}") < 80
            changed.append(f"{key}: {old!r} before, {new!r} now" if short else f"other {key}")
    return "; ".join(changed)
