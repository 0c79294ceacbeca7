"""Compares a kernel with PyTorch before its first use on a machine.

A compiler, a driver or a GPU that no test has seen may make a kernel wrong. So the first time that
an op's kernels are to run on a CUDA device in a dtype, they run on small inputs, forward and
backward, in each configuration that tuning may choose. Their results are compared with PyTorch's in
fp64 on the CPU. PyTorch's own error in the same dtype says how large theirs may be.

The verdict is kept in the user's cache (`cache.py`), so that later processes only read it. That
a kernel could not run at all is not kept, because the reason may go away: the next process tries
again. `M2_PLUGIN_KERNEL_CHECK=0` trusts all kernels.

A kernel's module registers the cases to compare; `run_kernel` asks for the verdict.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2_plugin.ops.backend import KERNEL_DTYPES
from m2_plugin.ops.kernels import cache
from m2_plugin.ops.kernels.compilation import compile_together

log = logging.getLogger(__name__)

DEVICES = ("cuda",)  # Triton's interpreter, on a CPU, is for tests, and those compare by themselves
# The largest error of a kernel, relative to the largest number of a result: a multiple of
# PyTorch's, and about four roundings in the precision of the products.
RATIO = 3.0
ROUNDINGS = {"bfloat16": 8e-3, "float16": 2e-3, "tf32": 4e-3, "float32": 2e-5}


class WrongKernelError(RuntimeError):
    """A kernel that failed its comparison with PyTorch."""


class NotCheckedError(RuntimeError):
    """A kernel that is to be captured in a CUDA graph, and was never compared with PyTorch."""


class Case(NamedTuple):
    """A launch to compare.

    Args:
        name: What is computed.
        kernel: A function that launches kernels on CUDA tensors, without `run_kernel`.
        plain: The function that computes the same in PyTorch, in the dtype of its arguments.
        args: The arguments of both; tensors are on the CPU.
    """

    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    args: tuple[Any, ...]


Cases = Callable[[torch.dtype], Iterable[Case]]

_cases: dict[str, Cases] = {}
_always_fp32: set[str] = set()
_verdicts: dict[tuple[str, int | None, str], str | None] = {}
_lock = threading.Lock()
_running = threading.local()  # in the thread that compares: `alternative` and how many there are


def register(op: str, always_fp32: bool = False) -> Callable[[Cases], Cases]:
    """Register a function that returns an op's cases in a dtype.

    Args:
        op: The name that `run_kernel` or `kernel_problem` gets.
        always_fp32: Whether the op computes in fp32 whatever the model's dtype is, and never in
            TF32: there is one verdict then.
    """

    def add(cases: Cases) -> Cases:
        _cases[op] = cases
        if always_fp32:
            _always_fp32.add(op)
        return cases

    return add


def registered() -> list[str]:
    """Return the ops with cases; a kernel's module registers its own when it is imported."""
    return list(_cases)


