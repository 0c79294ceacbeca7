"""Finished splits at a URL, such as s3://BUCKET/FOLDER, by fsspec.

A split is converted in a local folder and then sent. First comes its manifest, without counts: it
says whose folder this is. Then come the shards, the whole manifest, and the index, without which
no reader takes the folder for a split. A file that is there with its size and MD5 is not sent
again.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2_plugin.data.formats import filesystem, is_remote, remote_errors
from m2_plugin.executor import Workers
from m2_plugin.files import locked
from m2_plugin.foundry.conversion.folder import MANIFEST, check_manifest
from m2_plugin.foundry.mds_index import INDEX

log = logging.getLogger(__name__)


def begin_split(url: str, settings: Mapping[str, Any], overwrite: bool) -> int | None:
    """Look what is at the URL of a split, and mark it as the place of this one.

    This comes before the conversion, which would take long to find that it cannot write there.

    Args:
        url: The URL of the split.
        settings: What determines the split.
        overwrite: Whether to remove what is there.

    Returns:
        The samples of the split if it is there already.

    Raises:
        ConversionError: If something else is there.
        OSError: If the storage does not answer, or permits no writing.
    """
    target, root = filesystem(url)
    names = _names(url)
    with remote_errors(url):
        if overwrite and names:
            _remove(url, names & {INDEX})  # before the shards that it lists
            _remove(url, names - {INDEX})
            names = set()
        if not names:
            target.pipe_file(f"{root}/{MANIFEST}", json.dumps({"settings": settings}).encode())
            return None
        found = target.cat_file(f"{root}/{MANIFEST}") if MANIFEST in names else b"null"
        manifest = json.loads(found)
    samples = check_manifest(url, manifest, settings)
    return samples if INDEX in names else None


def _names(url: str) -> set[str]:
    """Return the names of all files below a URL."""
    target, root = filesystem(url)
    target.invalidate_cache()
    with remote_errors(url):
        return {path.removeprefix(f"{root}/") for path in target.find(root)}


def _remove(url: str, names: set[str]) -> None:
    target, root = filesystem(url)
    if names:
        target.rm([f"{root}/{name}" for name in sorted(names)])


def send_split(folder: Path, url: str, workers: Workers) -> None:
    """Send a finished split; what an earlier, interrupted run sent is not sent again.

    Args:
        folder: The local folder of the split.
        url: Its URL, for which `begin_split` was called.
        workers: What sends the files.

    Raises:
        ValueError: If another command is sending this folder.
        OSError: If the storage does not answer.
    """
    with locked(folder):
        last = [MANIFEST, INDEX]
        shards = sorted(path.name for path in folder.iterdir() if path.name not in last)
        tasks = [(folder / name, f"{url}/{name}") for name in shards]
        for _ in tqdm(workers.run(_send, tasks), f"send {folder.name}", len(tasks), unit="shards"):
            pass
        with remote_errors(url):
            _remove(url, _names(url) - {*shards, *last})  # sent for an input that changed since
        for name in last:
            _send((folder / name, f"{url}/{name}"))
    log.info("%s: %d shards are there", url, len(shards))


def _send(task: tuple[Path, str]) -> None:
    path, url = task
    target, name = filesystem(url)
    with remote_errors(url):
        if not _is_there(target, name, path):
            target.put_file(str(path), name)


def _is_there(target: Any, name: str, path: Path) -> bool:
    """Tell whether a file was sent; a storage whose ETag is no MD5 gets it again."""
    try:
        about = target.info(name)
    except FileNotFoundError:
        return False
    if about["size"] != path.stat().st_size:
        return False
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return str(about.get("ETag", "")).strip('"') == md5


@contextmanager
def at_hand(place: str, name: str) -> Iterator[Path]:
    """Yield the path of a file of a split; from a URL it is downloaded, and removed at the end.

    Args:
        place: The folder of the split, or its URL.
        name: The name of the file.
    """
    if not is_remote(place):
        yield Path(place, name)
        return
    source, root = filesystem(place)
    with tempfile.TemporaryDirectory() as folder:
        with remote_errors(f"{place}/{name}"):
            source.get_file(f"{root}/{name}", f"{folder}/{name}")
        yield Path(folder, name)
