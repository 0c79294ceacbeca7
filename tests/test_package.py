"""The wheel holds all that an installed package needs, and a stranger can use it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.utils import ROOT

UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from an sdist, as an index would serve them."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([UV, "build", "--quiet", "--out-dir", out, ROOT], check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_carries_recipes_scripts_and_data(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "yamls", "data_prep", "train.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        for path in tracked:
            assert archive.read(f"m2_plugin/share/{path}") == (ROOT / path).read_bytes(), path
        names = archive.namelist()
    assert "m2_plugin/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"m2_plugin"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "m2_plugin").rglob("*.py")}
    assert modules <= set(names)


@pytest.mark.slow
def test_everything_works_from_an_empty_folder(wheel):
    """With the dependencies that are here; `package_check.py` installs them, too, by hand."""
    check = ROOT / "tests" / "package_check.py"
    result = subprocess.run(
        [sys.executable, check, wheel, "--by", "here"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
