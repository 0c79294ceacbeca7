import pytest
import torch

from m2_plugin import cli, doctor
from m2_plugin.ops.kernels import check


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


def test_verdicts_are_found_again_and_shown(small, capsys, monkeypatch):
    """As on a GPU, which there need not be here: the ops run where they can."""
    asked = []

    def recheck(op, device, dtype, tf32):
        asked.append((device, dtype))
        return "forward: result 0 has an error of 0.5" if op == "monarch_mlp" else None

    monkeypatch.setattr(check, "recheck", recheck)
    found = doctor.compare(torch.device("cuda", 0), torch.bfloat16)
    ops = {"add_layer_norm", "hyena_filters"}
    ops |= {"block_diagonal_linear", "linear_cross_entropy", "monarch_mlp"}
    assert ops | {"gated_long_conv by fft", "gated_long_conv by toeplitz"} <= set(found)
    assert [op for op, problem in found.items() if problem] == ["monarch_mlp"]
    assert set(asked) == {(torch.device("cuda", 0), torch.bfloat16)}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(doctor, "why_no_kernel", lambda device, dtype: None)
    monkeypatch.setattr(doctor, "cases", lambda *sizes: [])
    assert cli.main(small) == 1
    text = capsys.readouterr().out
    assert "linear_cross_entropy            right" in text
    assert "monarch_mlp                     forward: result 0 has an error of 0.5" in text
    assert "broken: monarch_mlp" in text
