"""Helpers that the launches of several kernels share."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from m2_plugin.ops.backend import capability, interpreted

# Compute capabilities whose multiprocessors have 227 KB of shared memory, the H100 and B200
# classes. These devices are "large"; others, with as little as 99 KB, are "small".
LARGE_CAPABILITIES = (9, 10)

_noting = threading.local()  # in a thread that notes its launches: `launches`

_NUMBERS = frozenset((int, float, bool))
_launchers: dict[tuple[Any, ...], "_Launcher"] = {}
MOST_LAUNCHERS = 1 << 14


@dataclass(frozen=True, slots=True)
class _Launcher:
    """What Triton compiled for a launch, and all that it is launched with but its arguments."""

    kernel: Any  # the key has its `id`: Triton computes its hash
    compiled: CompiledKernel
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    run: Callable[..., None]
    function: Any
    metadata: Any

    @classmethod
    def of(
        cls,
        kernel: Any,
        compiled: CompiledKernel,
        grid: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> "_Launcher":
        """Describe a launch of a kernel with a grid of up to three numbers."""
        x, y, z = (*grid, 1, 1)[:3]
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        return cls(kernel, compiled, (x, y, z), constants, run, function, metadata)

    def launch(self, args: tuple[Any, ...], stream: int) -> None:
        """Launch it, by way of Triton's own launch if a profiler listens to that."""
        if _is_watched():
            self.compiled[self.grid](*args, *self.constants, stream=stream)
        else:
            no_hooks = None, None, None
            self.run(
                *self.grid, stream, self.function, self.metadata, *no_hooks, *args, *self.constants
            )


# Whom Triton calls in each launch: attributes of a class, since Triton 3.4 one of settings.
_HOOKS: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel


def _is_watched() -> bool:
    """Return whether a profiler asked Triton to call it in each launch."""
    for hook in (_HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook):
        if getattr(hook, "calls", hook):  # since Triton 3.5 a hook is a list of functions
            return True
    return False


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel with a grid, its arguments, and as keywords its constants and options.

    Args:
        kernel: A function of `triton.jit`, whose constants are its last parameters.
        grid: Numbers of programs.
        *args: The kernel's other arguments; the first is a tensor, on the current device.
        **options: Its constants and Triton's options.
    """
    noted = getattr(_noting, "launches", None)
    if noted is None:
        _launch(kernel, grid, args, options)
    else:
        noted.append((kernel, args, options))


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch by Triton; the next time, if the arguments are alike, what it compiled for them.

    Triton examines all arguments in each launch, which takes the host as long as many a kernel
    runs. Numbers belong to the key as they are, since there are few.
    """
    device = args[0].get_device()
    key = (
        id(kernel),
        grid,
        device,
        *options,
        *options.values(),
        # Of a tensor, Triton asks whether its address is a multiple of 16.
        *[a if type(a) in _NUMBERS else (a.dtype, a.data_ptr() & 15 == 0) for a in args],
    )
    kept = _launchers.get(key)
    if kept is not None:
        kept.launch(args, torch._C._cuda_getCurrentRawStream(device))
        return
    compiled = kernel[grid](*args, **options)
    if isinstance(compiled, CompiledKernel):
        if len(_launchers) >= MOST_LAUNCHERS:
            _launchers.clear()
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _launchers[key] = _Launcher.of(kernel, compiled, grid, constants)


@contextmanager
def noted_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Within, this thread launches nothing: the list gets each kernel, arguments and keywords."""
    _noting.launches = []
    try:
        yield _noting.launches
    finally:
        del _noting.launches


# Triton's own `cdiv` and `next_power_of_2` also work in kernels, and take microseconds here.
def cdiv(x: int, y: int) -> int:
    """Return x / y rounded up, for y > 0."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is n or more, for n > 0."""
    return 1 << (n - 1).bit_length()


def major_capability(device: torch.device) -> int | None:
    """Return a device's compute capability, its first part; None in Triton's interpreter."""
    if device.type == "cuda":
        return capability(device)[0]
    if interpreted():
        return None
    # Compiling ahead of time.
    return int(triton.runtime.driver.active.get_current_target().arch) // 10


def device_class(device: torch.device) -> str:
    """Return which configurations fit a device: `large` or `small`."""
    major = major_capability(device)
    return "large" if major is None or major in LARGE_CAPABILITIES else "small"


def allows_tf32() -> bool:
    """Return whether PyTorch may multiply fp32 matrices in TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9, reading `allow_tf32` is an error after `fp32_precision` was set.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of `tl.dot`: for fp32, the one set for PyTorch's matrix products."""
    if dtype == torch.float32 and allows_tf32():
        return "tf32"
    return "ieee"


def tile(size: int, largest: int) -> int:
    """Return the tile for a dimension: a power of two, at least 16 as `tl.dot` needs."""
    return min(max(16, next_power_of_2(size)), largest)


def fitting_warps(num_warps: int, rows: int, columns: int) -> int:
    """Return the warps for tiles (rows, columns) of a product: at most `num_warps`, at least 4.

    On Hopper four warps compute 64 rows; if a tile has no more, others take a share of its columns.
    Products of 8 columns wait for shared memory, and are said to read more of it than the tile has
    (triton-lang/triton, issue 10629): each gets 16 or more. Of less than 64 rows, one warp computes
    16.
    """
    while rows >= 64 and num_warps > 4 and columns * (rows // 64) < 4 * num_warps:
        num_warps //= 2
    return num_warps


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x (N, D) with the channels of a row contiguous in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def sequence_last(x: Tensor) -> Tensor:
    """Return x (B, L, C) with positions contiguous in memory."""
    return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_sequence_last(like: Tensor, channels: int) -> Tensor:
    """Return a new (B, L, channels) for `like` (B, L, C), positions contiguous in memory."""
    batch, length, _ = like.shape
    return like.new_empty_strided((batch, length, channels), (length, 1, batch * length))


def strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of x (B, L, C) from row to row and from channel to channel."""
    row, _, channel = x.stride()
    return row, channel


def torch_gradients(
    fn: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor]:
    """Return the gradients of `fn(*tensors)` by autograd; an empty tensor for each None."""
    # Inside an op of torch.library, PyTorch records nothing for autograd until this is undone.
    recording = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with recording, torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        given = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(fn(*leaves), given, grad))
    return [grad.new_empty(0) if t is None else next(grads) for t in leaves]
