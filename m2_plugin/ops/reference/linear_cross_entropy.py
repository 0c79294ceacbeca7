"""The cross-entropy of a linear map's outputs in PyTorch."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # label of a row without loss, as in torch's cross_entropy


def linear_cross_entropy_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """Return the sum over rows, in fp32 or more; arguments as `linear_cross_entropy`."""
    logits = F.linear(x, weight, bias)
    if logits.element_size() < 4:
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
