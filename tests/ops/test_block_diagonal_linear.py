import pytest
import torch

from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_diagonal_to_dense
from tests.utils import (
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    assert_close,
    gradients,
    load_golden,
    relative_error,
    with_prefix,
)

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


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "shape",
    [(6, 64, 96, 4), (37, 50, 34, 8), (20, 24, 40, 1), (150, 36, 15, 3)],
    ids=lambda s: "N{}-I{}-O{}-K{}".format(*s),
)
def test_kernel(shape, bias, dtype):
    rows, size_in, size_out, nblocks = shape
    block = (nblocks, -(-size_out // nblocks), -(-size_in // nblocks))
    tensors = [torch.randn(rows, size_in), torch.randn(block) / size_in**0.5]
    tensors += [torch.randn(size_out)] if bias else []
    dy = torch.randn(rows, size_out)

    def run(backend, to):
        args = [a.to(dtype).to(KERNEL_DEVICE, to).requires_grad_() for a in tensors]
        b = args[2] if bias else None
        y = block_diagonal_linear(args[0], args[1], b, size_out, backend=backend)
        return y, *gradients(y, dy.to(dtype).to(y), *args)

    for name, actual, exact, plain in zip(
        ("y", "dx", "dw", "db"),
        run("triton", dtype),
        run("torch", torch.float64),
        run("torch", dtype),
        strict=False,
    ):
        assert actual.dtype == dtype
        assert_close(name, actual, exact, plain)


def test_kernel_sums_splits_of_the_rows(monkeypatch):
    from m2_plugin.ops.kernels import block_diagonal_linear as kernels

    monkeypatch.setattr(kernels, "ROWS_PER_SPLIT", 32)
    x, grad = (torch.randn(2, 100, 24, device=KERNEL_DEVICE)).unbind()
    exact = torch.einsum("nko,nki->koi", grad.view(100, 4, 6), x.view(100, 4, 6))
    assert_close("dw", kernels.weight_grad(grad, x, (4, 6, 6)), exact.double())


def test_kernel_takes_strided_rows_and_any_leading_dimensions():
    x = torch.randn(3, 40, 5, device=KERNEL_DEVICE).transpose(1, 2)
    weight = torch.randn(4, 6, 10, device=KERNEL_DEVICE)
    y = block_diagonal_linear(x, weight, backend="triton")
    assert_close("y", y, block_diagonal_linear(x.double(), weight.double(), backend="torch"))
    assert block_diagonal_linear(x[:0], weight, backend="triton").shape == (0, 5, 24)


def test_kernel_op_is_registered_as_torch_expects():
    from m2_plugin.ops.kernels.block_diagonal_linear import block_diagonal_linear_op

    args = torch.randn(5, 24), torch.randn(4, 6, 6), torch.randn(24)
    args = [a.to(KERNEL_DEVICE).requires_grad_() for a in args]
    torch.library.opcheck(block_diagonal_linear_op.custom, (*args, 24, True))
