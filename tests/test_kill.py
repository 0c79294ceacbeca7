"""Commands that SIGKILL ends write all or nothing, and the next run is like an unbroken one."""

import random

import pytest

from tests.benchmarks.kill_commands import check, inputs, wrong


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    return folder, inputs(folder)


@pytest.mark.parametrize(
    "command", ["import", "export", "extend", "average", "embed", "predict", "train-report"]
)
def test_killed_and_run_again(command, work):
    folder, commands = work
    (name,) = (name for name, arguments in commands.items() if arguments[0] == command)
    tally = check(folder, name, commands[name], 3, random.Random(0))
    assert tally["kills"] == 3 and tally["before the end"] > 0 and not wrong(tally), tally
