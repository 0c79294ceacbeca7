import pytest
import torch
import torch.nn.functional as F

from m2_plugin.ops.fft_conv import fft_conv
from m2_plugin.ops.reference.fft_conv import FFTConvFunction, fft_conv_op, fft_conv_reference
from tests.utils import assert_close, gradients, load_golden, relative_error, with_prefix

UNITS = [u for u in load_golden("units")[0] if u["prefix"].startswith("fftconv")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u["prefix"].strip("/"))
def test_golden(unit):
    t = with_prefix(load_golden("units")[1], unit["prefix"])
    u, k_fwd, skip = t["u"].transpose(1, 2), t["k_fwd"].T, t["D"].flatten()
    k_rev = t["k_rev"].T if "k_rev" in t else None
    if unit["mode"] == "krev":  # there k_rev[0] is at lag 0, not −1
        k_fwd = torch.cat([k_fwd[:1] + k_rev[:1], k_fwd[1:]])
        k_rev = torch.cat([k_rev[1:], torch.zeros_like(k_rev[:1])])
    y = fft_conv(u, k_fwd, k_rev, skip)
    y = F.gelu(y) if unit["gelu"] else y
    assert relative_error(y.transpose(1, 2), t["y"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("length", [1, 2, 17, 64, 129])
def test_equals_a_sum_over_lags(length, bidirectional, dtype):
    batch, channels = 2, 6
    tensors = {
        "u": torch.randn(length, batch, channels).transpose(0, 1).to(dtype),
        "k_fwd": torch.randn(length, channels),
        "k_rev": torch.randn(length, channels) if bidirectional else None,
        "skip": torch.randn(channels),
    }
    names = [name for name, t in tensors.items() if t is not None]
    dy = torch.randn(batch, length, channels).to(dtype)

    def lags(u, k_fwd, k_rev=None, skip=None):
        return fft_conv_reference(u, k_fwd, k_rev) + skip * u

    def rounded(**args):
        return lags(**{k: v.float() for k, v in args.items()}).to(dtype)

    def run(fn, double):
        args = {n: tensors[n].double() if double else tensors[n].clone() for n in names}
        for arg in args.values():
            arg.requires_grad_()
        y = fn(**args)
        grads = torch.autograd.grad(y, args.values(), dy.to(y.dtype), allow_unused=True)
        return y, *(torch.zeros(1) if g is None else g for g in grads)

    for name, actual, exact, plain in zip(
        ["y", *names], run(fft_conv, False), run(lags, True), run(rounded, False), strict=True
    ):
        assert_close(name, actual, exact.expand_as(actual), plain.expand_as(actual))


def test_gradients_match_finite_differences():
    args = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in [(2, 5, 3), (5, 3), (5, 3), (3,)]
    ]
    assert torch.autograd.gradcheck(fft_conv, args)


def test_is_linear_and_commutes_with_shifts():
    u, v = torch.randn(2, 1, 64, 4, dtype=torch.float64)
    k_fwd, k_rev = torch.randn(2, 64, 4, dtype=torch.float64)
    both = fft_conv(2 * u + 3 * v, k_fwd, k_rev)
    assert torch.allclose(both, 2 * fft_conv(u, k_fwd, k_rev) + 3 * fft_conv(v, k_fwd, k_rev))
    u[:, 32:] = 0
    k_fwd[8:] = 0
    k_rev[8:] = 0
    shifted = fft_conv(u.roll(16, dims=1), k_fwd, k_rev)
    assert torch.allclose(shifted[:, 24:56], fft_conv(u, k_fwd, k_rev)[:, 8:40])


def test_input_gradient_is_the_adjoint():
    """⟨y, conv(u)⟩ = ⟨convᵀ(y), u⟩, and convᵀ swaps the directions."""
    u, y = torch.randn(2, 1, 33, 4, dtype=torch.float64)
    k_fwd, k_rev = torch.randn(2, 33, 4, dtype=torch.float64)
    u.requires_grad_()
    (adjoint,) = gradients(fft_conv(u, k_fwd, k_rev), y, u)
    swapped_fwd = torch.cat([k_fwd[:1], k_rev[:-1]])
    swapped_rev = torch.cat([k_fwd[1:], torch.zeros_like(k_fwd[:1])])
    assert torch.allclose(adjoint, fft_conv(y, swapped_fwd, swapped_rev))


def test_last_reverse_tap_is_never_used():
    u, k_fwd, k_rev = torch.randn(1, 9, 2), torch.randn(9, 2), torch.randn(9, 2)
    y = fft_conv(u, k_fwd, k_rev)
    k_rev[-1] = 1e6
    assert torch.equal(fft_conv(u, k_fwd, k_rev), y)


def test_wrong_filter_shape_is_named():
    with pytest.raises(ValueError, match=r"k_rev has shape \(5, 2\), but u needs \(9, 2\)"):
        fft_conv(torch.zeros(1, 9, 2), torch.zeros(9, 2), torch.zeros(5, 2))


@pytest.mark.parametrize("length", [8, 13])
def test_op_is_registered_as_torch_expects(length):
    u = torch.randn(2, length, 3, requires_grad=True)
    k = torch.randn(2 * length, 3, requires_grad=True)
    torch.library.opcheck(fft_conv_op, (u, k))
    assert torch.equal(fft_conv_op(u, k), FFTConvFunction.apply(u, k))
