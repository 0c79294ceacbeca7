"""The sweep on a Dask cluster of two workers."""

import signal

from .conftest import (
    LONG,
    behave,
    ended,
    finish,
    launch,
    running,
    soon,
    wait_for,
    wait_until_halfway,
)


def test_the_same_results_as_on_this_machine(out, cluster, unbroken):
    file, _ = cluster
    finish(out, launch(out, str(file)), unbroken, again={})


def test_a_worker_is_killed(out, cluster, unbroken):
    """Its job ends with it, and runs again on the other worker."""
    file, workers = cluster
    behave(out, {"cola-seed1": {"sleep": 60, "child": True}, "sst2-seed1": {"sleep": 3}})
    process = launch(out, str(file))
    wait_until_halfway(out, process)
    behave(out, {})
    pid = int((out / "cola-seed1" / "worker").read_text())
    (killed,) = (worker for worker in workers if worker.pid == pid)
    killed.send_signal(signal.SIGKILL)
    finish(out, process, unbroken, again={"cola-seed1": 1})


def test_a_stopped_sweep_ends_its_jobs(out, cluster, unbroken):
    """The workers live on; their jobs end when nobody waits for them."""
    file, workers = cluster
    behave(out, LONG)
    for how in (signal.SIGINT, signal.SIGKILL):
        process = launch(out, str(file))
        wait_until_halfway(out, process)
        wait_for(lambda: running(out) == 6, process)
        process.send_signal(how)
        ended(process)
        assert process.returncode != 0
        assert soon(lambda: running(out) == 0) and all(worker.poll() is None for worker in workers)
    behave(out, {})
    finish(out, launch(out, str(file)), unbroken, again=dict.fromkeys(LONG, 2))
