"""The command `m2-plugin`."""

import importlib
import subprocess
import sys

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


@pytest.mark.parametrize("name", ["convert-c4", "convert-text", "convert-pairs"])
def test_converters_are_the_scripts(name):
    script = name.replace("-", "_")
    module, _, function = cli.COMMANDS[name][0].partition(":")
    source = importlib.import_module(module)
    text = (ROOT / "data_prep" / f"{script}.py").read_text()
    assert callable(getattr(source, function))
    assert f"from {module} import {function}" in text


def test_usage_names_the_subcommand():
    command = [sys.executable, "-m", "m2_plugin.cli", "convert-text", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: m2-plugin convert-text ")
