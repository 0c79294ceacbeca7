"""Commands that SIGKILL ends write all or nothing, and the next run is like an unbroken one."""

import random

import pytest
from tqdm import tqdm

from tests.benchmarks.kill_commands import check, inputs, wrong
from tests.benchmarks.kill_conversions import check_conversion, conversions
from tests.benchmarks.kill_sweep import check_sweep


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    return folder, inputs(folder, workers=1)  # several: tests/test_chunks.py


@pytest.mark.parametrize(
    "command", ["import", "export", "extend", "average", "embed", "predict", "train-report"]
)
def test_killed_and_run_again(command, work):
    folder, commands = work
    (name,) = (name for name, arguments in commands.items() if arguments[0] == command)
    with tqdm.get_lock():  # as after the death of a process that held it: no other may need it
        tally = check(folder, name, commands[name], 3, random.Random(0))
    assert tally["kills"] == 3 and tally["before the end"] > 0 and not wrong(tally), tally


def test_a_killed_sweep(tmp_path):
    tally = check_sweep(tmp_path, 3, random.Random(0))
    assert tally["kills"] == 3 and tally["before the end"] > 0 and not wrong(tally), tally


@pytest.mark.parametrize(
    ("command", "way"),
    [("convert-text", "group"), ("convert-text tokens", "worker"), ("convert-pairs", "sending")],
)
def test_conversions_killed_and_run_again(command, way, tmp_path):
    if way == "sending":
        pytest.importorskip("s3fs")
    arguments = conversions(tmp_path)[command]
    tally = check_conversion(tmp_path, command, arguments, way, 2, random.Random(0))
    assert tally["kills"] == 2 and not wrong(tally), tally
