"""Runs kernels as they are compiled, without a GPU: `pytest --emulate 90 tests/ops`.

Where the tests would call Triton's interpreter, a process beside them compiles the launch for a
compute capability, and `machine.py` executes the result on the tensors. With
`M2_TESTS_COMPILER=PYTHON`, that process runs in another environment, with its version of Triton.
"""

import atexit
import functools
import inspect
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m2_plugin.ops.kernels.compilation import NamedTarget, Request, serve
from tests import utils
from tests.ops.machine import GlobalMemory, Machine, Program, PtxError
from tests.utils import ROOT

OPTIONS = "num_warps", "num_stages", "maxnreg"  # of the compiler


class Compiled(NamedTuple):
    ptx: str
    shared: int
    warps: int


def emulate(capability: int) -> None:
    """Let all kernels run so in this process, with the configurations of such a GPU."""
    from m2_plugin.ops import backend
    from m2_plugin.ops.kernels import hyena_filters, launch, monarch_mlp

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
        return functools.partial(launched, compiler, kernel, grid)

    triton.runtime.interpreter.InterpretedFunction.__getitem__ = getitem


def launched(
    compiler: "Compiler", kernel: Any, grid: Sequence[int], *args: Any, **kwargs: Any
) -> None:
    """Compile a launch and execute it."""
    options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    constants = {
        name
        for name, parameter in bound.signature.parameters.items()
        if "constexpr" in str(parameter.annotation)
    }
    given = [v for name, v in bound.arguments.items() if name not in constants and v is not None]
    compiled = compiler.compile(kernel, list(bound.arguments.values()), options)
    assert "m64n8k" not in compiled.ptx, f"{kernel.fn.__name__}: too narrow, see fitting_warps"
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
            raise AssertionError(f"{kernel.fn.__name__}, block {x, y, z}: {error}") from None


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

    def compile(self, kernel: Any, args: list[Any], options: dict[str, Any]) -> Compiled:
        """Return what a launch compiles to."""
        request = Request.of(kernel, tuple(args), options)
        key = repr(request)
        if key not in self.known:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            found = pickle.load(self.process.stdout)
            assert isinstance(found, Compiled), f"{request.kernel} does not compile: {found}"
            self.known[key] = found
        return self.known[key]


def result(kernel: Any) -> Compiled:
    """Return what is executed of a compiled kernel."""
    return Compiled(kernel.asm["ptx"], kernel.metadata.shared, kernel.metadata.num_warps)


if __name__ == "__main__":
    from tests.ops import emulation  # under the name by which pickles know it

    serve(int(sys.argv[1]), emulation.result)
