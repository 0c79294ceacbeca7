"""Streaming's shared memory in the tests.

A dataset opens all segments that it finds, besides its own, and keeps them open until its process
ends. So with hundreds of tests in one process, or after many runs that were killed, there would be
too many open files.
"""

import atexit
import gc
import re
import sys
from contextlib import suppress
from pathlib import Path

SEGMENT = re.compile(r"\d{6}_[a-z_]+")
MAPPED = re.compile(r"/dev/shm/\d{6}_[a-z_]+")


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
    """Remove the segments that no process has in its memory: killed runs have left them."""
    segments = {path for path in Path("/dev/shm").glob("*") if SEGMENT.fullmatch(path.name)}
    if not segments:
        return
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or belongs to another user
            used |= set(MAPPED.findall(maps.read_text()))
    for path in segments:
        if str(path) not in used:
            path.unlink(missing_ok=True)
