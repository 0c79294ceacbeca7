import logging

import pytest
import torch

from m2_plugin.ops import backend
from m2_plugin.ops.backend import failures, use_kernel
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.kernels.launch import allows_tf32, dot_precision
from m2_plugin.ops.kernels.run import run_kernel
from m2_plugin.ops.monarch_mlp import monarch_mlp
from tests.utils import KERNEL_DEVICE, gradients

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


def test_the_interpreter_takes_no_bfloat16(monkeypatch, request):
    if request.config.getoption("--emulate", None):
        pytest.skip("nothing is interpreted")
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


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch):
    """Also if a tuple of tensors comes first; the device is current while the kernel runs."""
    events = []

    class Guard:
        def __init__(self, x):
            self.x = x

        def __enter__(self):
            events.append(("enter", self.x))

        def __exit__(self, *error):
            events.append(("exit", self.x))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    elsewhere = torch.ones(1, device="meta")
    run_kernel("op", True, lambda pair, y: events.append("kernel"), None, (None, elsewhere), CPU)
    assert events[1] == "kernel" and len(events) == 3
    assert events[0][0] == "enter" and events[2][0] == "exit"
    assert events[0][1] is events[2][1] is elsewhere
    run_kernel("op", True, lambda x: events.append("kernel"), None, CPU)
    assert events[3:] == ["kernel"]


def test_tf32_is_read_in_both_of_pytorchs_ways(monkeypatch):
    class Old:
        allow_tf32 = True

    class New:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
    assert allows_tf32()
    monkeypatch.setattr(Old, "allow_tf32", False)
    assert not allows_tf32()
    monkeypatch.setattr(torch.backends.cuda, "matmul", New())
    assert allows_tf32() and dot_precision(torch.float32) == "tf32"
    monkeypatch.setattr(New, "fp32_precision", "ieee")
    assert not allows_tf32() and dot_precision(torch.float32) == "ieee"
    assert dot_precision(torch.float16) == "ieee"


def linear(x, weight, bias, backend):
    return block_diagonal_linear(x, weight, bias, backend=backend)


def mlp(x, up, down, bias, backend):
    return monarch_mlp(x, up, down, bias, 128, backend=backend)


def mixer(p, weight, bias, taps, u, res_taps, backend):
    mask = torch.ones_like(u[..., 0])
    return gated_long_conv(p, weight, bias, taps, u, res_taps, mask, backend=backend)


def causal(p, weight, bias, taps, backend):
    return gated_long_conv(p, weight, bias, taps, causal=True, backend=backend)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (linear, [(3, 8), (2, 5, 4), (10,)]),
        (mlp, [(3, 32), (2, 128, 16), (2, 16, 64), (32,)]),
        (mixer, [(2, 5, 9), (9, 3), (9,), (3, 9), (2, 5, 3), (3, 9)]),
        (causal, [(2, 5, 9), (9, 3), (9,), (3, 9)]),
    ],
    ids=["linear", "mlp", "mixer", "causal"],
)
def test_fallback_gives_pytorchs_output_and_gradients(op, shapes, monkeypatch):
    """Through the registered op, whose kernels must not be called."""
    names = ("block_diagonal_linear", "monarch_mlp", "gated_long_conv")
    monkeypatch.setattr(backend, "_failed", dict.fromkeys(names, "broken"))
    monkeypatch.setattr(backend, "why_no_kernel", lambda device, dtype: None)
    inputs = [torch.randn(shape, device=KERNEL_DEVICE, requires_grad=True) for shape in shapes]
    if op is causal:
        inputs[3].data[:, :4] = 0

    def run(name):
        y = op(*inputs, name)
        return y, *gradients(y, torch.cos(y.detach()), *inputs)

    plain = run("torch")
    called = []

    def not_strict(name, strict, kernel, fallback, *args):
        called.append(name)
        return run_kernel(name, False, kernel, fallback, *args)

    for module in ("block_diagonal_linear", "monarch_mlp", "gated_long_conv"):
        monkeypatch.setattr(f"m2_plugin.ops.kernels.{module}.run_kernel", not_strict)
    for ours, theirs in zip(run("triton"), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(called) == 2  # forward and backward
