import os

import pytest

from m2_plugin.files import read_json, whole, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "points.csv"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
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
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("folder", [True, False])
def test_whole_or_not_there(tmp_path, folder):
    path = tmp_path / "deep" / "out"

    def fill(temporary):
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


def test_what_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file/out", "file/deep/out", "/proc/out"):
        refused = pytest.raises(ValueError, match=f"{name}' cannot be written: ")
        with refused, whole(tmp_path / name):
            pytest.fail("it began to write")
