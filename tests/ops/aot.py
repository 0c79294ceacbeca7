"""Compiles every kernel launch without a GPU, and writes what each takes to stdout as JSON.

    python tests/ops/aot.py 80 90

Runs each launching function on meta tensors of the published sizes, with a driver that only names
a target: what is compiled is what a machine with that GPU would run, or try when
it tunes. It needs a process of its own, because Triton's interpreter, which the tests use, replaces
the compiler when Triton is imported.
"""

import argparse
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from m2_plugin.ops.block_diagonal_linear import block_shape
from m2_plugin.ops.kernels import add_layer_norm as norm_kernels
from m2_plugin.ops.kernels import block_diagonal_linear as linear_kernels
from m2_plugin.ops.kernels import hyena_filters, launch, tuning
from m2_plugin.ops.kernels import linear_cross_entropy as loss_kernels
from m2_plugin.ops.kernels import monarch_mlp as mlp_kernels
from m2_plugin.ops.kernels.compilation import NamedTarget
from m2_plugin.ops.kernels.gated_long_conv import ALGORITHMS
from m2_plugin.ops.kernels.gates import Inputs
from m2_plugin.ops.reference.hyena_filters import Sizes, packed_shapes

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
# Algorithm, length, batch rows: each configuration of the FFTs, lengths that 16 divides and others,
# and one row or one position, which Triton compiles anew. The last have configurations of others.
LONG_CONVS = [
    ("toeplitz", 128, 64),
    ("toeplitz", 512, 64),
    ("fft", 1, 1),
    ("fft", 500, 64),
    ("fft", 1024, 64),
    ("fft", 2048, 64),
    ("fft", 4096, 64),
    ("fft", 16384, 64),
    ("fft", 32768, 1),
    ("largest fft", 8192, 64),
    ("toeplitz", 500, 64),
    ("fft", 1500, 64),
]
# Filters, directions, length, order.
FILTERS = [(24, 2, 128, 128), (2, 2, 2000, 128), (1, 1, 128, 64), (1, 2, 1, 16), (1, 2, 2, 16)]
USUAL_LONG_CONVS, USUAL_FILTERS = LONG_CONVS[:-2], FILTERS[:-1]
N = 4096


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


def launches(capability: int, usual: bool) -> list[dict[str, Any]]:
    """Compile what `cases` launch; one row for each launch."""
    triton.runtime.driver.set_active(NamedTarget(capability))
    rows: list[dict[str, Any]] = []
    case, alternative = "", False

    def compile_only(function: Any, grid: Any, args: Any, options: dict[str, Any]) -> None:
        kernel = function.run(*args, grid=grid, warmup=True, **options)
        rows.append(
            {
                "case": case,
                "kernel": function.fn.__name__,
                "capability": capability,
                "alternative": alternative,
                "shared": kernel.metadata.shared,
                "wgmma": "wgmma" in kernel.asm["ptx"],
                "narrow": "m64n8k" in kernel.asm["ptx"],
                **usage(kernel.asm["cubin"]),
            }
        )

    def try_all(op: str, key: tuple, candidates: Sequence[Any], run: Callable, device: Any) -> Any:
        nonlocal alternative
        outer, alternative = alternative, True
        others = [] if usual and capability < 90 else candidates[1:]
        for config in others:  # the caller launches what is returned
            run(config)
        alternative = outer
        return candidates[0]

    launch._launch = compile_only
    tuning.best = try_all
    for name, run in cases(usual):
        case, alternative = name, name.startswith("largest fft")
        run()
    return rows


