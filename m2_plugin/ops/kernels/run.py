"""Runs a kernel, or PyTorch in its place if the kernel is wrong or cannot run."""

import importlib.metadata
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from m2_plugin.ops.backend import failed, give_up
from m2_plugin.ops.kernels import cache, check
from m2_plugin.ops.kernels.check import NotCheckedError, WrongKernelError
from m2_plugin.ops.kernels.launch import allows_tf32

log = logging.getLogger(__name__)

_captured: set[str] = set()  # ops that PyTorch computes in a CUDA graph, and warned so


def run_kernel(
    op: str, strict: bool, kernel: Callable[..., Any], fallback: Callable[..., Any], *args: Any
) -> Any:
    """Call `kernel`; if it is wrong or cannot be built or launched, warn once, call `fallback`.

    The kernel is compared with PyTorch before its first use on a machine (`check.py`). It is
    launched on the device of the first tensor in `args`, whichever device is current. The decision
    is made when the op runs, so that a model compiled or exported elsewhere decides here.

    Args:
        op: The op's name. After one failure, later calls go straight to the fallback.
        strict: Raise the kernel's error instead of falling back.
        kernel: The function that launches the kernel.
        fallback: The function that computes the same in PyTorch.
        *args: The arguments of both. The first tensor has the dtype of the activations.
    """
    if not strict and failed(op):
        return fallback(*args)
    x = _first_tensor(args)
    try:
        with _device_of(x):
            if x is not None and (problem := kernel_problem(op, x)):
                raise WrongKernelError(problem)
            return kernel(*args)
    except torch.OutOfMemoryError:
        raise  # PyTorch would need even more memory
    except NotCheckedError as error:
        if strict:
            raise
        if op not in _captured:
            _captured.add(op)
            log.warning("PyTorch computes %s in this CUDA graph, which is slower. %s", op, error)
        return fallback(*args)
    except Exception as error:
        if strict:
            raise
        reason = f"{type(error).__name__}: {error}"
        give_up(op, reason)
        log.warning(
            "The Triton kernel of %s failed (%s). From now on plain PyTorch computes it, which is "
            "slower. `backend: torch` silences this warning, `backend: triton` makes it an error. "
            "%s",
            op,
            reason.splitlines()[0],
            _how_to_report(x),
        )
        return fallback(*args)


def kernel_problem(op: str, x: Tensor) -> str | None:
    """Return what is wrong with an op's kernels for x, or None; see `check.problem`."""
    tf32 = x.dtype is torch.float32 and allows_tf32()
    return check.problem(op, x.device, x.dtype, tf32)


def _device_of(x: Tensor | None) -> AbstractContextManager[Any]:
    """Return what makes the device of x the current one: nothing, where it is that already."""
    if x is None or x.is_cpu or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


_NOTHING = nullcontext()


def _first_tensor(args: Any) -> Tensor | None:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, tuple | list) and (found := _first_tensor(arg)) is not None:
            return found
    return None


def _how_to_report(x: Tensor | None) -> str:
    """Return a request to report a kernel's failure, with what the report needs."""
    where = "to the maintainers of m2_plugin"
    try:
        for entry in importlib.metadata.metadata("m2_plugin").get_all("Project-URL") or []:
            label, _, address = entry.partition(",")
            if label.lower() in ("issues", "bug tracker"):
                where = f"at {address.strip()}"
        version = importlib.metadata.version("m2_plugin")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    about = {"m2_plugin": version}
    if x is not None:
        about |= {**cache.environment(x.device), "dtype": str(x.dtype)}
    text = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    return f"Please report it {where}, with this line and the output of `m2-plugin doctor`: {text}."
