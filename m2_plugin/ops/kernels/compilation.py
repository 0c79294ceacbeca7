"""Compiles many launches at once, each in one of several processes.

Triton compiles a kernel when it is launched, in one thread, and holds Python's lock meanwhile: the
kernels that are compared before their first use take minutes so. Other processes compile them to
Triton's cache on disk; the launch then finds them there. Those processes need no GPU and use none.

This only saves time. Whatever goes wrong here, the launch itself compiles, and reports the error.
"""

import atexit
import importlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from m2_plugin.ops.backend import interpreted
from m2_plugin.ops.kernels.launch import noted_launches

log = logging.getLogger(__name__)

MOST_PROCESSES = 16  # of some hundred megabytes each
IDLE_SECONDS = 60.0  # after which they end

_lock = threading.Lock()
_compiled: set[bytes] = set()  # requests of this process, which a new class of shapes repeats
_workers: list["_Worker"] = []
_timer: threading.Timer | None = None


@dataclass(frozen=True)  # Triton would take a tuple apart
class Pointer:
    """All that the compiler wants to know of a tensor."""

    dtype: torch.dtype
    alignment: int  # of its address, modulo 16

    def data_ptr(self) -> int:
        """Return an address so aligned."""
        return self.alignment


class NamedTarget:
    """A driver that answers what device there is, and has none."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a number: Triton keeps what it compiled by device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        """Return a number."""
        return 0


class Request(NamedTuple):
    """A launch to compile: a kernel's module and name, arguments, and constants with options."""

    module: str
    kernel: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> "Request":
        """Return the request for a launch, with a `Pointer` for each tensor."""
        pointers = tuple(
            Pointer(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args
        )
        return cls(kernel.fn.__module__, kernel.fn.__name__, pointers, options)

    def compile(self) -> Any:
        """Return what Triton compiles for the target of its active driver."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return kernel.run(*self.args, grid=(1,), warmup=True, **self.options)


def compile_together(run: Callable[[], object]) -> None:
    """Compile all that a function would launch, in as many processes as there are CPUs for.

    The function runs, but launches nothing: its tensors may be on the meta device, and what it
    returns is garbage. On one CPU, and in Triton's interpreter, this does nothing.
    """
    processes = 1 if interpreted() else _processes()
    if processes == 1:
        return
    with noted_launches() as launches:
        try:
            run()
        except Exception as error:
            log.debug("Not all launches are known before they run: %s", error)
    try:
        found = [
            pickle.dumps(Request.of(kernel, _alike(kernel, args), options))
            for kernel, args, options in launches
        ]
    except Exception as error:
        log.debug("Launches cannot be compiled elsewhere: %s", error)
        return
    requests = [request for request in dict.fromkeys(found) if request not in _compiled]
    if len(requests) > 1:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda":
            _compile(requests, target.arch, processes)


def _alike(kernel: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the same for all arguments that Triton compiles alike.

    It compiles anew for each constant, for the number 1, and for numbers that 16 divides.
    """

    def alike(value: Any, is_constant: bool) -> Any:
        if is_constant or type(value) is not int or value == 1 or not -(2**31) <= value < 2**31:
            return value
        return 16 if value % 16 == 0 else 17

    return tuple(alike(a, p.is_constexpr) for a, p in zip(args, kernel.params, strict=False))


def _processes() -> int:
    """Return how many processes this rank may start, those of other ranks not counted."""
    on_linux = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return max(1, min(cpus // _ranks(), MOST_PROCESSES))


def _ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _compile(requests: list[bytes], capability: int, processes: int) -> None:
    """Let the workers take requests in turn until none is left."""
    global _timer
    todo = deque(requests)
    # Ranks compile the same. Each begins elsewhere, and later finds what others have compiled.
    todo.rotate(-int(os.environ.get("LOCAL_RANK") or 0) * len(todo) // _ranks())

    def work(worker: _Worker) -> None:
        while True:
            try:
                request = todo.popleft()
            except IndexError:
                return
            worker.compile(request)

    with _lock:
        if _timer is not None:
            _timer.cancel()
        try:
            while len(_workers) < min(processes, len(requests)):
                _workers.append(_Worker(capability))
            with ThreadPoolExecutor(len(_workers)) as pool:
                list(pool.map(work, _workers))
        except Exception as error:
            log.debug("Launches are compiled one after the other: %s", error)
            _end_workers()
            return
        _compiled.update(requests)
        _timer = threading.Timer(IDLE_SECONDS, end_workers)
        _timer.daemon = True
        _timer.start()


class _Worker:
    """A process that compiles one request after the other."""

    def __init__(self, capability: int):
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({capability})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )

    def compile(self, request: bytes) -> None:
        """Wait until a pickled request is compiled.

        Raises:
            EOFError, OSError: If the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request)
        self.process.stdin.flush()
        problem = pickle.load(self.process.stdout)
        if problem is not None:
            log.debug("A launch cannot be compiled: %s", problem)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def serve(capability: int, reply: Callable[[Any], Any] = lambda kernel: None) -> None:
    """Compile the requests on the standard input until it ends.

    Args:
        capability: The compute capability to compile for, e.g. 90.
        reply: Makes the answer of what was compiled; an error is answered as a text.
    """
    triton.runtime.driver.set_active(NamedTarget(capability))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed does not belong to the answers
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = reply(request.compile())
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def end_workers() -> None:
    """End the processes; the next launches to compile start new ones."""
    with _lock:
        _end_workers()


def _end_workers() -> None:
    while _workers:
        _workers.pop().end()


atexit.register(end_workers)