def cases(usual: bool) -> list[tuple[str, Callable[[], Any]]]:
    """What is launched: a name, and a function that launches it.

    Args:
        usual: Whether to leave out what nobody launches in fp32 without `backend: triton`, all but
            the base size in fp32, lengths with the configuration of others, and FFTs without mask.
            Before Hopper, `launches` then leaves out what only tuning tries.
    """
    found: list[tuple[str, Callable[[], Any]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        fewer = usual and dtype == torch.float32
        found.append((f"linear D768 K4 {name}", lambda d=dtype: linear(768, 4, d)))
        found.append((f"linear D960 K4 {name}", lambda d=dtype: linear(960, 4, d)))
        found.append((f"linear D768 K1 {name}", lambda d=dtype: linear(768, 1, d)))
        for hidden in (768,) if fewer else (128, 768, 960, 1536, 1792):
            text = f"add_layer_norm D{hidden} {name}"
            found.append((text, lambda h=hidden, d=dtype: add_layer_norm(h, d)))
        found.append((f"loss V30528 {name}", lambda d=dtype: loss(30528, d)))
        found.append((f"loss V30521 {name}", lambda d=dtype: loss(30521, d)))
        lengths = USUAL_LONG_CONVS if usual else LONG_CONVS
        for algorithm, length, batch in LONG_CONVS[:2] if fewer else lengths:
            text = f"{algorithm} L{length} B{batch} {name}"
            bare = not usual or algorithm == "toeplitz"  # an FFT launches nothing else then
            args = (algorithm, length, batch, dtype, bare)
            found.append((text, lambda a=args: gated_long_conv(*a)))
        for hidden, nblocks, glu, dropout in MLPS[:1] if fewer else MLPS:
            blocks = hidden // nblocks, 4 * hidden // nblocks
            if mlp_kernels.takes_blocks(*blocks, torch.device("meta"), dtype):
                text = f"mlp {'glu' if glu else 'plain'} D{hidden} K{nblocks} p{dropout} {name}"
                args = (hidden, nblocks, glu, dropout, dtype)
                found.append((text, lambda a=args: mlp(*a)))
    # What fp32 runs under `torch.backends.cuda.matmul.allow_tf32`, which Composer sets.
    found.append(("linear D768 K4 tf32", lambda: tf32(lambda: linear(768, 4, torch.float32))))
    for glu in (True, False):
        text = f"mlp {'glu' if glu else 'plain'} D768 K8 p0.1 tf32"
        args = (768, 8, glu, 0.1, torch.float32)
        found.append((text, lambda a=args: tf32(lambda: mlp(*a))))
    for sizes in USUAL_FILTERS if usual else FILTERS:
        found.append((f"filters {sizes}", lambda s=sizes: filters(*s)))
    return found


def tf32(run: Callable[[], Any]) -> None:
    """Run with TF32 allowed in matrix products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(hidden: int, nblocks: int, dtype: torch.dtype) -> None:
    x, grad = meta(N, hidden, dtype=dtype), meta(N, 8 * hidden, dtype=dtype)
    weight = meta(*block_shape(hidden, 8 * hidden, nblocks), dtype=dtype)
    linear_kernels.product(x, weight, meta(8 * hidden, dtype=dtype), 8 * hidden)
    linear_kernels._backward(grad, x, weight, [True, True, True])


def add_layer_norm(hidden: int, dtype: torch.dtype) -> None:
    x, weight = meta(N, hidden, dtype=dtype), meta(hidden, dtype=torch.float32)
    rows = meta(128, hidden, dtype=torch.float32)
    mean = meta(N, dtype=torch.float32)
    for residual, sequence_last in ((x, True), (x, False), (rows, True), (None, True)):
        norm_kernels._forward(x, residual, weight, weight, 1e-12, dtype, sequence_last)
        grad = meta(hidden, N, dtype=dtype).t() if sequence_last else x
        norm_kernels._backward(grad, x, residual, weight, mean, mean, sums=True)


def loss(vocabulary: int, dtype: torch.dtype) -> None:
    x, weight = meta(N, 768, dtype=dtype), meta(vocabulary, 768, dtype=torch.float32)
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    for needs_grad in (True, False):
        loss_kernels._compute(x, weight, weight[:, 0], labels, needs_grad)


def mlp(hidden: int, nblocks: int, glu: bool, dropout: float, dtype: torch.dtype) -> None:
    size = 4 * hidden
    x = meta(N, hidden, dtype=dtype)
    up = meta(*block_shape(hidden, size * (2 if glu else 1), nblocks), dtype=dtype)
    down = meta(*block_shape(size, hidden, nblocks), dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    mlp_kernels._forward(x, up, down, meta(hidden, dtype=dtype), glu, dropout, seed)
    mlp_kernels._backward(x, x, up, down, glu, dropout, seed)


def filters(number: int, directions: int, length: int, order: int) -> None:
    sizes = Sizes(number, directions, length, 768, 5, order, length - 1)
    fp32 = functools.partial(meta, dtype=torch.float32)
    packed = fp32(sum(math.prod(shape) for shape in packed_shapes(sizes)))
    args = packed, fp32(length), fp32(768), sizes, 1.0
    hyena_filters._backward(hyena_filters.compute_taps(*args), *args)


def gated_long_conv(
    algorithm: str, length: int, batch: int, dtype: torch.dtype, bare: bool
) -> None:
    """Launch both directions; if `bare`, also without what may be missing."""
    by = ALGORITHMS[algorithm]
    channels = 32
    p = meta(3 * channels, batch, length, dtype=dtype).permute(1, 2, 0)
    u = meta(batch, length, channels, dtype=dtype)
    weight, bias = (
        meta(3 * channels, 3, dtype=torch.float32),
        meta(3 * channels, dtype=torch.float32),
    )
    taps = meta(channels, 2 * length - 1, dtype=torch.float32)
    mask = meta(batch, length, dtype=dtype)
    variants = [(p, u, weight, bias, taps, taps, mask)]
    if bare:
        variants.append((p, None, weight, bias, taps, None, None))
    for args in variants:
        inputs = Inputs(*args)
        by.forward(inputs, causal=inputs.mask is None)
        by.backward(u, inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--usual", action="store_true", help="leave out most of fp32, and more")
    args = parser.parse_args()
    rows = [row for c in args.capabilities for row in launches(c, args.usual)]
    sys.stdout.write(json.dumps(rows))
