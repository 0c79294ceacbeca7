"""A linear layer with a block-diagonal matrix, and the base class of such layers."""

import math

import torch
from torch import Tensor, nn

from m2_plugin.ops.backend import check_backend
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape


class BlockLinear(nn.Module):
    """Base class of linear layers that are made of block-diagonal matrices.

    Args:
        in_features: Size of the last dimension of the input, (..., in_features).
        out_features: Size of the last dimension of the output, (..., out_features).
        nblocks: K, the number of blocks of each block-diagonal matrix.
        bias: Whether to add a bias of shape (out_features,).
        backend: `auto`, `torch` or `triton`, as in `block_diagonal_linear`.
        device: The device of the parameters.

    Raises:
        ValueError: If `nblocks` is not between 1 and the smaller of the two sizes, or `backend`
            is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int = 4,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_backend(backend)
        if not 1 <= nblocks <= min(in_features, out_features):
            raise ValueError(
                f"nblocks must be between 1 and min(in_features, out_features) = "
                f"{min(in_features, out_features)}, not {nblocks}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.nblocks = nblocks
        self.backend = backend
        for name, shape in self.weight_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device)))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        self.reset_parameters()

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return the names and shapes of the weights."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the weights and the bias."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the sizes, for the module's `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nblocks={self.nblocks}, bias={self.bias is not None}"
        )


class BlockDiagonalLinear(BlockLinear):
    """Linear map whose matrix is block-diagonal: a single factor of a Monarch matrix.

    `y = x · diag(W_1, …, W_K)ᵀ + b` (arXiv 2310.12109, section 3). It has 1/K of a dense layer's
    weights and FLOPs. If the features do not fill whole blocks, they are padded with zeros.
    `BlockLinear` lists the arguments.
    """

    weight: Tensor

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return the one weight, (K, O, I)."""
        return {"weight": block_shape(self.in_features, self.out_features, self.nblocks)}

    def reset_parameters(self) -> None:
        """Draw the weights from U(±1/√I) and the bias from U(±1/√out_features).

        HazyResearch/m2 draws a dense matrix by kaiming_uniform(a=√5), which is U(±1/√(K·I)), takes
        blocks of it and scales them by √K. That is the same distribution.
        """
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return block_diagonal_linear(x, self.weight, self.bias, self.out_features, self.backend)
