"""Launches that several processes compile before one needs them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m2_plugin.ops.kernels import compilation, launch
from m2_plugin.ops.kernels.launch import launch_kernel, noted_launches
from tests.utils import ROOT

# In a process of its own, for the interpreter takes the compiler's place in this one. As on a
# machine with two CPUs and an H100.
SCRIPT = """
import os, sys
from pathlib import Path
from functools import partial

import torch
import triton

from m2_plugin.ops.kernels import check, compilation, launch, linear_cross_entropy
from m2_plugin.ops.kernels.compilation import compile_together
from m2_plugin.ops.kernels.launch import launch_kernel

triton.runtime.driver.set_active(compilation.NamedTarget(90))
compilation._processes = lambda: 2
cache = Path(os.environ["TRITON_CACHE_DIR"])
cubins = lambda: sorted(cache.rglob("*.cubin"))

def run(dtype):
    for case in check._cases["linear_cross_entropy"](dtype):
        case.kernel(*check._convert(case.args, device="meta"))

# What is launched a second time is compiled once; what cannot be compiled stands in no one's way.
def launches():
    run(torch.float16)
    run(torch.float16)
    launch_kernel(linear_cross_entropy.cross_entropy_kernel, (1,), "wrong")

compile_together(launches)
processes = [worker.process for worker in compilation._workers]
assert len(processes) == 2
compiled = cubins()
assert len(compiled) == 2, compiled
launch._launch = lambda kernel, grid, args, options: kernel.run(
    *args, grid=grid, warmup=True, **options
)
run(torch.float16)
assert cubins() == compiled

# They serve again, until they end.
compile_together(partial(run, torch.bfloat16))
assert [worker.process for worker in compilation._workers] == processes
assert len(cubins()) == 4
compilation.end_workers()
assert all(process.returncode is not None for process in processes)

# One that dies costs time only, and is replaced.
compile_together(partial(run, torch.float32))
for worker in compilation._workers:
    worker.process.kill()
    worker.process.wait()
compile_together(partial(run, torch.float64))
assert not compilation._workers
compile_together(partial(run, torch.float64))
assert len(cubins()) == 8

# What was compiled is not asked for again, nor with other numbers that are compiled alike.
def numbers(n):
    for given in ("wrong", "also wrong"):
        launch_kernel(linear_cross_entropy.cross_entropy_kernel, (1,), n, given)

asked, compile = [], compilation._compile
compilation._compile = lambda r, *rest: asked.append(len(r)) or compile(r, *rest)
for again in (partial(run, torch.float64), partial(run, torch.float16)):
    compile_together(again)
for n in (32, 48, 33, 1, 35, 1):
    compile_together(partial(numbers, n))
assert asked == [2, 2, 2], asked

