"""`embed` and `predict` by several processes: the same bytes, whatever is killed."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest

from m2_plugin import chunks
from m2_plugin.chunks import Parts, Work
from m2_plugin.cli import main
from m2_plugin.embed import load
from m2_plugin.executor import Workers
from m2_plugin.inference import Settings, digest
from m2_plugin.tasks import TextEmbedding
from tests import fork_server, test_embed, test_predict
from tests.cluster import wait_for

ROWS = 2000
OUTS = {"embed": "vectors.npy", "predict": "answers.csv"}


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """Import what takes long in the server that all processes of these tests are forked from."""
    fork_server.preload("m2_plugin.embed", "m2_plugin.predict")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with both models, a file of texts, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("work")
    test_embed.save(folder / "embed", mask_padding=True)
    test_predict.save(folder / "predict", test_predict.classifier(mask_padding=True))
    lines = [line.replace("\n", " ").replace("\r", " ") for line in test_predict.texts(ROWS - 1)]
    (folder / "texts.txt").write_text("\n".join(["long " * 1000, *lines]))
    for command, out in OUTS.items():
        assert main([command, *arguments(folder, command, folder / out, "--num-workers", 1)]) == 0
    return folder


def arguments(work, command, out, *flags):
    named = ["--model", work / command, "--out", out, *flags]
    return [str(work / "texts.txt"), *map(str, named)]


def finished(out):
    """The files of results; hidden folders come and go while a command runs."""
    return sorted(out.parent.glob(f".{out.name}.partial/[!.]*/0*"))


@pytest.mark.parametrize("command", OUTS)
def test_the_same_bytes_by_several_processes(command, work, tmp_path, monkeypatch):
    out = tmp_path / OUTS[command]
    monkeypatch.setattr(TextEmbedding, "answers", None)  # this process does not run the model
    assert main([command, *arguments(work, command, out, "--num-workers", 3)]) == 0
    assert out.read_bytes() == (work / out.name).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", OUTS)
def test_the_same_bytes_on_a_cluster_of_which_a_worker_dies(command, work, tmp_path, cluster):
    file, workers = cluster
    out = tmp_path / "out" / OUTS[command]
    out.parent.mkdir()
    killer = threading.Thread(target=lambda: (wait_for(lambda: finished(out)), workers[0].kill()))
    killer.start()
    assert main([command, *arguments(work, command, out, "--cluster", file)]) == 0
    killer.join()
    assert out.read_bytes() == (work / out.name).read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_a_worker_of_this_machine_dies(work, tmp_path, capfd, monkeypatch):
    """One line says what to do; the next run repeats nothing that was whole."""
    out = tmp_path / "vectors.npy"
    run_tasks = Workers.run

    def run_and_kill(self, *args):
        """Kill a worker after the first task, before the main process gives out the last ones."""
        results = run_tasks(self, *args)
        yield next(results)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield from results

    monkeypatch.setattr(Workers, "run", run_and_kill)
    command = ["embed", *arguments(work, "embed", out)]
    assert main([*command, "--num-workers", "2"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert "a worker process ended unexpectedly" in said[-1] and "Traceback" not in str(said)
    assert not out.exists() and not multiprocessing.active_children()
    before = {file.name: file.stat().st_mtime_ns for file in finished(out)}
    done = sum(int(name.partition("-")[2]) for name in before)
    assert 0 < done < ROWS
    run = TextEmbedding.run
    with pytest.MonkeyPatch.context() as patched:
        rows = []
        patched.setattr(
            TextEmbedding, "run", lambda self, inputs: rows.extend(inputs) or run(self, inputs)
        )
        assert main([*command, "--num-workers", "1"]) == 0
    assert len(rows) == ROWS - done
    assert out.read_bytes() == (work / out.name).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_the_main_process_is_killed(work, tmp_path):
    """Its workers end; a run with another number of workers goes on."""
    out = tmp_path / "answers.csv"
    command = [sys.executable, "-m", "m2_plugin.cli", "predict"]
    command += arguments(work, "predict", out, "--num-workers", 2)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: finished(out) or process.poll() is not None)
    process.kill()
    process.wait()
    assert not out.exists() and finished(out)
    assert main(["predict", *arguments(work, "predict", out, "--num-workers", 1)]) == 0
    assert out.read_bytes() == (work / out.name).read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_an_error_of_a_worker_is_one_line(work, tmp_path, capfd):
    """And leaves nothing, since nothing was done."""
    flags = ["--num-workers", 2, "--device", "cuda"]
    assert main(["embed", *arguments(work, "embed", tmp_path / "v.npy", *flags)]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("--device: torch has no device 'cuda' here")
    assert not list(tmp_path.iterdir())


def test_a_process_loads_an_edited_model_again(work):
    """A worker of a cluster may live longer than the model in a folder."""
    one = Work.of(load, work / "embed", Settings())
    assert one.model() is one.model()
    (work / "embed" / "notes.txt").write_text("edited")
    with pytest.raises(ValueError, match="was changed meanwhile"):
        Work.of(load, work / "predict", Settings()), chunks._loaded.cache_clear(), one.model()
    assert Work.of(load, work / "embed", Settings()).model() is not None
    (work / "embed" / "notes.txt").unlink()


def test_the_digest_of_a_folder(tmp_path, monkeypatch):
    """Each file is read once, and again when it was changed."""
    read = []
    hashed = hashlib.file_digest
    monkeypatch.setattr(
        "hashlib.file_digest", lambda file, name: read.append(file.name) or hashed(file, name)
    )
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    first = digest(tmp_path)
    assert digest(tmp_path) == first and len(read) == 2
    (tmp_path / "b").write_text("changed")
    assert digest(tmp_path) != first and read[2:] == [str(tmp_path / "b")]
    (tmp_path / "b").write_text("b")
    assert digest(tmp_path) == first


def test_parts(tmp_path, caplog):
    parts = Parts(tmp_path)
    parts.write((0, 2), b"one\ntwo\n", 1)
    parts.write((2, 1), b"", 0)
    assert parts.read((0, 2)) == (b"one\ntwo\n", 1) and parts.read((2, 1)) == (b"", 0)
    assert parts.read((0, 3)) is None and not caplog.messages
    assert parts.rows() == 3 and list(parts.contents([(0, 2), (2, 1)])) == [b"one\ntwo\n", b""]
    with pytest.raises(ValueError, match="changed meanwhile"):
        list(parts.contents([(3, 1)]))


def test_gpus(monkeypatch):
    """Each process gets one in turn; a device that is named is used as it is."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for visible, names in [
        (None, ["0", "1"]),
        ("3,1", ["3", "1"]),
        ("GPU-a,GPU-b,-1,5", ["GPU-a", "GPU-b"]),
    ]:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert chunks._gpus("auto") == chunks._gpus("cuda") == names
    assert chunks._processes("auto", names) == 2
    assert chunks._gpus("cpu") is None and chunks._gpus("cuda:1") is None
    assert chunks._processes("cuda:1", None) == 1
    assert chunks._processes("cpu", None) == len(os.sched_getaffinity(0))
