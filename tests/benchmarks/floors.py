"""What an op must at least move and compute in a forward pass, by arithmetic alone.

Dimension key: D hidden size, F = 4·D intermediate, L length, K = 4 blocks; bytes of bf16.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Bytes in and out, and operations of the products (two to a multiply-add).

    `operations` is None where it depends on the algorithm, and memory bounds the good ones.
    """

    bytes: int
    operations: int | None

    def seconds(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The floor: the larger of the times that memory and products need."""
        return max(self.bytes / bytes_per_second, (self.operations or 0) / operations_per_second)


def gated_long_conv(tokens: int, hidden: int, width: int = 2) -> Work:
    """Reads x1, x2, v and u, writes y."""
    return Work(5 * tokens * hidden * width, None)


def toeplitz_operations(tokens: int, hidden: int, length: int) -> int:
    """Of two convolutions of every channel as products with L × L matrices."""
    return 4 * length * tokens * hidden


def block_maps(tokens: int, hidden: int, weights: int, width: int = 2) -> Work:
    """Reads rows and weights, writes rows; whatever is between stays on the chip."""
    return Work((2 * tokens * hidden + weights) * width, 2 * tokens * weights)


def mlp_weights(hidden: int, nblocks: int = 4) -> int:
    """Of the gated MLP: D to 2·F, and F to D, in blocks."""
    return 3 * 4 * hidden * hidden // nblocks


def hyena_filters(hidden: int, length: int) -> Work:
    """Writes the taps of both convolutions at all lags in fp32."""
    return Work(2 * hidden * (2 * length - 1) * 4, None)
