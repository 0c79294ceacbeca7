"""The comparison of a kernel before its first use; the "kernels" here are PyTorch, right or not."""

import ast
import importlib
import json
import logging
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from m2_plugin.ops import backend
from m2_plugin.ops.backend import failures
from m2_plugin.ops.kernels import cache, check, gated_long_conv, run, tuning
from m2_plugin.ops.kernels.check import Case, NotCheckedError, WrongKernelError
from m2_plugin.ops.kernels.run import run_kernel
from tests.utils import KERNEL_DEVICE, ROOT

CPU = torch.device("cpu")
X = torch.arange(4.0)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A CPU is compared like a GPU, and nothing is known yet."""
    monkeypatch.setenv("M2_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("M2_PLUGIN_KERNEL_CHECK")
    monkeypatch.setattr(check, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(check, "_cases", {})
    monkeypatch.setattr(check, "_verdicts", {})
    monkeypatch.setattr(backend, "_failed", {})
    monkeypatch.setattr(run, "_captured", set())


class Kernel:
    """Doubles its input, with a relative error, or raises; `cases` counts the comparisons."""

    def __init__(self, error=0.0, raises=None):
        self.error, self.raises, self.compared = error, raises, 0
        check.register("op")(self.cases)

    def __call__(self, x):
        if self.raises:
            raise self.raises
        return 2 * x * (1 + self.error)

    def cases(self, dtype):
        self.compared += 1
        yield Case("double", self, lambda x: 2 * x, (check.draws(dtype)(5),))

    def run(self, strict=False, x=X):
        """Through `run_kernel`, whose fallback takes the negative to be told apart."""
        return run_kernel("op", strict, self, lambda x: -x, x)


def another_process(monkeypatch):
    monkeypatch.setattr(check, "_verdicts", {})
    monkeypatch.setattr(backend, "_failed", {})


def file():
    return cache.path("checks", CPU)


def test_a_right_kernel_is_compared_once_on_a_machine(monkeypatch):
    kernel = Kernel()
    for _ in range(2):
        assert torch.equal(kernel.run(), 2 * X)
    another_process(monkeypatch)
    assert torch.equal(kernel.run(), 2 * X)
    assert kernel.compared == 1
    assert json.loads(file().read_text()) == {
        "environment": cache.environment(CPU),
        "op float32": {"problem": None},
    }


def test_a_wrong_kernel_is_replaced_with_one_warning(monkeypatch, caplog):
    kernel = Kernel(error=1e-3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(kernel.run(), -X)
    (message,) = [r.message for r in caplog.records]
    for part in (
        "op failed (WrongKernelError: double, configuration 0: result 0 has an error of 0.001",
        "Please report it to the maintainers of m2_plugin",
        "m2-plugin doctor",
        f"torch {torch.__version__}",
        "dtype torch.float32",
    ):
        assert part in message
    assert "WrongKernelError" in failures()["op"]
    another_process(monkeypatch)
    assert torch.equal(kernel.run(), -X)
    assert kernel.compared == 1


def test_the_report_goes_where_the_package_says(caplog, monkeypatch):
    issues = {"Project-URL": "Issues, https://example.org/issues"}

    class Metadata:
        def get_all(self, name):
            return [issues[name]]

    monkeypatch.setattr(run.importlib.metadata, "metadata", lambda name: Metadata())
    Kernel(error=1.0).run()
    assert "report it at https://example.org/issues, with" in caplog.text


def test_a_forced_kernel_that_is_wrong_raises():
    with pytest.raises(WrongKernelError, match="double"):
        Kernel(error=float("nan")).run(strict=True)


def test_each_dtype_is_compared_when_it_comes(monkeypatch):
    kernel = Kernel(error=3e-3)  # too much in fp32, less than the rounding of bf16
    assert kernel.run(x=X.bfloat16()).dtype == torch.bfloat16
    assert not failures()
    monkeypatch.setattr(run, "allows_tf32", lambda: True)
    assert torch.equal(kernel.run(), 2 * X * (1 + 3e-3))
    monkeypatch.setattr(run, "allows_tf32", lambda: False)
    assert torch.equal(kernel.run(), -X)
    verdicts = json.loads(file().read_text())
    assert [verdicts[f"op {name}"]["problem"] is None for name in ("bfloat16", "tf32")] == [
        True
    ] * 2
    assert "error of 0.003" in verdicts["op float32"]["problem"]


def test_a_kernel_that_cannot_run_is_tried_again_by_the_next_process(monkeypatch, caplog):
    kernel = Kernel(raises=RuntimeError("no compiler"))
    assert torch.equal(kernel.run(), -X)
    assert "no compiler" in caplog.text and not file().exists()
    another_process(monkeypatch)
    kernel.raises = None
    assert torch.equal(kernel.run(), 2 * X)


def test_a_kernel_that_breaks_the_device_is_not_tried_again(monkeypatch):
    """The error goes up, because nothing runs any more; the next process takes PyTorch."""
    kernel = Kernel(raises=RuntimeError("illegal memory access"))
    monkeypatch.setattr(check, "_usable", lambda device: False)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check.problem("op", CPU, torch.float32, False)
    another_process(monkeypatch)
    assert "illegal" in check.problem("op", CPU, torch.float32, False)
    assert kernel.compared == 1


def test_out_of_memory_is_no_verdict():
    kernel = Kernel(raises=torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        kernel.run()
    assert not failures() and not file().exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"op float32": 3}', '{"op float32": {}}', '{"op float32": {"problem": 1}}']
)
def test_a_damaged_file_is_replaced(text):
    file().parent.mkdir()
    file().write_text(text)
    kernel = Kernel()
    assert torch.equal(kernel.run(), 2 * X) and kernel.compared == 1
    assert json.loads(file().read_text())["op float32"] == {"problem": None}


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    kernel = Kernel()
    for _ in range(2):
        assert torch.equal(kernel.run(), 2 * X)
    assert kernel.compared == 1 and "cannot be written" in caplog.text


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("M2_PLUGIN_KERNEL_CHECK", "0")
    kernel = Kernel(error=1.0)
    assert torch.equal(kernel.run(), 4 * X)
    assert kernel.compared == 0 and not file().exists()


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch, caplog):
    kernel = Kernel()
    monkeypatch.setattr(check, "_capturing", lambda device: True)
    for _ in range(2):
        assert torch.equal(kernel.run(), -X)
    assert caplog.text.count("Run the model once before") == 1
    assert kernel.compared == 0 and not failures()
    with pytest.raises(NotCheckedError):
        kernel.run(strict=True)
    monkeypatch.setattr(check, "_capturing", lambda device: False)
    assert torch.equal(kernel.run(), 2 * X)
    monkeypatch.setattr(check, "_capturing", lambda device: True)
    assert torch.equal(kernel.run(), 2 * X)


def test_an_op_in_fp32_has_one_verdict(monkeypatch):
    """Compared as strictly as fp32, whatever the model's dtype is."""
    asked = []

    def cases(dtype):
        asked.append(dtype)
        yield Case("double", lambda x: x * 2.002, lambda x: 2 * x, (check.draws(dtype)(5),))

    monkeypatch.setattr(check, "_always_fp32", set())
    check.register("op", always_fp32=True)(cases)
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        assert "error of 0.001" in check.problem("op", CPU, dtype, tf32)
    assert asked == [torch.float32]
    assert list(json.loads(file().read_text())) == ["environment", "op float32"]


