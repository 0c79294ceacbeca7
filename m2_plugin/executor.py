"""Run a function on many tasks, in processes of this machine or on a Dask cluster.

A task may run twice: if a worker of a cluster dies, Dask gives its task to another, and a command
that was killed is run again. So a task writes its result under its final name only when it is
whole, and does nothing if the result is there already.
"""

import concurrent.futures
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from types import FrameType, ModuleType
from typing import Any, TypeVar

__all__ = ["Workers", "WorkersError", "cores", "is_wanted", "open_workers", "visible_gpus"]

# Tasks that are given out for each worker: one to run, and one to begin at once after it.
AHEAD = 2
TICK_S = 0.5
CONNECT_S = 10

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkersError(OSError):
    """The workers cannot be reached, or one died; the message says what to do."""


class _Interrupts:
    """Ctrl-C and SIGTERM while workers run.

    Their handlers raise an exception, wherever the main thread is. If that is a finalizer, Python
    drops the exception (Dask's futures have one, for each result); if it takes a lock of a future,
    that may stay locked. So signals that come inside `held` take effect at its end, and `check`,
    in the loop that waits, finds those whose exception was dropped.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[int] = []
        self._held = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        if not self._held or len(self._came) > 1:  # who presses twice will not wait
            self._handlers[number](number, frame)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals until the end of the block, if this thread may, and someone handles them."""
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for noted, handler in self._handlers.items():
                signal.signal(noted, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a first signal take effect at the end of the block."""
        before = len(self._came)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if len(self._came) > before:
                self.check()

    def check(self) -> None:
        """Call the handler of a signal that came and whose exception did not end the work."""
        while self._came:
            number = self._came.pop()
            self._handlers[number](number, None)


@dataclass(frozen=True)
class Workers:
    """Processes that run tasks.

    Args:
        executor: What runs a task.
        count: Returns the number of tasks that run at once; on a cluster it may change.
        lost: The errors of a task whose worker died.
        lost_message: What the user should do about that.
        interrupts: The signals that came.
    """

    executor: Executor
    count: Callable[[], int]
    lost: tuple[type[BaseException], ...]
    lost_message: str
    interrupts: _Interrupts

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task | None],
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[Result]:
        """Yield the results in the order in which the tasks end.

        Args:
            function: A function at the top of a module, so that another process can import it.
            tasks: Its arguments; they are taken as workers become free. None means that no other
                is ready until one of those that run has ended.
            tick: Called whenever a task ends, and at least every half second.

        Raises:
            WorkersError: If a worker died.
            Exception: The first error of a task; no more tasks are given out.
        """
        waiting = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            while True:
                free = max(0, AHEAD * max(1, self.count()) - len(running))
                for task in itertools.islice(waiting, free):
                    if task is None:
                        break
                    with self.interrupts.held():
                        running.add(self.executor.submit(function, task))
                self.interrupts.check()
                if not running:
                    return
                with self.interrupts.held():
                    done, running = concurrent.futures.wait(
                        running, TICK_S, concurrent.futures.FIRST_COMPLETED
                    )
                    results = [future.result() for future in done]
                    del done  # Dask's futures end here
                tick()
                yield from results
        except self.lost as error:  # `submit` raises it too
            raise WorkersError(self.lost_message) from error


@contextmanager
def open_workers(
    count: int | None = None,
    cluster: str | None = None,
    preload: Sequence[str] = (),
    gpus: Sequence[str] | None = None,
) -> Iterator[Workers]:
    """Open workers; they end with the context, at once if it ends by an error.

    Args:
        count: The processes on this machine; None means one per core that this process may use.
        cluster: The address of a Dask scheduler (`tcp://HOST:8786`) or its scheduler file, to use
            its workers instead of processes of this machine.
        preload: Modules that take long to import. They are imported once, and the processes on
            this machine share them. Only the first call of a process has an effect.
        gpus: The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them: each process sees one,
            in turn. On a cluster whose workers declare the resource `GPU`, a task asks for one,
            unless this is None.

    Raises:
        WorkersError: If the cluster cannot be reached.
    """
    interrupts = _Interrupts()
    if cluster is not None:
        opened = _dask(cluster, gpus is not None, interrupts)
    else:
        opened = _processes(count or cores(), preload, gpus or (), interrupts)
    with interrupts.noted(), opened as workers:
        yield workers


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_gpus(_: object = None) -> list[str]:
    """Return the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    import torch  # slow

    count = torch.cuda.device_count()
    named = [name for name in (visible or "").split(",") if name]
    return named[:count] if len(named) >= count else [str(i) for i in range(count)]


def is_wanted() -> bool:
    """Tell whether someone waits for the task of this thread. Dask cannot end a task that runs."""
    if "distributed" not in sys.modules:
        return True
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # a process of this machine, which can be ended
        return True
    task = worker.state.tasks.get(worker.get_current_task())
    return task is not None and task.state != "cancelled"


# --- this machine ---


class _Pool(ProcessPoolExecutor):
    """A pool of processes, which start with the first tasks.

    While they start, Ctrl-C does not reach them. They do not run the script that called us, as
    multiprocessing lets them: it may lack `if __name__ == "__main__"`, or come from stdin.
    """

    def submit(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        resource_tracker.ensure_running()  # the server would start it, and unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            forkserver.ensure_running()  # it inherits the mask
            return super().submit(*args, **kwargs)
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # Ctrl-C takes effect now


def _begin_process(started: Any, gpus: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers run in parallel already
    if gpus:
        with started:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[started.value % len(gpus)]
            started.value += 1
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends: a worker of a killed pool would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _processes(
    count: int, preload: Sequence[str], gpus: Sequence[str], interrupts: _Interrupts
) -> Iterator[Workers]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    others = set(multiprocessing.active_children())
    executor = _Pool(count, context, _begin_process, (context.Value("i"), gpus))
    message = (
        "a worker process ended unexpectedly, mostly for lack of memory: try fewer "
        "(--num-workers, --jobs). Run the same command again to continue"
    )
    try:
        yield Workers(executor, lambda: count, (BrokenProcessPool,), message, interrupts)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # nothing is lost: see above
        raise
    finally:
        executor.shutdown()


# --- a cluster ---


@contextmanager
def _dask(cluster: str, gpus: bool, interrupts: _Interrupts) -> Iterator[Workers]:
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        message = f"--cluster needs Dask: pip install 'm2-plugin[cluster]' ({error})"
        raise WorkersError(message) from error
    where = {"scheduler_file" if os.path.isfile(cluster) else "address": cluster}
    try:
        with interrupts.held():
            client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WorkersError(
            f"--cluster {cluster}: no Dask scheduler answers there ({reason}). Give its address "
            "(tcp://HOST:8786), or the file of `dask scheduler --scheduler-file FILE`"
        ) from error
    message = (
        f"--cluster {cluster}: workers died again and again with the same task, or the scheduler "
        "ended. See their logs; run the same command again to continue"
    )

    def count() -> int:
        with interrupts.held():
            return sum(client.nthreads().values())

    try:
        resources: dict[str, int] = {}
        if gpus:
            client.wait_for_workers(1)
            workers = client.scheduler_info()["workers"].values()
            resources = {"GPU": 1} if any("GPU" in w["resources"] for w in workers) else {}
        executor = client.get_executor(pure=False, resources=resources)
        lost = (KilledWorker, concurrent.futures.CancelledError)
        yield Workers(executor, count, lost, message, interrupts)
    finally:
        with interrupts.held():
            # This drops the tasks that an error left. Dask's network library would log a traceback
            # if the result of one is on its way.
            logging.getLogger("tornado.application").setLevel(logging.CRITICAL)
            client.close()
