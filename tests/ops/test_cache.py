"""The files that keep what was found out about kernels; `test_tuning.py` damages them."""

import pytest
import torch

from m2_plugin.ops.kernels import cache

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X/1 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_folders(monkeypatch):
    monkeypatch.delenv("M2_PLUGIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    path = cache.path("choices", CUDA)
    assert str(path.parent) == "/elsewhere/m2_plugin"
    assert path.name.startswith("NVIDIA-X-1-80GB-") and path.name.endswith("-choices.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache.path("choices", CUDA).parent) == "/home/someone/.cache/m2_plugin"
    monkeypatch.setenv("M2_PLUGIN_CACHE", "/mine")
    assert cache.path("choices", CUDA) == cache.path("choices", torch.device("cuda", 1))
    assert str(cache.path("checks", CUDA).parent) == "/mine"


def test_another_environment_has_another_file(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr(cache, "DRIVER", driver)
    names = {cache.path("checks", CUDA).name}
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
    assert cache.environment(CUDA)["driver"] == "570.86.15"
    names.add(cache.path("checks", CUDA).name)
    monkeypatch.setattr(torch, "__version__", "9.0")
    names.add(cache.path("checks", CUDA).name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    names.add(cache.path("checks", CUDA).name)
    monkeypatch.setattr(cache, "source_hash", lambda: "changed")
    names.add(cache.path("checks", CUDA).name)
    assert len(names) == 5


def test_the_source_of_all_ops_counts(monkeypatch):
    read = []
    original = cache.Path.read_bytes
    monkeypatch.setattr(cache.Path, "read_bytes", lambda p: read.append(p.name) or original(p))
    assert len(cache.source_hash.__wrapped__()) == 16
    assert {"monarch_mlp.py", "launch.py", "backend.py"} <= set(read)
