"""Streaming's shared memory in the tests.

A dataset opens all segments that it finds, besides its own, and keeps them open until its process
ends. So with hundreds of tests in one process, or after many runs that were killed, there would be
too many open files.

Segments have numbers. A dataset takes the first number that has neither a segment nor a lock file
in the folder for temporary files. Two datasets that look at the same moment may take the same one.
So each process of `pytest -n` has a folder of its own, with lock files for the others' numbers.
"""

import atexit
import gc
import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

SEGMENT = re.compile(r"(\d{6})_[a-z_]+")
MAPPED = re.compile(r"/dev/shm/(\d{6})_[a-z_]+")
NUMBERS = 1000
own_numbers = range(10**6)


def own_segments(worker: int) -> None:
    """Give this process, and those that it starts, the numbers of one of pytest's workers."""
    global own_numbers
    folder = tempfile.mkdtemp(prefix="tests-")
    # After multiprocessing has removed its own folder in it, at −100.
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)
    for number in range(worker * NUMBERS):
        Path(folder, f"{number:06}_barrier_filelock").touch()
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    own_numbers = range(worker * NUMBERS, (worker + 1) * NUMBERS)


def close_segments() -> None:
    """Close what this process has open and no dataset uses any more."""
    if "streaming" not in sys.modules:
        return
    from streaming.base.shared import SharedMemory

    gc.collect()
    for memory in [x for x in gc.get_objects() if type(x) is SharedMemory]:
        try:
            memory.cleanup()
        except BufferError:  # a dataset still uses it
            continue
        atexit.unregister(memory.cleanup)


def remove_stale_segments() -> None:
    """Remove segments of our numbers that no process has in its memory, and their lock files.

    Killed runs have left them.
    """
    folders = Path("/dev/shm"), Path(tempfile.gettempdir())
    found = [path for folder in folders for path in folder.glob("[0-9]*_*")]
    numbers = {path: int(name[1]) for path in found if (name := SEGMENT.fullmatch(path.name))}
    stale = [path for path, number in numbers.items() if number in own_numbers]
    if not stale:
        return
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or belongs to another user
            used |= set(map(int, MAPPED.findall(maps.read_text())))
    for path in stale:
        if numbers[path] not in used:
            with suppress(FileNotFoundError, PermissionError):
                path.unlink()