def test_a_comparison_is_logged(caplog):
    kernel = Kernel()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            kernel.run()
    (message,) = [r.message for r in caplog.records]
    assert message == "Comparing the kernels of op float32 with PyTorch, once on this machine"


def test_recheck_replaces_a_verdict():
    kernel = Kernel(error=1.0)
    assert check.problem("op", CPU, torch.float32, False)
    kernel.error = 0.0
    assert check.recheck("op", CPU, torch.float32, False) is None
    assert torch.equal(kernel.run(), 2 * X)
    assert json.loads(file().read_text())["op float32"] == {"problem": None}


def test_the_training_does_not_notice_the_comparison():
    """It draws no numbers, and hooks on saved tensors, autocast and inference mode are not its."""
    packed = []

    def cases(dtype):
        x = check.draws(dtype)(5)

        def gradient(x):
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                return torch.autograd.grad((leaf * leaf).sum(), leaf)

        yield Case("square", gradient, gradient, (x,))

    check.register("op")(cases)
    before = torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert check.problem("op", CPU, torch.float32, False) is None
    assert not packed and torch.equal(torch.get_rng_state(), before)


def test_every_configuration_is_compared():
    """One that tuning may choose and is wrong counts; one that cannot run is left out."""
    launched = []

    def cases(dtype):
        def kernel(x):
            factor = tuning.best("op", (), (2, None, 3), lambda factor: None, x.device)
            launched.append(factor)
            return x * factor

        yield Case("double", kernel, lambda x: 2 * x, (torch.ones(3, dtype=dtype),))

    check.register("op")(cases)
    found = check.problem("op", CPU, torch.float32, False)
    assert launched == [2, None, 3]
    assert found == "double, configuration 2: result 0 has an error of 0.5, PyTorch has 0"


