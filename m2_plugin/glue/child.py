"""Become a command whose whole process group ends when the starter closes the pipe, or dies.

    python child.py COMMAND...      with the reading end of the pipe as its stdin

A file of its own, not imported: it needs nothing but the standard library. A second process reads
the pipe, so that a command that hangs ends too, with all processes that it has started. (Linux'
PR_SET_PDEATHSIG ends neither these nor waits for the starter: it acts when its *thread* ends.)
"""

import os
import signal
import sys


def main() -> None:
    """Start the process that reads the pipe, and become the command."""
    os.setsid()
    if os.fork() == 0:
        os.read(0, 1)  # nobody writes: it returns when no process has the other end
        os.killpg(0, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
