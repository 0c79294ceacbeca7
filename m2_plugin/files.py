"""Write files and folders that are complete or absent, and lock what one process may write.

A file or folder is written in a hidden folder beside it, `.NAME.tmp-XXXXXXXX`, and renamed when all
of it is on the disk. The process locks that folder. So a later process can tell the folders of
killed processes, and removes them.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = [
    "InUseError",
    "is_disk_full",
    "lock",
    "locked",
    "publish",
    "read_json",
    "replacing",
    "whole",
    "write_atomically",
    "write_json",
]

log = logging.getLogger(__name__)

TEMPORARY = re.compile(r"\.(.+)\.tmp-[a-z0-9_]{8}")  # as mkdtemp makes them
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_tidied: set[Path] = set()


class InUseError(ValueError):
    """Another process holds the lock; the message names it."""


# --- reading and writing -------------------------------------------------------------------------


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file, complete or not at all; the folder must exist. An old file is replaced.

    Raises:
        OSError: If it cannot be written; the error names the file. The old file stays.
    """
    path = Path(path)
    if path.parent not in _tidied:  # only once: the folder may have many files
        _tidy(path.parent)
        _tidied.add(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, complete or not at all; the folder must exist.

    Args:
        path: The file.
        value: A value that JSON can represent.
        indent: The spaces per level; None writes one line.

    Raises:
        ValueError: If the value contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text + "\n")


def read_json(path: str | Path, kind: type = dict, missing_ok: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        kind: The type of its value: `dict` for an object, `list`, or `object` for any.
        missing_ok: Whether to return None if there is no such file. A damaged file is an error.

    Raises:
        ValueError: If the file is missing, damaged, or holds another type; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing_ok:
            return None
        raise ValueError(f"there is no file {str(path)!r}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        name = "object" if kind is dict else kind.__name__
        raise ValueError(f"{str(path)!r} must hold a JSON {name}")
    return content


@contextmanager
def whole(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path, and rename it to the given path if no exception is raised.

    Args:
        path: The file or folder to write; missing folders above it are made. It is locked.
        size: About how many bytes will be written.

    Raises:
        ValueError: If the path exists already or cannot be written, or another process writes it.
        OSError: If the disk has no space for it; nothing is left then.
    """
    with locked(path):  # which removes what a process that was killed at its very end has left
        if os.path.lexists(path):
            raise ValueError(f"{str(path)!r} exists already: give another name, or remove it")
        free = shutil.disk_usage(path.parent).free
        if size > free:
            needed = f"about {_mib(size)} MiB are needed, and {_mib(free)} MiB are free"
            raise OSError(errno.ENOSPC, f"no space left on the disk: {needed}", str(path))
        with replacing(path) as temporary:
            yield temporary


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to the given path, which may exist, if all went well.

    For what this process has locked, or what a loser may overwrite; else take `whole`.

    Args:
        path: The file or folder to write, in a folder that exists.

    Raises:
        OSError: If it cannot be written; the error names the path. An old file stays.
    """
    with _temporary(path) as temporary:
        yield temporary
        publish(temporary, path)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


# --- temporary folders ---------------------------------------------------------------------------


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield `path`'s name in a hidden folder beside it; at the end the folder is removed."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        # Until it is locked, another process may take it for a killed process's, and remove it.
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # without locks nobody removes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)
    try:
        yield folder / path.name
    except Exception as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, "no space left on the disk", str(path)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _tidy(folder: Path) -> None:
    """Remove the temporary folders that killed processes left in a folder."""
    with os.scandir(folder) as entries:
        found = [(entry.path, TEMPORARY.fullmatch(entry.name)) for entry in entries]
    for path, match in found:
        if match is None:
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        with suppress(OSError):  # a living process has the lock, or there are no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if set(os.listdir(handle)) <= {match[1]}:  # otherwise not one of ours
                shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Rename what is complete, after the disk has it: a name must never stand for half a file."""
    inner = temporary.rglob("*") if temporary.is_dir() else ()
    for file in (*inner, temporary):
        if not file.is_symlink():
            _sync(file)
    os.replace(temporary, path)
    with suppress(OSError):  # not every file system can, and the file is there
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        # Writers that are not Python's, such as that of safetensors, have errors of their own.
        if f"os error {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- locks ---------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[IO[str] | None]:
    """Keep other processes from writing a file or folder; missing folders above it are made.

    The lock is a hidden file beside it, `.NAME.lock`, which is yielded, as by `lock`, and removed
    at the end. What killed processes left there is removed too.

    Args:
        path: The file or folder, which need not exist.
        wait: For how many seconds to wait for another process.

    Raises:
        InUseError: If another process has the lock.
        ValueError: If files cannot be written there. The writers of tensors would raise unclear
            errors, or none.
    """
    file = path.with_name(f".{path.name}.lock")
    what = f"{str(path)!r} is being written by another process"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(file, what, "give another name", wait=wait)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error
    try:
        _tidy(path.parent)
        yield held
    finally:
        file.unlink(missing_ok=True)  # still locked: `lock` of others notices that it is gone
        if held is not None:
            held.close()


def lock(
    path: Path, what: str, instead: str, *, forks: bool = True, wait: float = 0.0
) -> IO[str] | None:
    """Lock a file for this process. The system drops the lock when the process ends.

    Args:
        path: The file; it is made, and holds the name of the process.
        what: What another process would be doing, for the message.
        instead: What else a user can do than to wait.
        forks: Whether forked processes hold the lock too, until the last of them ends.
        wait: For how many seconds to wait for another process.

    Returns:
        The file, which holds the lock until it is closed; None, after a warning, if the file system
        has no locks.

    Raises:
        InUseError: If another process has the lock; the message names it.
        OSError: If the file cannot be made.
    """
    take = fcntl.flock if forks else fcntl.lockf
    deadline, waiting = time.monotonic() + wait, False
    while True:
        file = open(path, "a+")  # noqa: SIM115 (open as long as it is locked)
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            if time.monotonic() < deadline:
                if not waiting:
                    log.warning("%s: %s; waiting for it to end", what, holder)
                waiting = True
                time.sleep(0.1)
                continue
            raise InUseError(f"{what}: {holder}. Wait until it ends, or {instead}.") from error
        except OSError as error:
            log.warning("%r cannot be locked (%s): do not start a second one.", str(path), error)
            file.close()
            return None
        if _is_at(file, path):
            break
        file.close()  # the process that had the lock has removed the file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
