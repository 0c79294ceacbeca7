"""The folder of a split while it is made: nothing has its final name before everything is there.

    out_root/.train.partial/        renamed to out_root/train at the end
        settings.json               what it is made of; another conversion may not go on with it
        records/00000-00012.json    block 12 of lane 0 is finished; holds what the index needs
        lanes/00000.json            how many blocks lane 0 has
        part-00000-00012.00000.mds  its first shard
        tmp/                        shards being written

A record is renamed into place after its shards. A process can be killed between any two steps.
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

# Not *.json: streaming's merge_index takes every .json below a folder for an index.
MANIFEST = "conversion.manifest"
# Orphans of a killed run hold the lock until they notice, at the latest when their block is done.
LOCK_WAIT_S = 120

Key = tuple[int, int]  # (lane, block)


def content_digest(shards: list[dict[str, Any]]) -> str:
    """Combine the digests of the shards' samples, in order."""
    lines = "".join(f"{shard['samples']} {shard['digest']}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what a finished folder says of itself; None if it is not one of ours."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else None


class PartialFolder:
    """The partial folder of one split.

    Args:
        final: The split's folder as it will be.
        settings: Everything that decides the output, as JSON.
    """

    def __init__(self, final: Path, settings: dict[str, Any]):
        self.final = final
        self.settings = settings
        self.path = final.with_name(f".{final.name}.partial")
        self.records_path = self.path / "records"
        self.lanes_path = self.path / "lanes"
        self.tmp_path = self.path / "tmp"
        self.used_records_path = final.with_name(f".{final.name}.records")
        self._lock: int | None = None

    # --- opening ---

    def open(self) -> dict[Key, dict[str, Any]]:
        """Create the folder or go on with it; return the records of finished blocks."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_settings()
        if self.is_indexed():  # killed while it was renaming: nothing is left to write
            return {}
        shutil.rmtree(self.tmp_path, ignore_errors=True)
        for path in (self.records_path, self.lanes_path, self.tmp_path):
            path.mkdir(exist_ok=True)
        return self.records()

    def close(self) -> None:
        """Let another process go on with the folder."""
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
                f"{self.path} holds an unfinished conversion with other settings ({changed}). "
                "Run that command again to finish it, or pass --overwrite to drop it"
            )

    def records(self) -> dict[Key, dict[str, Any]]:
        """Read the records of the blocks whose shards are all there."""
        records = {}
        for path in sorted(self.records_path.glob("*.json")):
            record = json.loads(path.read_text())
            if self._shards_are_there(record):
                lane, block = path.stem.split("-")
                records[int(lane), int(block)] = record
        return records

    def _shards_are_there(self, record: dict[str, Any]) -> bool:
        if self.is_indexed():
            return True
        for shard in record["shards"]:
            if not is_whole(self.path / shard["file"], shard_file(shard["entry"])):
                return False
        return True

    # --- lanes ---

    def lane_blocks(self, lane: int) -> int | None:
        """Return how many blocks a lane has, if that is known."""
        path = self.lanes_path / f"{lane:05}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def set_lane_blocks(self, lane: int, blocks: int) -> None:
        """Note that a lane has been read to its end."""
        write_json(self.lanes_path / f"{lane:05}.json", blocks, indent=None)

    # --- finishing ---

    def is_indexed(self) -> bool:
        """Whether all shards are written and only names are left to give."""
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
        """Number the shards and give the folder its name; can be repeated after a kill."""
        shards = [
            shard for _, record in sorted(self.records().items()) for shard in record["shards"]
        ]
        for number, shard in enumerate(shards):
            source = self.path / shard["file"]
            if source.exists():
                os.replace(source, self.path / _rename_entry(shard["entry"], number))
        for path in (self.tmp_path, self.lanes_path):
            shutil.rmtree(path, ignore_errors=True)
        # In one step: with half of the records, repeating the above would number wrongly.
        self.clean()
        if self.records_path.exists():
            os.replace(self.records_path, self.used_records_path)
        (self.path / "settings.json").unlink(missing_ok=True)
        for name in (MANIFEST, INDEX, "settings.json"):
            for unfinished in self.path.glob(f".{name}.*"):  # writes that a kill has cut off
                unfinished.unlink()
        os.replace(self.path, self.final)
        self.clean()

    def clean(self) -> None:
        """Remove what a kill between the last two steps of `publish` leaves beside the folder."""
        shutil.rmtree(self.used_records_path, ignore_errors=True)

    def remove(self) -> None:
        """Drop what is finished and what is not."""
        for path in (self.final, self.path):
            if path.exists():
                shutil.rmtree(path)


def _rename_entry(entry: dict[str, Any], number: int) -> str:
    """Give a shard its place in the whole; return the name of its file."""
    name = f"shard.{number:05}.mds"
    entry["raw_data"]["basename"] = name
    if not entry["zip_data"]:
        return name
    suffix = entry["zip_data"]["basename"].rpartition(".")[2]
    entry["zip_data"]["basename"] = f"{name}.{suffix}"
    return f"{name}.{suffix}"


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Name the settings that differ."""
    changed = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old != new:
            short = len(f"{old}{new}") < 80
            changed.append(f"{key}: {old!r} there, {new!r} now" if short else f"other {key}")
    return "; ".join(changed)
