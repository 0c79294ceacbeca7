"""A LayerNorm module applied to a sum."""

from torch import Tensor, nn

from m2_plugin.layers.plain import is_plain
from m2_plugin.ops.add_layer_norm import add_layer_norm


def add_norm(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    sequence_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return `norm(x + residual)`, by `add_layer_norm` if a call of the norm does nothing else.

    Args:
        norm: An `nn.LayerNorm`, or what has taken its place.
        x: (B, L, D).
        residual: As in `add_layer_norm`, like the other arguments.

    Raises:
        RuntimeError: If `backend` is `triton` and it cannot run on `x`.
    """
    if isinstance(norm, nn.LayerNorm) and norm.weight is not None and is_plain(norm, nn.LayerNorm):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, sequence_last, backend)
    return norm(x if residual is None else x + residual)
