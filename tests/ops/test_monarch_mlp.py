import pytest
import torch
import torch.nn.functional as F

from m2_plugin.ops.block_diagonal_linear import block_diagonal_to_dense, block_shape
from m2_plugin.ops.monarch_mlp import monarch_mlp, monarch_mlp_reference
from tests.utils import assert_close, gradients

SHAPES = [(32, 128, 4), (24, 40, 2), (36, 100, 8), (16, 16, 1), (30, 60, 3)]


def dense_mlp(x, up, down, bias, size, glu):
    h = x @ block_diagonal_to_dense(up, x.shape[-1], size * (2 if glu else 1)).T
    h = F.gelu(h[..., :size]) * h[..., size:] if glu else F.gelu(h)
    return h @ block_diagonal_to_dense(down, size, x.shape[-1]).T + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "D{}-F{}-K{}".format(*s))
@pytest.mark.parametrize("op", [monarch_mlp, monarch_mlp_reference], ids=["op", "reference"])
def test_equals_dense_matrices(op, shape, glu, dtype):
    width, size, nblocks = shape
    up_size = size * (2 if glu else 1)
    tensors = [
        torch.randn(2, 7, width),
        torch.randn(block_shape(width, up_size, nblocks)) / width**0.5,
        torch.randn(block_shape(size, width, nblocks)) / size**0.5,
        torch.randn(width),
    ]
    dy = torch.randn(2, 7, width)

    def run(fn, to):
        args = [t.to(dtype).to(to).requires_grad_() for t in tensors]
        y = fn(*args, size, glu)
        return y, *gradients(y, dy.to(to), *args)

    for name, actual, exact, plain in zip(
        ("y", "dx", "dup", "ddown", "dbias"),
        run(op, dtype),
        run(dense_mlp, torch.float64),
        run(dense_mlp, dtype),
        strict=True,
    ):
        assert_close(name, actual, exact, plain)


def test_dropout_keeps_the_expectation():
    x = torch.randn(1, 64)
    up, down = torch.randn(4, 32, 16) / 4, torch.randn(4, 16, 16) / 4
    bias = torch.zeros(64)
    exact = monarch_mlp(x, up, down, bias, 64)
    many = monarch_mlp(x.expand(20000, -1), up, down, bias, 64, dropout_p=0.2)
    assert not torch.equal(many[0], many[1])
    assert (many.mean(0) - exact[0]).abs().max() < 0.05 * exact.abs().max()