# They end when nothing comes for a while.
processes = [worker.process for worker in compilation._workers]
compilation.IDLE_SECONDS = 0.1
compile_together(partial(numbers, 1 << 40))
compilation._timer.join(60)
assert all(process.returncode is not None for process in processes)
"""


def test_processes_compile_what_a_function_would_launch(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_launch_can_be_noted():
    for path in Path(compilation.__file__).parent.glob("*.py"):
        assert not re.search(r"_kernel\[", path.read_text()), f"{path}: use launch_kernel"


class Compiled:
    """What Triton compiled: it keeps what it is launched with, and by which way."""

    launch_enter_hook = launch_exit_hook = None
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launched = []
        self.watched = []

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (function, metadata) == ("function", "metadata")
        assert (launch_metadata, enter, leave) == (None, None, None)
        self.launched.append(((x, y, z), args, stream))

    def __getitem__(self, grid):
        return lambda *args, stream: self.watched.append((grid, args, stream))


class Compiling:
    """A kernel that Triton compiles in each launch."""

    arg_names = ("x_ptr", "y_ptr", "count", "FIRST", "SECOND")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def test_a_launch_like_one_before_passes_triton_by(monkeypatch):
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, other = Compiling(), Compiling()
    x = torch.zeros(64)
    options = {"SECOND": 2, "FIRST": 1, "num_warps": 4}
    for _ in range(3):
        launch_kernel(kernel, (5, 6), x, x, 3, **options)
    (compiled,) = kernel.compiled
    # The grid has three dimensions, and constants come in the kernel's order.
    assert compiled.launched == 2 * [((5, 6, 1), (x, x, 3, 1, 2), 7)]
    launch_kernel(kernel, (5, 6), x.clone(), x[4:], 3, **options)  # at a multiple of 16 bytes
    assert len(compiled.launched) == 3 and len(kernel.compiled) == 1
    unlike = (
        (kernel, (5, 7), (x, x, 3), options),
        (kernel, (5, 6), (x, x, 4), options),
        (kernel, (5, 6), (x, x.half(), 3), options),
        (kernel, (5, 6), (x, x[1:], 3), options),
        (kernel, (5, 6), (x, x, 3), options | {"FIRST": 2}),
        (kernel, (5, 6), (x, x, 3), options | {"num_warps": 8}),
        (kernel, (5, 6), (x, x, 3), {"SECOND": 1, "FIRST": 2, "num_warps": 4}),
        (other, (5, 6), (x, x, 3), options),
    )
    for number, (which, grid, args, constants) in enumerate(unlike, 2):
        launch_kernel(which, grid, *args, **constants)
        assert len(kernel.compiled) + len(other.compiled) == number
    assert len(compiled.launched) == 3


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_each_launch(name, monkeypatch):
    """It is a function for Triton 3.4 and older, and a list of functions from then on."""
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(launch, "_HOOKS", hooks)
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, x = Compiling(), torch.zeros(64)
    launched = (5, 1, 1), (x, x, 3, 1, 2), 7
    for hook in (None, print, SimpleNamespace(calls=[print]), SimpleNamespace(calls=[])):
        setattr(hooks, name, hook)
        launch_kernel(kernel, (5,), x, x, 3, FIRST=1, SECOND=2)
    (compiled,) = kernel.compiled  # in the first launch
    assert compiled.watched == [launched, launched] and compiled.launched == [launched]


def test_not_too_many_launches_are_kept(monkeypatch):
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(launch, "MOST_LAUNCHERS", 4)
    kernel, x = Compiling(), torch.zeros(1)
    for n in range(100):
        launch_kernel(kernel, (n,), x, x, 1, FIRST=1, SECOND=2)
        assert len(launch._launchers) <= 4


class Kernel:
    """Keeps what it is launched with."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))


def test_a_launch_is_noted_instead():
    kernel, x = Kernel(), torch.zeros(1)
    with pytest.raises(RuntimeError), noted_launches() as noted:
        launch_kernel(kernel, (2, 3), x, 1, SIZE=4)
        raise RuntimeError
    assert noted == [(kernel, (x, 1), {"SIZE": 4})]
    assert not kernel.launched
    launch_kernel(kernel, (2, 3), x, 1, SIZE=4)
    assert kernel.launched == [((2, 3), (x, 1), {"SIZE": 4})]


def test_nothing_runs_where_nothing_is_compiled(monkeypatch):
    def never():
        raise AssertionError

    compilation.compile_together(never)  # in the interpreter
    monkeypatch.setattr(compilation, "interpreted", lambda: False)
    monkeypatch.setattr(compilation, "_processes", lambda: 1)
    compilation.compile_together(never)


@pytest.mark.parametrize(
    ("cpus", "ranks", "processes"), [(1, "", 1), (6, "", 6), (6, "2", 3), (6, "8", 1), (99, "", 16)]
)
def test_ranks_share_the_cpus(monkeypatch, cpus, ranks, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert compilation._processes() == processes


def test_ranks_begin_at_different_requests(monkeypatch):
    taken = []

    class Worker:
        def __init__(self, capability):
            assert capability == 90

        def compile(self, request):
            taken.append(request)

        def end(self):
            pass

    monkeypatch.setattr(compilation, "_Worker", Worker)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        compilation._compile([b"a", b"b", b"c", b"d"], 90, 1)
        compilation.end_workers()
    assert taken == [b"a", b"b", b"c", b"d", b"c", b"d", b"a", b"b"]


def test_a_request_says_how_a_tensor_is_aligned():
    x = torch.zeros(9)
    kernel = type("Kernel", (), {"fn": launch_kernel})
    request = compilation.Request.of(kernel, (x, x[1:], 3), {"SIZE": 4})
    assert (request.module, request.kernel) == (launch_kernel.__module__, "launch_kernel")
    aligned, shifted, number = request.args
    assert aligned.alignment == x.data_ptr() % 16
    assert shifted.alignment == (x.data_ptr() + 4) % 16
    assert (aligned.dtype, number, request.options) == (torch.float32, 3, {"SIZE": 4})
