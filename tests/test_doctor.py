import pytest
import torch

from m2_plugin import cli, doctor


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(doctor, "milliseconds", lambda run, device: 0.0)
    return ["doctor", "--batch", "1", "--length", "16", "--hidden-size", "64"]


def test_says_what_runs(small, capsys):
    assert cli.main(small) == 0
    text = capsys.readouterr().out
    for part in ("torch 2", "kernels: Triton", "monarch_mlp", "everything works"):
        assert part in text


def test_kernel_that_errs_is_reported(small, capsys, monkeypatch):
    exact = doctor.monarch_mlp

    def wrong(*args, backend, **kwargs):
        y = exact(*args, backend="torch", **kwargs)
        return y * 1.1 if backend == "triton" else y

    monkeypatch.setattr(doctor, "monarch_mlp", wrong)
    assert cli.main(small) == 1
    text = capsys.readouterr().out
    assert "monarch_mlp: the kernel has a larger error than PyTorch" in text
    assert "broken: monarch_mlp" in text


def test_without_a_kernel_it_says_why(small, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(small) == 0
    assert "plain PyTorch runs: the kernels run on CUDA devices" in capsys.readouterr().out