def test_every_configuration_is_compiled_before(monkeypatch):
    """Without memory or time of the device: on the meta device."""
    launched = []

    def kernel(x):
        launched.append((x.device.type, tuning.best("op", (), (2, 2), lambda f: None, x.device)))
        return 2 * x

    monkeypatch.setattr(check, "compile_together", lambda run: run())
    check.register("op")(lambda dtype: [Case("double", kernel, lambda x: 2 * x, (X,))])
    assert check.problem("op", CPU, torch.float32, False) is None
    assert launched == [("meta", 2), ("meta", 2), ("cpu", 2), ("cpu", 2)]


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ((X.view(2, 2), X), "shape"),
        ((X,), "1 results instead of 2"),
        ((X, X + torch.tensor([0, 0, 0, 1e-3])), "result 1 has an error of 0.00033"),
        ((X, X * float("inf")), "result 1 has an error of nan"),
    ],
)
def test_what_is_a_difference(result, found):
    case = Case("copy", lambda x: result, lambda x: (x, x), (X,))
    check.register("op")(lambda dtype: [case])
    assert found in check.problem("op", CPU, torch.float32, False)


def launched():
    """The ops that the package's modules launch by `run_kernel`, each by the name `OP` there."""
    for path in sorted((ROOT / "m2_plugin" / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_kernel":
                assert ast.unparse(node.args[0]) == "OP", path
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield importlib.import_module(module).OP


OPS = set(launched())  # which registers their cases
REGISTERED = check.registered()


def test_every_op_has_cases():
    """Under its own name, or for each of its algorithms."""
    assert len(OPS) == 6
    by_name = {name.split(" by ")[0] for name in REGISTERED}
    assert by_name == OPS
    assert [n for n in REGISTERED if n.startswith(gated_long_conv.OP)] == [
        f"{gated_long_conv.OP} by {name}" for name in gated_long_conv.ALGORITHMS
    ]


# Long convolutions take minutes in the interpreter.
SHORT = [op for op in REGISTERED if "conv" not in op]
KERNELS = f"""
import importlib, pkgutil
import torch
from m2_plugin.ops import kernels
from m2_plugin.ops.kernels import check
for module in pkgutil.iter_modules(kernels.__path__, "m2_plugin.ops.kernels."):
    importlib.import_module(module.name)
check.DEVICES = ({KERNEL_DEVICE!r},)
for op in {SHORT}:
    print(op, check.problem(op, torch.device({KERNEL_DEVICE!r}), torch.float16, False))
"""


def test_our_kernels_pass_and_another_process_knows(tmp_path):
    """Where kernels run; the second process reads what the first has found."""
    env = os.environ | {"M2_PLUGIN_CACHE": str(tmp_path)}
    for code in (
        KERNELS,
        "from m2_plugin.ops.kernels import check as k\nk._compare = None" + KERNELS,
    ):
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
        )
        assert out.stdout.splitlines() == [f"{op} None" for op in SHORT], out.stdout + out.stderr


@pytest.mark.parametrize("name", ["toeplitz", "fft", "largest fft"])
def test_our_long_convolutions_pass(name):
    # shorter than the real ones
    cases = partial(gated_long_conv._cases, gated_long_conv.ALGORITHMS[name], ((5, 18), (5, 15)))
    check.register("op")(cases)
    device = torch.device(KERNEL_DEVICE)
    assert check.recheck("op", device, torch.float16, False) is None


def test_the_other_algorithm_runs_if_one_is_wrong(monkeypatch):
    """And PyTorch if no other is to be considered at this length."""
    wrong = dict.fromkeys(
        ("gated_long_conv by toeplitz", "gated_long_conv by largest fft"), "wrong"
    )
    monkeypatch.setattr(gated_long_conv, "kernel_problem", lambda op, x: wrong.get(op))

    def chosen(length):
        p = torch.empty(2, length, 9, dtype=torch.float16)
        inputs = gated_long_conv.Inputs(p, *[None] * 6)
        return gated_long_conv.algorithm("forward", inputs, False, lambda module: None)

    fft = gated_long_conv.ALGORITHMS["fft"]
    assert chosen(512) is chosen(2048) is chosen(8192) is fft
    with pytest.raises(WrongKernelError, match="wrong"):
        chosen(128)
