import logging

import pytest
import torch

from m2_plugin.ops import backend
from m2_plugin.ops.backend import failures, run_kernel, use_kernel
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear

CPU = torch.zeros(2)


@pytest.fixture
def no_failures(monkeypatch):
    monkeypatch.setattr(backend, "_failed", {})


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="one of auto, torch, triton, not 'cuda'"):
        use_kernel("cuda", "op", CPU)


def test_auto_takes_pytorch_on_a_cpu_and_torch_always():
    assert not use_kernel("auto", "op", CPU)
    assert not use_kernel("torch", "op", CPU)


def test_forced_kernel_that_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="float64"):
        use_kernel("triton", "op", CPU.double())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="run on CUDA devices, not on cpu"):
        block_diagonal_linear(torch.zeros(2, 4), torch.zeros(2, 2, 2), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16"):
        use_kernel("triton", "op", CPU.bfloat16())


def broken(x):
    raise RuntimeError("no such instruction\nand more")


def test_a_failing_kernel_warns_once_and_falls_back(no_failures, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert run_kernel("op", False, broken, lambda x: x + 1, 1) == 2
    warnings = [r.message for r in caplog.records]
    assert len(warnings) == 1 and "op failed (RuntimeError: no such instruction)" in warnings[0]
    assert "op" in failures()


def test_a_forced_kernel_that_fails_raises(no_failures):
    with pytest.raises(RuntimeError, match="no such instruction"):
        run_kernel("op", True, broken, lambda x: x + 1, 1)


def test_out_of_memory_is_not_a_broken_kernel(no_failures):
    def full(x):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        run_kernel("op", False, full, lambda x: x + 1, 1)
    assert not failures()
