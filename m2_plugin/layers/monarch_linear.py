"""A linear layer whose matrix is a Monarch matrix of order 2.

Dimension key: K blocks, I inputs per block, M middle features per block, O outputs per block.
"""

import math

from torch import Tensor, nn

from m2_plugin.layers.block_diagonal_linear import BlockLinear
from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape


def _interleave(x: Tensor, nblocks: int) -> Tensor:
    """Permute (..., K·n): feature j of block k moves to position j·K + k."""
    return x.unflatten(-1, (nblocks, -1)).transpose(-1, -2).flatten(-2)


class MonarchLinear(BlockLinear):
    """Linear map by a Monarch matrix of order 2: two block-diagonal factors and permutations.

    `y = P · L · P · R · x + b` (arXiv 2310.12109, section 3, with the innermost permutation the
    identity; arXiv 2204.00595, section 3.1). `R = diag(R_1, …, R_K)` has blocks (M, I),
    `L = diag(L_1, …, L_K)` has blocks (O, M). P moves feature j of block k to position j·K + k, so
    that each block of L reads from all blocks of R: if K ≤ M, every output depends on every input.
    M is the smaller of I and O. If the inputs do not fill whole blocks, they are padded with zeros;
    surplus outputs are cut off at the end. The layer has K·M·(I + O) weights; a square one has 2/K
    of a dense layer's. `BlockLinear` lists the arguments.
    """

    right: Tensor
    left: Tensor

    def weight_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return the factors R, (K, M, I), and L, (K, O, M)."""
        smaller = min(self.in_features, self.out_features)
        middle = self.nblocks * math.ceil(smaller / self.nblocks)
        return {
            "right": block_shape(self.in_features, middle, self.nblocks),
            "left": block_shape(middle, self.out_features, self.nblocks),
        }

    def reset_parameters(self) -> None:
        """Draw both factors so that outputs have the same variance as those of a new `nn.Linear`.

        R, from U(±√(3/I)), keeps the variance; L, from U(±1/√M), has `nn.Linear`'s distribution.
        """
        bound = math.sqrt(3 / self.right.shape[2])
        nn.init.uniform_(self.right, -bound, bound)
        bound = 1 / math.sqrt(self.left.shape[2])
        nn.init.uniform_(self.left, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        h = _interleave(block_diagonal_linear(x, self.right, backend=self.backend), self.nblocks)
        y = _interleave(block_diagonal_linear(h, self.left, backend=self.backend), self.nblocks)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)
