"""The taps of Hyena filters in PyTorch, and how their weights lie in one tensor.

Dimension key: G filters, N MLPs (one or two per filter), L sequence, D channels, E positional
features, O order.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

OP = "hyena_filters"
MAX_ORDER = 128  # widest hidden layer that the kernel can hold


class Sizes(NamedTuple):
    """What a kernel must know of a group of filters beside their weights."""

    filters: int  # G
    directions: int  # 2, or 1 for causal filters
    length: int  # L
    channels: int  # D
    emb_dim: int  # E
    order: int  # O
    before: int  # Lags before 0: L − 1 for a convolution's taps, L to keep the last reverse tap.

    @property
    def mlps(self) -> int:
        """N. MLP `directions · g + 1` gives filter g's taps at negative lags."""
        return self.filters * self.directions


class Packed(NamedTuple):
    """Views of the weights of a group of filters, or of their gradients."""

    w2: Tensor  # (N, O, O)
    w3: Tensor  # (N, O, O)
    out: Tensor  # (N, D, O)
    w1: Tensor  # (N, O, E)
    b1: Tensor  # (N, O)
    b2: Tensor  # (N, O)
    b3: Tensor  # (N, O)
    freq: Tensor  # (G, O)
    skip: Tensor  # (G, D)
    z: Tensor  # (G, L, E)


def packed_shapes(sizes: Sizes) -> Packed:
    """Return the shape of each part of the packed tensor, in order: widest alignment first."""
    n, g, order = sizes.mlps, sizes.filters, sizes.order
    shapes: Sequence[tuple[int, ...]] = (
        (n, order, order),
        (n, order, order),
        (n, sizes.channels, order),
        (n, order, sizes.emb_dim),
        (n, order),
        (n, order),
        (n, order),
        (g, order),
        (g, sizes.channels),
        (g, sizes.length, sizes.emb_dim),
    )
    return Packed(*shapes)  # type: ignore[arg-type]


def unpack(packed: Tensor, sizes: Sizes) -> Packed:
    """Return the parts of a packed tensor as views."""
    shapes = packed_shapes(sizes)
    parts = packed.split([prod(shape) for shape in shapes])
    return Packed(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def hyena_filters_torch(
    packed: Tensor, scale: Tensor, rates: Tensor, sizes: Sizes, w_mod: float
) -> Tensor:
    """Compute `hyena_filters` from the packed weights; returns (G, D, before + L).

    On a GPU in fp64, because PyTorch may multiply fp32 in TF32 there, which the sines amplify.
    """
    dtype = packed.dtype
    if packed.device.type == "cuda":
        packed, scale, rates = packed.double(), scale.double(), rates.double()
    w = unpack(packed, sizes)
    z, freq = (t.repeat_interleave(sizes.directions, 0) for t in (w.z, w_mod * w.freq))
    h = z
    for weight, bias in ((w.w1, w.b1), (w.w2, w.b2), (w.w3, w.b3)):
        h = torch.sin(freq[:, None] * torch.baddbmm(bias[:, None], h, weight.mT))
    k = torch.bmm(w.out, h.mT) * torch.exp(-rates[:, None] * scale)  # (N, D, L)
    k = k.unflatten(0, (sizes.filters, sizes.directions))
    after = torch.cat([k[:, 0, :, :1] + w.skip[..., None], k[:, 0, :, 1:]], -1)
    if sizes.directions == 2:
        before = k[:, 1, :, : sizes.before].flip(-1)
    else:
        before = torch.zeros_like(k[:, 0, :, : sizes.before])
    return torch.cat([before, after], -1).to(dtype)
