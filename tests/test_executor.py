"""Running tasks in processes of this machine. The Dask cluster is in data_prep/test_cluster.py."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from m2_plugin.executor import AHEAD, WorkersError, open_workers


def square(number):
    return number * number


def process_of(_):
    return os.getpid()


def fail_at_three(number):
    if number == 3:
        raise KeyError("three")
    if number > 3:
        time.sleep(0.05)
    return number


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_long(_):
    time.sleep(1000)


def test_runs_all_tasks_in_other_processes():
    with open_workers(2) as workers:
        assert workers.count() == 2
        assert sorted(workers.run(square, range(50))) == [n * n for n in range(50)]
        assert os.getpid() not in set(workers.run(process_of, range(4)))
        assert list(workers.run(square, [])) == []
    assert not multiprocessing.active_children()


def test_takes_tasks_as_workers_become_free():
    taken, ticks = [], []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield number

    with open_workers(1) as workers:
        results = workers.run(square, tasks(), tick=lambda: ticks.append(len(taken)))
        for done, _ in enumerate(results, start=1):
            assert len(taken) <= done + AHEAD
    assert len(taken) == 20 and ticks


def test_none_is_no_task():
    """What is ready depends on what has ended."""
    done = []

    def tasks():
        yield 2
        while not done:
            yield None
        yield done[0]

    with open_workers(2) as workers:
        for result in workers.run(square, tasks()):
            done.append(result)
    assert done == [4, 16]


def test_the_first_error_ends_it():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    with pytest.raises(KeyError, match="three"), open_workers(2) as workers:
        list(workers.run(fail_at_three, tasks()))
    assert len(taken) < 20
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_one_error():
    with (
        pytest.raises(WorkersError, match="Run the same command again"),
        open_workers(2) as workers,
    ):
        list(workers.run(die, range(3)))
    assert not multiprocessing.active_children()


def test_an_error_of_the_caller_ends_the_workers():
    with pytest.raises(ZeroDivisionError), open_workers(1) as workers:
        for _ in workers.run(square, [1, 2]):
            workers.executor.submit(wait_long, 0)
            raise ZeroDivisionError
    assert not multiprocessing.active_children()


SCRIPT = """
import os, sys
from m2_plugin.executor import open_workers
from tests.test_executor import process_of, wait_long
with open_workers(2) as workers:
    print(*set(workers.run(process_of, range(8))), flush=True)
    list(workers.run(wait_long, range(4)))
"""


def test_workers_do_not_run_the_calling_script():
    """It lacks `if __name__ == "__main__"`, and has no file."""
    script = "from m2_plugin.executor import open_workers\nimport math\n"
    script += "with open_workers(1) as workers:\n    print(*workers.run(math.sqrt, [4]))\n"
    ended = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert ended.stdout == "2.0\n", ended.stderr


@pytest.fixture
def own_handler():
    """Python's own handler of Ctrl-C: other tests in this process may have set one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Presses:
    """Presses Ctrl-C while Python ends it; the exception is dropped there."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_dropped_takes_effect(own_handler):
    def tasks():
        yield 0
        Presses()
        yield None

    with pytest.raises(KeyboardInterrupt), open_workers(1) as workers:
        list(workers.run(wait_long, tasks()))
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_is_held_inside_the_executor(own_handler):
    """There it could leave a lock taken; who presses twice does not wait."""
    steps = []

    def count(presses):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(presses)

    with open_workers(1) as workers:
        for presses in (1, 2):
            with pytest.raises(KeyboardInterrupt), workers.interrupts.held():
                count(presses)
            workers.interrupts._came.clear()
    assert steps == [1]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_main_process(how):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert workers
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert errors.count("Traceback") == (how == signal.SIGINT)  # of the main process alone
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_a_cluster_that_does_not_answer(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("m2_plugin.executor.CONNECT_S", 0.5)
    none = "tcp://127.0.0.1:1"
    with pytest.raises(WorkersError, match="no Dask scheduler answers"), open_workers(1, none):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(WorkersError, match=r"m2-plugin\[cluster\]"), open_workers(1, none):
        pass
