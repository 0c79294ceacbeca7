"""Sum and LayerNorm in PyTorch.

Dimension key: D channels.
"""

import torch.nn.functional as F
from torch import Tensor


def add_layer_norm_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Compute `add_layer_norm`; arguments as there. The result is what `F.layer_norm` returns."""
    x = x if residual is None else x + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps)  # a constant for the ONNX export
