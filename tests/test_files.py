import errno
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from m2_plugin.files import (
    InUseError,
    lock,
    locked,
    read_json,
    whole,
    write_atomically,
    write_json,
)
from tests.cluster import wait_for


@contextmanager
def another(code: str):
    """Run code in another process up to its `print`, and kill it at the end."""
    command = [sys.executable, "-c", f"from pathlib import Path\n{code}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def writing(path) -> str:
    """Code that is killed while it writes a folder."""
    return f"""
from m2_plugin.files import whole
with whole(Path({str(path)!r})) as temporary:
    temporary.mkdir()
    (temporary / "config.json").write_text("{{")
    print("ready", flush=True)
    input()
"""


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(name, tmp_path, monkeypatch):
    path = tmp_path / "points.csv"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="no space left on the disk: .*points.csv"):
        write_atomically(path, "new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_there_and_back(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"loss": 5.5, "name": "é"}, indent=None)
    assert path.read_text(encoding="utf-8").count("\n") == 1
    assert read_json(path) == {"loss": 5.5, "name": "é"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path)["loss"] == 5.5


def test_absent_and_damaged_are_not_the_same(tmp_path):
    path = tmp_path / "notes.json"
    assert read_json(path, missing_ok=True) is None
    with pytest.raises(ValueError, match="there is no file .*notes.json"):
        read_json(path)
    for text in ("", '{"rows": 3', "\x00" * 20, "[" * 200_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="notes.json' cannot be read as JSON"):
            read_json(path, missing_ok=True)
    path.write_text("[3]")
    with pytest.raises(ValueError, match="notes.json' must hold a JSON object"):
        read_json(path, missing_ok=True)
    assert read_json(path, list) == read_json(path, object) == [3]


@pytest.mark.parametrize("folder", [True, False])
def test_whole_or_not_there(tmp_path, folder):
    path = tmp_path / "deep" / "out"

    def fill(temporary):
        assert temporary.name == "out"  # writers may put the name into the file
        if folder:
            temporary.mkdir()
            temporary /= "config.json"
        temporary.write_text("{}")

    with pytest.raises(KeyError), whole(path) as temporary:
        fill(temporary)
        raise KeyError
    assert not list(path.parent.iterdir())
    with whole(path) as temporary:
        fill(temporary)
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="exists already"), whole(path):
        pass


def test_modes_are_those_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "x")
        with whole(tmp_path / "folder") as temporary:
            temporary.mkdir()
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_what_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file/out", "file/deep/out", "/proc/out"):
        refused = pytest.raises(ValueError, match=f"{name}' cannot be written: ")
        with refused, whole(tmp_path / name):
            pytest.fail("it began to write")
    with pytest.raises(OSError, match="No such file or directory: '.*/none'"):
        write_atomically(tmp_path / "none" / "file", "x")


def test_a_full_disk_says_what_is_needed(tmp_path):
    refused = pytest.raises(OSError, match=r"about [\d,]{9,}\.0 MiB are needed, .*: '.*/out'")
    with refused, whole(tmp_path / "out", size=2**60):
        pytest.fail("it began to write")
    # safetensors has an error of its own.
    full = pytest.raises(OSError, match="no space left on the disk: '.*/out'")
    with full, whole(tmp_path / "out") as temporary:
        temporary.write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rerun", ["the same", "another file"])
def test_what_a_killed_process_left_is_removed(rerun, tmp_path):
    path = tmp_path / "out"
    mine = tmp_path / ".notes.tmp-abcdefgh"  # of another program
    (mine / "data").mkdir(parents=True)
    with another(writing(path)):
        left = sorted(tmp_path.glob(".out*"))
        assert len(left) == 2  # the lock, and the temporary folder
        write_atomically(tmp_path / "file", "x")
        assert sorted(tmp_path.glob(".out*")) == left  # it is not abandoned
    assert not path.exists()
    if rerun == "the same":
        with whole(path) as temporary:
            temporary.write_text("x")
    else:
        with whole(tmp_path / "file2") as temporary:
            temporary.write_text("x")
        left[0].unlink()  # its lock stays until the same file is written
    assert {entry.name for entry in tmp_path.glob(".*")} == {mine.name}


def test_what_was_left_beside_a_finished_file_is_removed(tmp_path):
    path = tmp_path / "out"
    path.write_text("whole")
    (tmp_path / ".out.lock").write_text("process 1 on a machine\n")
    (tmp_path / ".out.tmp-abcdefgh").mkdir()
    with pytest.raises(ValueError, match="out' exists already: "), whole(path):
        pytest.fail("it began to write")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "whole"


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "out"
    with another(writing(path)) as process:
        holder = f"out' is being written by another process: process {process.pid} on "
        with pytest.raises(InUseError, match=holder), whole(path):
            pytest.fail("it began to write")
        process.communicate("\n")
        assert process.returncode == 0
    with pytest.raises(ValueError, match="exists already"), whole(path):
        pass
    with locked(path):
        refused = pytest.raises(InUseError, match=f"process {os.getpid()} on .* Wait until it ends")
        with refused, locked(path):
            pytest.fail("it has the lock twice")
    assert list(tmp_path.iterdir()) == [path]


def test_waiting_for_a_lock(tmp_path, caplog):
    """The first process removes the file with the lock that the second waits for."""
    code = f"""
from m2_plugin.files import locked
with locked(Path({str(tmp_path / "out")!r})):
    print("ready", flush=True)
    input()
"""

    def end():
        wait_for(lambda: "waiting for it to end" in caplog.text)
        process.communicate("\n")

    with another(code) as process:
        thread = threading.Thread(target=end)
        thread.start()
        with locked(tmp_path / "out", wait=60):
            thread.join()
            assert process.returncode == 0
            with pytest.raises(InUseError), locked(tmp_path / "out"):
                pass
    assert f"process {process.pid}" in caplog.text and "waiting for it to end" in caplog.text


@pytest.mark.parametrize("forks", [True, False])
def test_forks_and_the_lock(forks, tmp_path):
    code = f"""
import os, time
from m2_plugin.files import lock
held = lock(Path({str(tmp_path / "lock")!r}), "in use", "stop it", forks={forks})
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
(Path({str(tmp_path)!r}) / "child").write_text(str(child))
print("ready", flush=True)
input()
"""
    with another(code), pytest.raises(InUseError):
        lock(tmp_path / "lock", "in use", "stop it", forks=forks)
    child = int((tmp_path / "child").read_text())
    try:
        if forks:
            with pytest.raises(InUseError):
                lock(tmp_path / "lock", "in use", "stop it", forks=forks)
        else:
            lock(tmp_path / "lock", "in use", "stop it", forks=forks).close()
    finally:
        os.kill(child, 9)


def test_many_processes_write_in_one_folder(tmp_path):
    """None removes what another has just begun; each first looks for what killed ones left."""
    code = (
        "import sys; from m2_plugin import files\n"
        "for i in range(150):\n"
        "    files._tidied.clear()\n"
        "    files.write_atomically(f'{sys.argv[1]}/{sys.argv[2]}-{i}', 'x')\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(n)], stderr=subprocess.PIPE
        )
        for n in range(4)
    ]
    for writer in writers:
        assert writer.communicate()[1] == b"" and writer.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{n}-{i}" for n in range(4) for i in range(150)
    )