def draws(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that draws normal numbers for a case, the same in every process.

    It takes a shape, and as keywords `scale`, the standard deviation (1 by default), and `dtype`.
    """
    generator = torch.Generator().manual_seed(0)  # the global one belongs to the training

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return (x * scale).to(dtype)

    return normal


def alternative(candidates: int) -> int | None:
    """Return which of some candidates tuning shall take for a comparison; None outside of one."""
    index = getattr(_running, "alternative", None)
    if index is None:
        return None
    _running.alternatives = max(_running.alternatives, candidates)
    return min(index, candidates - 1)


def problem(op: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    """Return what is wrong with an op's kernels, or None; compare them if that is not known yet.

    No rank of a distributed run waits for another: each reads the file, or compares on its device.

    Args:
        op: A registered name; others have no cases and count as right.
        device: Where they are to run; nothing is compared except on CUDA devices.
        dtype: The dtype of the activations.
        tf32: Whether products of fp32 numbers run in TF32.

    Raises:
        NotCheckedError: If nothing is known yet, and a CUDA graph is being captured.
        torch.OutOfMemoryError: If there is no memory for the comparison.
        Exception: A kernel's error that has left the device unusable.
    """
    key = (op, device.index, _precision(op, dtype, tf32))
    if key not in _verdicts:
        if (
            op not in _cases
            or device.type not in DEVICES
            or getattr(_running, "alternative", None) is not None
            or os.environ.get("M2_PLUGIN_KERNEL_CHECK") == "0"
        ):
            return None
        with _lock:
            if key not in _verdicts:
                _verdicts[key] = _find_out(op, device, dtype, tf32)
    return _verdicts[key]


def recheck(op: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    """Compare an op's kernels, whatever is known of them, and keep the verdict; see `problem`."""
    with _lock:
        found = _compare_and_keep(op, device, dtype, tf32)
        _verdicts[op, device.index, _precision(op, dtype, tf32)] = found
    return found


def _precision(op: str, dtype: torch.dtype, tf32: bool) -> str:
    if op in _always_fp32:
        return "float32"
    if tf32 and dtype == torch.float32:
        return "tf32"
    return _NAMES.get(dtype) or _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_NAMES = {dtype: _name(dtype) for dtype in KERNEL_DTYPES}  # to make one takes a microsecond


def _find_out(op: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    entry = cache.load(cache.path("checks", device)).get(f"{op} {_precision(op, dtype, tf32)}")
    if isinstance(entry, dict) and isinstance(entry.get("problem", 0), str | None):
        kept: str | None = entry["problem"]
        return kept
    if _capturing(device):
        raise NotCheckedError(
            f"The kernels of {op} were not compared with PyTorch yet, which cannot be done while a "
            "CUDA graph is captured. Run the model once before."
        )
    return _compare_and_keep(op, device, dtype, tf32)


def _compare_and_keep(op: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    file, name = cache.path("checks", device), f"{op} {_precision(op, dtype, tf32)}"
    log.info("Comparing the kernels of %s with PyTorch, once on this machine", name)
    # In a thread of its own, because much is a thread's state that the caller may have set: hooks
    # on saved tensors (those of activation checkpointing would count ours), autocast, inference
    # mode, modes of dispatch. The references are computed on the CPU, because autograd's thread
    # for the GPU may be the one that waits here.
    with ThreadPoolExecutor(1) as pool:
        try:
            found = pool.submit(_compare, op, device, dtype, tf32).result()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            if _usable(device):
                return failed
            # Nothing runs any more in this process. The next one shall not try again.
            cache.add(file, name, {"problem": failed}, device)
            raise
    cache.add(file, name, {"problem": found}, device)
    return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _usable(device: torch.device) -> bool:
    """Return whether a device still runs anything; some errors of a kernel end that."""
    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return False
    return True


def _compare(op: str, device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    """Return the first difference that is too large, or None."""
    roundings = ROUNDINGS[_precision(op, dtype, tf32)]
    dtype = torch.float32 if op in _always_fp32 else dtype
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
        cases = list(_cases[op](dtype))

        def launch_all() -> None:
            for case in cases:
                args = _convert(case.args, device="meta")
                for _ in _alternatives():
                    case.kernel(*args)

        compile_together(launch_all)
        for case in cases:
            exact = list(_tensors(case.plain(*_convert(case.args, dtype=torch.float64))))
            usual = list(_tensors(case.plain(*case.args)))
            args = _convert(case.args, device=device)
            for which in _alternatives():
                try:
                    results = list(_tensors(case.kernel(*args)))
                except Exception:
                    # Tuning leaves out alternatives that cannot run, but not the default.
                    if which == 0 or not _usable(device):
                        raise
                    results = exact
                found = _difference(results, usual, exact, roundings)
                if found:
                    return f"{case.name}, configuration {which}: {found}"
    return None


def _alternatives() -> Iterator[int]:
    """Let tuning take each candidate in turn, in this thread; see `alternative`."""
    _running.alternative, _running.alternatives = 0, 1
    while _running.alternative < _running.alternatives:
        yield _running.alternative
        _running.alternative += 1


def _difference(
    results: list[Tensor], usual: list[Tensor], exact: list[Tensor], roundings: float
) -> str | None:
    if len(results) != len(exact):
        return f"{len(results)} results instead of {len(exact)}"
    for i, (result, plain, right) in enumerate(zip(results, usual, exact, strict=True)):
        if right.numel() == 0:
            continue  # the gradient of something that is not there
        if result.shape != right.shape:
            return f"result {i} has shape {tuple(result.shape)} instead of {tuple(right.shape)}"
        largest = max(right.abs().max().item(), 1e-30)
        error = (result.double().cpu() - right).abs().max().item() / largest
        plain_error = (plain.double() - right).abs().max().item() / largest
        if not error <= RATIO * plain_error + roundings:  # NaN is an error, too
            return f"result {i} has an error of {error:.2g}, PyTorch has {plain_error:.2g}"
    return None


def _convert(value: Any, **target: Any) -> Any:
    """Move or cast the tensors in nested tuples and lists; a dtype is for floating ones only."""
    if isinstance(value, Tensor):
        keep = "dtype" in target and not value.is_floating_point()
        return value if keep else value.to(**target)
    if isinstance(value, tuple | list):
        items = [_convert(item, **target) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
