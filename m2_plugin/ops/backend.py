"""Decides which implementation of an op runs: plain PyTorch or a Triton kernel."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)  # bf16 in the tensor cores, and asynchronous copies
# Longest sequence that `gated_long_conv` convolves by Toeplitz products where nothing is measured.
# Their operations per token grow with the length, those of an FFT hardly; at length 768 both need
# the same number. At 512 the product, which reads and writes less, is predicted to be about as fast
# in a model; at 1,024 the FFT is faster on all GPUs for which there is a prediction
# (`step_model.py`).
MAX_TOEPLITZ_LENGTH = 512

_failed: dict[str, str] = {}


def check_backend(backend: str) -> None:
    """Raise a ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")


def interpreted() -> bool:
    """Return whether Triton interprets kernels on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# What a process finds out once: a model asks a hundred times in a pass, and with short sequences a
# GPU waits for its host.
@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


@torch.compiler.assume_constant_result
def why_no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no Triton kernel can run on such tensors, or None if one can."""
    if not _has_triton():
        return "triton is not installed (pip install m2_plugin[gpu])"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if device.type == "cuda":
        found = capability(device)
        if found < MIN_CAPABILITY:
            return f"the GPU has compute capability {found}, the kernels need 8.0 or more"
        return None
    if device.type == "cpu" and interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly"
        return None
    return f"the kernels run on CUDA devices, not on {device.type}"


def use_kernel(backend: str, op: str, x: Tensor) -> bool:
    """Decide between kernel and PyTorch for one call.

    Args:
        backend: `auto` takes the kernel on a CUDA device unless it failed before; `torch` always
            takes PyTorch and `triton` always the kernel.
        op: The op's name.
        x: The op's input.

    Raises:
        ValueError: If `backend` is not one of `BACKENDS`.
        RuntimeError: If `backend` is `triton` and no kernel can run on `x`.
    """
    check_backend(backend)
    if backend == "torch" or (backend == "auto" and (not x.is_cuda or op in _failed)):
        return False
    reason = why_no_kernel(x.device, x.dtype)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run {op}: {reason}")
    return reason is None


def use_long_conv_kernel(backend: str, x: Tensor) -> bool:
    """Decide between kernel and PyTorch for `gated_long_conv` of an input (B, L, ...).

    Arguments and errors as in `use_kernel`. With `auto`, fp32 sequences longer than
    `MAX_TOEPLITZ_LENGTH` go to `torch.fft`: the kernels' FFTs are made for the tensor cores, which
    do not multiply fp32.
    """
    if backend == "auto" and x.shape[1] > MAX_TOEPLITZ_LENGTH:
        return autocast_dtype(x) != torch.float32 and use_kernel(backend, "gated_long_conv", x)
    return use_kernel(backend, "gated_long_conv", x)


def give_up(op: str, reason: str) -> None:
    """Let PyTorch compute an op from now on, unless `backend` is `triton`."""
    _failed[op] = reason


def failed(op: str) -> bool:
    """Return whether an op fell back to PyTorch in this process."""
    return op in _failed


def failures() -> dict[str, str]:
    """Return the ops that fell back to PyTorch in this process, and why."""
    return dict(_failed)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would run a linear map of x; it does not know our ops."""
    device = "cuda" if x.is_cuda else x.device.type  # the first is quicker
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
