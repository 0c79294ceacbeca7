"""Helpers shared by the tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
# Where kernels are tested: on a GPU, or in Triton's interpreter, whose bf16 products are wrong.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16]
KERNEL_DTYPES += [torch.bfloat16] if KERNEL_DEVICE == "cuda" else []
TOKENIZER = ROOT / "data_prep" / "quickstart" / "tokenizer"


def max_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


def assert_close(
    name: str,
    actual: Tensor,
    reference: Tensor,
    baseline: Tensor | None = None,
    factor: float = 2.0,
    atol: float = 1e-5,
):
    """Bounds the error against fp64 by a multiple of plain PyTorch's own error in the same dtype.

    Args:
        name: what is compared.
        actual: the result under test.
        reference: the result in fp64.
        baseline: what plain PyTorch gives in the dtype of ``actual``; exact if None.
        factor: how many times the baseline's error is allowed.
        atol: error allowed on top, relative to the reference's largest value.
    """
    assert actual.shape == reference.shape, f"{name}: {actual.shape} is not {reference.shape}"
    error = max_error(actual, reference)
    base = 0.0 if baseline is None else max_error(baseline, reference)
    allowed = factor * base + atol * max(reference.abs().max().item(), 1e-30)
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g} (plain PyTorch {base:.3g})"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def load_golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Returns a fixture's description and its tensors, in fp32."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    return meta, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


def write_rows(path: Path, rows: list) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
