"""The command `m2-plugin`."""

import os
import signal
import subprocess
import sys
import time

import pytest

from m2_plugin import __version__, cli
from tests.utils import ROOT


def test_says_its_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"m2-plugin {__version__}\n"


def test_lists_its_commands(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["recipe"]) == 2
    assert "no command 'recipe'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["convert-c4", "convert-text", "convert-pairs", "mine-negatives"])
def test_converters_are_the_scripts(name):
    text = (ROOT / "data_prep" / f"{name.replace('-', '_')}.py").read_text()
    assert f'sys.exit(run("{name}"))' in text and "from m2_plugin.cli import run" in text


def test_usage_names_the_subcommand():
    command = [sys.executable, "-m", "m2_plugin.cli", "convert-text", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: m2-plugin convert-text ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--out must end in .npy,\n  not 'x'"), 1, "--out must end in .npy,; not 'x'\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "a.txt: No such file\n"),
        (FileExistsError("These files exist: a.txt"), 1, "These files exist: a.txt\n"),
        (OSError(28, "no space left on the disk", "out"), 1, "out: no space left on the disk\n"),
        (MemoryError(), 1, "out of memory\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe\n"),  # of a worker
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to continue\n"),
        (SystemExit(130), 130, "interrupted: run the same command again to continue\n"),
    ],
)
def test_a_known_error_is_one_line(error, code, line, capsys):
    def command() -> int:
        raise error

    assert cli.guarded(command) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    def command() -> int:
        return {}["bug"]

    with pytest.raises(KeyError):
        cli.guarded(command)


def test_an_interrupt_that_became_another_error(capsys):
    """As some libraries do while they are imported."""

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt as error:
            raise ImportError("a part of it is missing") from error
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's, if imported
    try:
        assert cli.guarded(command) == 130
        assert "interrupted" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


RECIPES = f"{sys.executable} -m m2_plugin.cli recipes"


@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        (f"{RECIPES} | true", 141, ""),
        (f"{RECIPES} --help | true", 141, ""),
        (f"{RECIPES} >&-", 0, ""),
        (f"{RECIPES} --copy nothing 2>&-", 1, ""),
        (
            f"{sys.executable} -m m2_plugin.cli >/dev/full",
            1,
            "standard output: No space left on device\n",
        ),
        (f"{RECIPES} --copy all --out /dev/null/x", 1, "/dev/null/x/data_prep: Not a directory\n"),
    ],
)
def test_what_takes_the_output_may_fail(shell, code, error, tmp_path):
    command = ["bash", "-o", "pipefail", "-c", shell]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (result.returncode, result.stderr) == (code, error)


def test_a_file_does_not_get_the_output_of_a_closed_stream(tmp_path):
    """The first file that is opened has the lowest free number: that of stdout."""
    shell = f"{RECIPES} --copy pretrain/bert-base --out {tmp_path} >&-"
    assert subprocess.run(["bash", "-c", shell]).returncode == 0
    copied = tmp_path / "yamls" / "pretrain" / "bert-base.yaml"
    assert copied.read_bytes() == (ROOT / "yamls" / "pretrain" / "bert-base.yaml").read_bytes()


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])
def test_an_interrupt_while_it_starts(seconds, tmp_path):
    (tmp_path / "texts.txt").write_text("one")
    command = [sys.executable, "-m", "m2_plugin.cli", "embed", "texts.txt", "--model", "none"]
    process = subprocess.Popen(
        [*command, "--out", "x.npy"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    ended = process.returncode, error
    interrupted = (130, "interrupted: run the same command again to continue\n")
    finished = ended[0] == 1 and "none" in error and error.count("\n") == 1
    # On a busy machine Python itself may not have started yet.
    not_begun = ended[0] == -signal.SIGINT and "cli.py" not in error
    assert ended == interrupted or finished or not_begun
    assert not (tmp_path / "x.npy").exists()
