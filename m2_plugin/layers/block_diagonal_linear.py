"""Linear layers of block-diagonal matrices: what they share, and the one of a single matrix."""

import math

import torch
from torch import Tensor, nn

from m2_plugin.ops.backend import check_backend
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape


class BlockLinear(nn.Module):
    """What the linear layers of block-diagonal matrices have in common.

    Args:
        in_features: size of the last dimension of the input, (..., in_features).
        out_features: size of the last dimension of the output, (..., out_features).
        nblocks: number K of blocks of each block-diagonal matrix.
        bias: add a bias of shape (out_features,).
        backend: ``auto``, ``torch`` or ``triton``, as in ``block_diagonal_linear``.
        device: where to make the parameters.

    Raises:
        ValueError: if ``nblocks`` is not between 1 and the smaller of the two sizes, or ``backend``
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
        """Names the weights and gives their shapes."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws weights and bias."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Names the sizes when the module is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nblocks={self.nblocks}, bias={self.bias is not None}"
        )


class BlockDiagonalLinear(BlockLinear):
    """Linear map whose matrix is block-diagonal: a single factor of a Monarch matrix.

    ``y = x · diag(W_1, …, W_K)ᵀ + b`` (arXiv 2310.12109, section 3). It has 1/K of the weights and
    of the FLOPs of a dense layer. Features that do not fill whole blocks are padded with zeros.

    See ``BlockLinear`` for the arguments.
    """

    weight: Tensor

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns the one weight, (K, O, I)."""
        return {"weight": block_shape(self.in_features, self.out_features, self.nblocks)}

    def reset_parameters(self) -> None:
        """Draws the weights of M2-BERT's initialisation.

        The published one cuts the blocks out of a dense matrix drawn by kaiming_uniform(a=√5),
        that is U(±1/√(K·I)), and scales them by √K; the same distribution is drawn here.
        """
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return block_diagonal_linear(x, self.weight, self.bias, self.out_features, self.backend)
