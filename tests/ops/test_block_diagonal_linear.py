import pytest
import torch

from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_diagonal_to_dense
from tests.utils import assert_close, gradients, load_golden, relative_error, with_prefix

UNITS = [u for u in load_golden("units")[0] if u["prefix"].startswith("blockdiag")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u["prefix"].strip("/"))
def test_golden(unit):
    t = with_prefix(load_golden("units")[1], unit["prefix"])
    inputs = [t[k].requires_grad_() for k in ("x", "weight", "bias") if k in t]
    y = block_diagonal_linear(t["x"], t["weight"], t.get("bias"), unit["out_features"])
    assert relative_error(y, t["y"]) < 1e-6
    for name, grad in zip(("x", "weight", "bias"), gradients(y, t["dy"], *inputs), strict=False):
        assert relative_error(grad, t[f"grad_{name}"]) < 1e-6, name
    dense = block_diagonal_to_dense(t["weight"], unit["in_features"], unit["out_features"])
    assert torch.equal(dense, t["dense_weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 64, 96, 4), (1, 1, 8, 8, 1), (3, 7, 50, 34, 8), (2, 0, 16, 16, 2)],
    ids=lambda s: "B{}-L{}-I{}-O{}-K{}".format(*s),
)
def test_equals_the_dense_matrix(shape, dtype):
    batch, length, size_in, size_out, nblocks = shape
    x = torch.randn(length, batch, size_in, dtype=dtype).transpose(0, 1).requires_grad_()
    block = (nblocks, -(-size_out // nblocks), -(-size_in // nblocks))
    weight = torch.randn(block, dtype=dtype, requires_grad=True)
    bias = torch.randn(size_out, dtype=dtype, requires_grad=True)
    dy = torch.randn(batch, length, size_out, dtype=dtype)

    def dense(x, weight, bias):
        return x @ block_diagonal_to_dense(weight, size_in, size_out).T + bias

    def run(fn, to):
        args = [a.detach().to(to).requires_grad_() for a in (x, weight, bias)]
        y = fn(*args)
        return y, *gradients(y, dy.to(to), *args)

    def ours(x, weight, bias):
        return block_diagonal_linear(x, weight, bias, size_out)

    if not length:
        assert ours(x, weight, bias).shape == (batch, 0, size_out)
        return
    for name, actual, exact, plain in zip(
        ("y", "dx", "dw", "db"),
        run(ours, dtype),
        run(dense, torch.float64),
        run(dense, dtype),
        strict=True,
    ):
        assert_close(name, actual, exact, plain)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="x has 9 features.* takes 5 to 8"):
        block_diagonal_linear(torch.zeros(2, 9), torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=r"out_features must be in 1\.\.12 .* not 13"):
        block_diagonal_linear(torch.zeros(2, 8), torch.zeros(4, 3, 2), out_features=13)
