import pytest
import torch
import torch.nn.functional as F

from m2_plugin.ops.add_layer_norm import add_layer_norm
from m2_plugin.ops.kernels import add_layer_norm as kernels
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients

EPS = 1e-5


def plain(x, residual, weight, bias):
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, EPS)


def tensors(shape, kind, dtype, bias=True):
    """x, residual, weight, bias and the output's gradient; the mean of x is far from 0."""
    batch, length, channels = shape
    residual = {
        "none": None,
        "same": torch.randn(shape),
        "rows": torch.randn(length, channels),
        "one_batch": torch.randn(1, length, channels),
    }[kind]
    given = [
        torch.randn(shape) + 3,
        residual,
        torch.randn(channels),
        torch.randn(channels) if bias else None,
        torch.randn(shape),
    ]
    return [None if t is None else t.to(KERNEL_DEVICE, dtype) for t in given]


def run(fn, given, dtype):
    """The output and the gradients of all tensors that there are."""
    *args, dy = [None if t is None else t.detach().to(dtype) for t in given]
    args = [None if t is None else t.requires_grad_() for t in args]
    y = fn(*args)
    return [y, *gradients(y, dy, *(t for t in args if t is not None))]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("sequence_last", [False, True], ids=["rows", "sequence_last"])
@pytest.mark.parametrize("kind", ["none", "same", "rows", "one_batch"])
@pytest.mark.parametrize(
    "shape",
    [(3, 20, 768), (1, 1, 3), (2, 37, 15), (2, 5, 100)],
    ids=lambda s: "B{}-L{}-D{}".format(*s),
)
def test_kernel(shape, kind, sequence_last, dtype):
    given = tensors(shape, kind, dtype, bias=kind != "same")

    def ours(x, residual, weight, bias):
        y = add_layer_norm(x, residual, weight, bias, EPS, sequence_last, "triton")
        assert y.dtype == dtype
        assert y.is_contiguous() or sequence_last
        assert y.permute(2, 0, 1).is_contiguous() or not sequence_last
        return y

    results = run(ours, given, dtype), run(plain, given, torch.float64), run(plain, given, dtype)
    atol = 1e-5 if dtype == torch.float32 else 2e-3
    for i, (actual, exact, torchs) in enumerate(zip(*results, strict=True)):
        assert_close(str(i), actual, exact, torchs, atol=atol)


def test_other_residuals_are_added_by_pytorch():
    x, weight = torch.randn(3, 20, 8, device=KERNEL_DEVICE), torch.ones(8, device=KERNEL_DEVICE)
    for shape in ((3, 1, 8), (8,), (20, 1)):
        residual = torch.randn(shape, device=KERNEL_DEVICE)
        y = add_layer_norm(x, residual, weight, None, EPS, backend="triton")
        assert_close(str(shape), y, plain(x.double(), residual.double(), weight.double(), None))


def test_inputs_that_are_not_contiguous():
    x, residual, grad = torch.randn(3, 37, 20, 15, device=KERNEL_DEVICE).transpose(1, 2)
    weight = torch.randn(15, device=KERNEL_DEVICE)
    given = x, residual, weight, None, grad

    def ours(x, residual, weight, bias):
        return add_layer_norm(x.permute(0, 1, 2), residual, weight, bias, EPS, True, "triton")

    results = run(ours, given, torch.float32), run(plain, given, torch.float64)
    for i, (actual, exact) in enumerate(zip(*results, strict=True)):
        assert_close(str(i), actual, exact)


def test_mixed_dtypes_keep_their_gradients_dtypes():
    x = torch.randn(2, 5, 8, device=KERNEL_DEVICE, dtype=torch.float16, requires_grad=True)
    residual = torch.randn(5, 8, device=KERNEL_DEVICE, requires_grad=True)
    weight = torch.randn(8, device=KERNEL_DEVICE, requires_grad=True)
    bias = torch.randn(8, device=KERNEL_DEVICE, dtype=torch.float16, requires_grad=True)
    with torch.autocast(KERNEL_DEVICE, torch.float16):
        inner = add_layer_norm(x, residual, weight, bias, EPS, True, "triton")
        outer = add_layer_norm(x, residual, weight, bias, EPS, False, "triton")
    assert inner.dtype == torch.float16 and outer.dtype == torch.float32
    exact = plain(x.double(), residual.double(), weight.double(), bias.double())
    assert_close("outer", outer.double(), exact)
    grads = gradients(inner.float().square().sum(), None, x, residual, weight, bias)
    for tensor, grad in zip((x, residual, weight, bias), grads, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape


def test_fallback_and_kernel_agree_in_values_and_layout():
    x, grad = torch.randn(2, 40, 12, device=KERNEL_DEVICE)
    residual, weight = (torch.randn(n, 12, device=KERNEL_DEVICE) for n in (20, 1))
    for sequence_last in (False, True):
        args = x, residual, weight[0], None, EPS, torch.float16, sequence_last
        ours, plain_ones = kernels._forward(*args), kernels._torch_forward(*args)
        for a, b in zip(ours, plain_ones, strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert_close("forward", a, b.double(), atol=1e-3)
        _, mean, rstd = ours
        args = grad, x, residual, weight[0], mean, rstd, True
        for a, b in zip(kernels._backward(*args), kernels._torch_backward(*args), strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert_close("backward", a, b.double())


def test_ops_are_registered_rightly():
    x = torch.randn(40, 12, device=KERNEL_DEVICE, requires_grad=True)
    residual = torch.randn(20, 12, device=KERNEL_DEVICE, requires_grad=True)
    weight, bias = torch.randn(2, 12, device=KERNEL_DEVICE).unbind()
    for sequence_last in (False, True):
        args = x, residual, weight, bias, EPS, torch.float32, sequence_last, True
        torch.library.opcheck(kernels.add_layer_norm_op.custom, args)
