"""Runs kernels as they are compiled, without a GPU: `pytest --emulate 90 tests/ops`.

Where the tests would call Triton's interpreter, a process beside them compiles the launch for a
compute capability, and `machine.py` executes the result on the tensors. With
`M2_TESTS_COMPILER=PYTHON`, that process runs in another environment, with its version of Triton.
"""

import atexit
import functools
import importlib
import inspect
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tests import utils
from tests.ops.machine import GlobalMemory, Machine, Program, PtxError
from tests.utils import ROOT


@dataclass(frozen=True)  # a tuple would be taken apart
class Pointer:
    """All that the compiler wants to know of a tensor."""

    dtype: torch.dtype
    alignment: int  # of its address, modulo 16

    def data_ptr(self) -> int:
        return self.alignment

    def ptr_range(self) -> int:
        return 1 << 31


class Compiled(NamedTuple):
    ptx: str
    shared: int
    warps: int


def emulate(capability: int) -> None:
    """Let all kernels run so in this process, with the configurations of such a GPU."""
    from m2_plugin.ops import backend
    from m2_plugin.ops.kernels import hyena_filters, launch, monarch_mlp
    from tests.ops.aot import NamedTarget

    compiler = Compiler(capability)
    triton.runtime.driver.set_active(NamedTarget(capability))
    for module in (hyena_filters, launch, monarch_mlp):
        module.interpreted = lambda: False
    why_no_kernel = backend.why_no_kernel

    def also_bfloat16(device: torch.device, dtype: torch.dtype) -> str | None:
        return why_no_kernel(device, torch.float16 if dtype == torch.bfloat16 else dtype)

    backend.why_no_kernel = also_bfloat16
    utils.KERNEL_DTYPES.append(torch.bfloat16)

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        return functools.partial(launched, compiler, kernel.fn, grid)

    triton.runtime.interpreter.InterpretedFunction.__getitem__ = getitem


def launched(
    compiler: "Compiler", function: Callable, grid: Sequence[int], *args: Any, **kwargs: Any
) -> None:
    """Compile a launch and execute it."""
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    constants = {
        name
        for name, parameter in bound.signature.parameters.items()
        if "constexpr" in str(parameter.annotation)
    }
    given = [v for name, v in bound.arguments.items() if name not in constants and v is not None]
    compiled = compiler.compile(function, list(bound.arguments.values()), options)
    assert "m64n8k" not in compiled.ptx, f"{function.__name__}: too narrow, see fitting_warps"
    program = parsed(compiled.ptx)
    tensors = [v for v in given if isinstance(v, Tensor)]
    memory = GlobalMemory([(base, data) for base, data in storages(tensors).items()])
    # The compiler makes a constant of 1.
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v in given if not is_one(v)]
    values += [0] * (program.num_params - len(values))  # room that these kernels do not use
    sizes = (*grid, 1, 1)[:3]
    machine = Machine(program, memory, values, sizes, 32 * compiled.warps, compiled.shared)
    for z, y, x in itertools.product(*map(range, reversed(sizes))):
        try:
            machine.run((x, y, z))
        except PtxError as error:
            raise AssertionError(f"{function.__name__}, block {x, y, z}: {error}") from None


def is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def storages(tensors: Sequence[Tensor]) -> dict[int, Any]:
    """Return the bytes of the tensors' storages by their addresses."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            found[storage.data_ptr()] = data.numpy()
    return found


@functools.lru_cache(256)
def parsed(ptx: str) -> Program:
    return Program(ptx)


class Compiler:
    """A process that compiles: in this one, the interpreter has taken the compiler's place."""

    def __init__(self, capability: int):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        env.pop("TRITON_INTERPRET", None)
        python = os.environ.get("M2_TESTS_COMPILER", sys.executable)
        self.process = subprocess.Popen(
            [python, "-m", "tests.ops.emulation", str(capability)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT,
        )  # fmt: skip
        atexit.register(self.process.kill)
        self.known: dict[Any, Compiled] = {}

    def compile(self, function: Callable, args: list[Any], options: dict[str, Any]) -> Compiled:
        """Return what a launch compiles to."""
        args = [Pointer(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
        key = function.__module__, function.__name__, repr(args), repr(options)
        if key not in self.known:
            request = function.__module__, function.__name__, args, options
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            found = pickle.load(self.process.stdout)
            assert isinstance(found, Compiled), f"{function.__name__} does not compile: {found}"
            self.known[key] = found
        return self.known[key]


def serve(capability: int) -> None:
    """Compile what comes on the standard input, until it ends."""
    from tests.ops.aot import NamedTarget

    triton.runtime.driver.set_active(NamedTarget(capability))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed does not belong to the answers
    while True:
        try:
            module, name, args, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            kernel = getattr(importlib.import_module(module), name)
            done = kernel.run(*args, grid=(1,), warmup=True, **options)
            found: Any = Compiled(done.asm["ptx"], done.metadata.shared, done.metadata.num_warps)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        pickle.dump(found, out)
        out.flush()


if __name__ == "__main__":
    from tests.ops import emulation  # under the name by which pickles know it

    emulation.serve(int(sys.argv[1]))
