"""The server that new processes are forked from."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver

_running: tuple[int, tuple[str, ...]] | None = None  # its process, and the modules that it imports


def preload(*modules: str) -> None:
    """Start the server with modules that it imports once for all processes.

    A process has one such server, and whoever comes first says what it imports. In a run of all
    tests another file may have come first, and each process would import for itself what these
    tests need. So a server with other modules is ended.
    """
    global _running
    server = forkserver._forkserver  # type: ignore[attr-defined]
    running = server._forkserver_pid
    if running is not None and (running, modules) == _running:
        return
    if running is not None:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)
        os.close(server._forkserver_alive_fd)
        server.__init__()
    multiprocessing.set_forkserver_preload([*modules])
    forkserver.ensure_running()
    _running = server._forkserver_pid, modules
