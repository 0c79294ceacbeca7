"""The loss of a language model's decoder, without its logits.

Dimension key: M rows, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from m2_plugin.ops.backend import autocast_dtype, use_kernel
from m2_plugin.ops.reference.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy_torch


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, backend: str = "auto"
) -> Tensor:
    """Compute the mean cross-entropy of the logits `x · weightᵀ + bias`.

    The kernels hold the logits of a few thousand rows at a time, in the dtype of the products, and
    replace them with their gradients in place: PyTorch would hold five arrays (M, V), three of
    them in fp32. So all gradients are computed in the forward pass.

    Args:
        x: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        labels: (M,) int64, from 0 to V − 1, or −100 for a row without loss.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.

    Returns:
        A scalar in nats, fp32 or wider; 0, with gradients, if no row has a label.

    Raises:
        RuntimeError: If `backend` is `triton` and it cannot run on `x`.
    """
    if use_kernel(backend, "linear_cross_entropy", x) and x.numel():
        from m2_plugin.ops.kernels.linear_cross_entropy import linear_cross_entropy_op

        tensors = [x, weight] if bias is None else [x, weight, bias]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        dtype = autocast_dtype(x)
        total = linear_cross_entropy_op(
            x.to(dtype), weight, bias, labels, needs_grad, backend == "triton"
        )[0]
    else:
        total = linear_cross_entropy_torch(x, weight, bias, labels)
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
