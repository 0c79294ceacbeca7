"""Compiles every kernel launch without a GPU, and writes what each takes to stdout as JSON.

    python tests/ops/aot.py 80 90

Runs each launching function on meta tensors of the published sizes, with a driver that only names
a target: what is compiled is what a machine with that GPU would run, or try when
it tunes. It needs a process of its own, because Triton's interpreter, which the tests use, replaces
the compiler when Triton is imported.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from m2_plugin.ops.block_diagonal_linear import block_shape
from m2_plugin.ops.kernels import block_diagonal_linear as linear_kernels
from m2_plugin.ops.kernels import monarch_conv, toeplitz_conv, tuning
from m2_plugin.ops.kernels import monarch_mlp as mlp_kernels
from m2_plugin.ops.kernels.gates import Inputs

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Hidden size, blocks, GLU, dropout: the published sizes, and other numbers of blocks.
MLPS = [
    (768, 4, True, 0.1),
    (960, 4, True, 0.1),
    (1536, 4, True, 0.1),
    (1792, 4, True, 0.1),
    (768, 4, True, 0.0),
    (768, 4, False, 0.1),
    (768, 8, True, 0.1),
    (768, 2, True, 0.1),
    (128, 4, True, 0.1),
]
# Each configuration of the FFTs, for lengths that 16 divides and for others.
LONG_CONVS = [
    (toeplitz_conv, 128),
    (toeplitz_conv, 500),
    (monarch_conv, 1500),
    (monarch_conv, 2048),
    (monarch_conv, 4096),
    (monarch_conv, 16384),
]
N = 4096


class NamedTarget:
    """A driver that answers what device there is, and has none."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache  # a kernel is launched many times
def usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def launches(capability: int) -> list[dict[str, Any]]:
    """Compile what `cases` launch; one row for each launch."""
    triton.runtime.driver.set_active(NamedTarget(capability))
    rows: list[dict[str, Any]] = []
    case = ""

    def compile_only(self: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            rows.append(
                {
                    "case": case,
                    "kernel": self.fn.__name__,
                    "capability": capability,
                    "shared": kernel.metadata.shared,
                    "wgmma": "wgmma" in kernel.asm["ptx"],
                    **usage(kernel.asm["cubin"]),
                }
            )

        return launch

    def try_all(op: str, key: tuple, candidates: Sequence[Any], run: Callable, device: Any) -> Any:
        for config in candidates[1:]:  # the caller launches what is returned
            run(config)
        return candidates[0]

    JITFunction.__getitem__ = compile_only
    tuning.best = try_all
    for name, run in cases():
        case = name
        run()
    return rows


def cases() -> list[tuple[str, Callable[[], Any]]]:
    """What is launched: a name, and a function that launches it."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found.append((f"linear D768 K4 {name}", lambda d=dtype: linear(768, 4, d)))
        found.append((f"linear D960 K4 {name}", lambda d=dtype: linear(960, 4, d)))
        found.append((f"linear D768 K1 {name}", lambda d=dtype: linear(768, 1, d)))
        for kernels, length in LONG_CONVS:
            text = f"{kernels.__name__.split('.')[-1]} L{length} {name}"
            found.append((text, lambda k=kernels, n=length, d=dtype: gated_long_conv(k, n, d)))
        for hidden, nblocks, glu, dropout in MLPS:
            if hidden // nblocks <= mlp_kernels.max_block_width(torch.device("meta"), dtype):
                text = f"mlp {'glu' if glu else 'plain'} D{hidden} K{nblocks} p{dropout} {name}"
                args = (hidden, nblocks, glu, dropout, dtype)
                found.append((text, lambda a=args: mlp(*a)))
    return found


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(hidden: int, nblocks: int, dtype: torch.dtype) -> None:
    x, grad = meta(N, hidden, dtype=dtype), meta(N, 8 * hidden, dtype=dtype)
    weight = meta(*block_shape(hidden, 8 * hidden, nblocks), dtype=dtype)
    linear_kernels.product(x, weight, meta(8 * hidden, dtype=dtype), 8 * hidden)
    linear_kernels._backward(grad, x, weight, [True, True, True])


def mlp(hidden: int, nblocks: int, glu: bool, dropout: float, dtype: torch.dtype) -> None:
    size = 4 * hidden
    x = meta(N, hidden, dtype=dtype)
    up = meta(*block_shape(hidden, size * (2 if glu else 1), nblocks), dtype=dtype)
    down = meta(*block_shape(size, hidden, nblocks), dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    mlp_kernels._forward(x, up, down, meta(hidden, dtype=dtype), glu, dropout, seed)
    mlp_kernels._backward(x, x, up, down, glu, dropout, seed)


def gated_long_conv(kernels: ModuleType, length: int, dtype: torch.dtype) -> None:
    batch, channels = 64, 32
    p = meta(3 * channels, batch, length, dtype=dtype).permute(1, 2, 0)
    u = meta(batch, length, channels, dtype=dtype)
    weight, bias = (
        meta(3 * channels, 3, dtype=torch.float32),
        meta(3 * channels, dtype=torch.float32),
    )
    taps = meta(channels, 2 * length - 1, dtype=torch.float32)
    mask = meta(batch, length, dtype=dtype)
    for args in ((p, u, weight, bias, taps, taps, mask), (p, None, weight, bias, taps, None, None)):
        inputs = Inputs(*args)
        kernels.forward(inputs, causal=inputs.mask is None)
        kernels.backward(u, inputs)


if __name__ == "__main__":
    sys.stdout.write(json.dumps([row for c in sys.argv[1:] for row in launches(int(c))]))
