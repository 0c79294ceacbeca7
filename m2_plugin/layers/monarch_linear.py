"""A linear layer whose matrix is a Monarch matrix of order 2.

Dimension key: K blocks, I inputs per block, M middle features per block, O outputs per block.
"""

import math

from torch import Tensor, nn

from m2_plugin.layers.block_diagonal_linear import BlockLinear
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape


def _interleave(x: Tensor, nblocks: int) -> Tensor:
    """Permutes (..., K·n): feature j of block k goes to place j·K + k."""
    return x.unflatten(-1, (nblocks, -1)).transpose(-1, -2).flatten(-2)


class MonarchLinear(BlockLinear):
    """Linear map by a Monarch matrix of order 2: two block-diagonal factors, permuted between.

    ``y = P · L · P · R · x + b`` (arXiv 2310.12109, section 3, with the innermost permutation the
    identity; arXiv 2204.00595, section 3.1). ``R = diag(R_1, …, R_K)`` has blocks (M, I),
    ``L = diag(L_1, …, L_K)`` blocks (O, M), and P takes feature j of block k to place j·K + k, so
    that each block of L reads from all blocks of R: where K ≤ M, every output depends on every
    input. M is the smaller of I and O. Features that do not fill whole blocks are padded with
    zeros, outputs that are too many are cut off at the end.

    The weights are K·M·(I + O) numbers: for a square map 2/K of a dense layer's.

    See ``BlockLinear`` for the arguments.
    """

    right: Tensor
    left: Tensor

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns the factors R, (K, M, I), and L, (K, O, M)."""
        smaller = min(self.in_features, self.out_features)
        middle = self.nblocks * math.ceil(smaller / self.nblocks)
        return {
            "right": block_shape(self.in_features, middle, self.nblocks),
            "left": block_shape(middle, self.out_features, self.nblocks),
        }

    def reset_parameters(self) -> None:
        """Draws both factors so that outputs have the variance that a fresh ``nn.Linear``'s have.

        R keeps the variance, U(±√(3/I)); L has nn.Linear's own distribution, U(±1/√M).
        """
        bound = math.sqrt(3 / self.right.shape[2])
        nn.init.uniform_(self.right, -bound, bound)
        bound = 1 / math.sqrt(self.left.shape[2])
        nn.init.uniform_(self.left, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        h = _interleave(block_diagonal_linear(x, self.right, backend=self.backend), self.nblocks)
        y = _interleave(block_diagonal_linear(h, self.left, backend=self.backend), self.nblocks)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)
