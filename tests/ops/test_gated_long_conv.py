import itertools

import pytest
import torch

from m2_plugin.ops import backend
from m2_plugin.ops.backend import use_long_conv_kernel
from m2_plugin.ops.gated_long_conv import gated_long_conv, two_sided_taps
from m2_plugin.ops.reference.fft_conv import fft_conv_reference
from m2_plugin.ops.reference.short_conv import short_conv_reference
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients, relative_error

NAMES = ("y", "dp", "dweight", "dbias", "dtaps", "du", "dres_taps", "dp_bias")


def inputs(batch, length, channels, residual=True, causal=False, p_bias=False):
    """p, weight, bias, taps, u, res_taps, p_bias."""

    def taps(causal):
        k_fwd, k_rev = torch.randn(2, length, channels) / length**0.5
        return two_sided_taps(k_fwd, None if causal else k_rev, torch.randn(channels))

    return [
        torch.randn(batch, length, 3 * channels),
        torch.randn(3 * channels, 3) / 2,
        torch.randn(3 * channels) / 2,
        taps(causal),
        torch.randn(batch, length, channels) if residual else None,
        taps(causal) if residual else None,
        *([torch.randn(3 * channels)] if p_bias else []),
    ]


def run(tensors, dy, backend, dtype, mask=None, causal=False):
    """Output and gradients, activations in `dtype`, parameters in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    args = []
    for i, tensor in enumerate(tensors):
        to = dtype if i in (0, 4) else wide
        given = tensor is not None
        args.append(tensor.to(KERNEL_DEVICE, to).requires_grad_() if given else None)
    mask = None if mask is None else mask.to(KERNEL_DEVICE, dtype)
    y = gated_long_conv(*args[:6], mask, causal, backend, *args[6:])
    grads = gradients(y, dy.to(y), *(a for a in args if a is not None))
    return y, *grads


def check_kernels(shape, residual, masked, causal, dtype, atol=1e-5, p_bias=False):
    """Compares output and gradients with fp64 and with plain PyTorch's errors."""
    batch, length, channels = shape
    tensors = inputs(*shape, residual, causal, p_bias)
    tensors = [None if t is None else t.to(dtype).float() for t in tensors]
    dy = torch.randn(batch, length, channels).to(dtype)
    mask = (torch.rand(batch, length) > 0.3).float() if masked else None
    for name, actual, exact, plain in zip(
        NAMES if residual else [n for n in NAMES if n not in ("du", "dres_taps")],
        run(tensors, dy, "triton", dtype, mask, causal),
        run(tensors, dy, "torch", torch.float64, mask, causal),
        run(tensors, dy, "torch", dtype, mask, causal),
        strict=False,
    ):
        assert actual.dtype == (dtype if name in ("y", "dp", "du") else torch.float32)
        assert_close(name, actual, exact, plain, atol=atol)


def test_pytorch_path_is_the_definition():
    p, weight, bias, _, u, _ = (t.double() for t in inputs(2, 9, 3))
    k = torch.randn(4, 9, 3, dtype=torch.float64)
    skip, res_skip = torch.randn(2, 3, dtype=torch.float64)
    mask = (torch.rand(2, 9) > 0.3).double()
    taps, res_taps = two_sided_taps(k[0], k[1], skip), two_sided_taps(k[2], k[3], res_skip)
    y = gated_long_conv(p, weight, bias, taps, u, res_taps, mask, backend="torch")
    x1, x2, v = short_conv_reference(p, weight, bias).chunk(3, dim=-1)
    w, kept = v * x1 * mask[..., None], u * mask[..., None]
    expected = x2 * (fft_conv_reference(w, k[0], k[1]) + skip * w)
    expected = expected + fft_conv_reference(kept, k[2], k[3]) + res_skip * kept
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "residual", "masked", "causal", "p_bias"),
    [
        ((3, 20, 2), True, False, False, False),
        ((17, 80, 2), True, True, False, True),
        ((2, 33, 3), False, False, True, True),
        ((5, 130, 1), False, True, False, False),
        ((2, 136, 1), True, False, True, True),
        ((1, 1, 2), True, False, True, True),
        ((70, 16, 2), True, False, False, False),
        ((16, 64, 1), True, True, False, True),
    ],
    ids=[
        "residual",
        "octets",
        "causal",
        "tiles",
        "tiles_of_octets",
        "one_position",
        "many_rows",
        "full_tiles",
    ],
)
def test_kernel(shape, residual, masked, causal, p_bias, dtype):
    check_kernels(shape, residual, masked, causal, dtype, p_bias=p_bias)


def test_auto_leaves_long_fp32_sequences_to_torch(monkeypatch):
    monkeypatch.setattr(backend, "use_kernel", lambda backend, name, x: True)
    assert not use_long_conv_kernel("auto", torch.empty(1, 513, 3))
    assert use_long_conv_kernel("auto", torch.empty(1, 513, 3, dtype=torch.bfloat16))
    assert use_long_conv_kernel("auto", torch.empty(1, 512, 3))
    assert use_long_conv_kernel("triton", torch.empty(1, 513, 3))


def test_algorithm_is_measured_where_it_is_close(monkeypatch):
    from m2_plugin.ops.kernels import gated_long_conv as kernels
    from m2_plugin.ops.kernels.gates import Inputs
    from m2_plugin.ops.kernels.monarch_plan import has_largest

    asked = {}
    long = torch.empty(1, 8192, 3, dtype=torch.bfloat16)

    def last(op, key, candidates, run, device, launches_only):
        assert not launches_only  # spectra of fixed taps are kept
        asked[op, key[2]] = candidates
        return candidates[-1]

    monkeypatch.setattr(kernels.tuning, "best", last)
    for length, dtype, chosen in (
        (256, torch.bfloat16, "toeplitz"),
        (512, torch.bfloat16, "fft"),
        (1024, torch.bfloat16, "toeplitz"),
        (8192, torch.bfloat16, "largest fft" if has_largest(long) else "fft"),
        (8192, torch.float32, "fft"),
        (16384, torch.bfloat16, "fft"),
        (512, torch.float32, "toeplitz"),
    ):
        some = torch.empty(0)
        given = Inputs(torch.empty(2, length, 3, dtype=dtype), None, some, some, some, None, None)
        found = kernels.algorithm("forward", given, False, lambda *_: None)
        assert found is kernels.ALGORITHMS[chosen]
    op = "gated_long_conv forward"
    assert asked.pop((op, 8192), None) == (["fft", "largest fft"] if has_largest(long) else None)
    assert asked == {(op, 512): ["toeplitz", "fft"], (op, 1024): ["fft", "toeplitz"]}


def test_kernel_takes_channels_last_and_sequence_last():
    p, *rest = (t.to(KERNEL_DEVICE) for t in inputs(2, 16, 3))
    rest[3] = rest[3].transpose(1, 2).contiguous().transpose(1, 2)
    last = p.transpose(1, 2).contiguous().transpose(1, 2)
    y = gated_long_conv(p, *rest, backend="triton")
    assert torch.equal(y, gated_long_conv(last, *rest, backend="triton"))


def test_kernel_adds_the_bias_of_the_projection():
    p, weight, bias, taps, u, res_taps, p_bias = (
        t.to(KERNEL_DEVICE) for t in inputs(2, 24, 2, p_bias=True)
    )
    rest = weight, bias, taps, u, res_taps
    y = gated_long_conv(p, *rest, backend="triton", p_bias=p_bias)
    expected = gated_long_conv(p + p_bias, *rest, backend="triton")
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_copies_of_taps_are_shifted():
    from m2_plugin.ops.kernels import toeplitz_conv as kernels
    from m2_plugin.ops.kernels.gates import Inputs

    p, weight, bias, taps, u, res_taps = (t.to(KERNEL_DEVICE) for t in inputs(1, 5, 2))
    copies, units = kernels._copies(
        Inputs(p, u, weight, bias, taps, res_taps, None), torch.float32, 16
    )
    assert copies.shape == (2, 2, 8, 32) and units == 4
    padded = torch.zeros(2, 2, 40, device=KERNEL_DEVICE)  # lags −16 … 23
    padded[:, :, 12:21] = torch.stack([taps, res_taps])  # lags −4 … 4
    for j in range(8):
        assert torch.equal(copies[:, :, j], padded[:, :, j : j + 32])


@pytest.mark.parametrize("length", [16, 21, 300])
def test_short_conv_backward(length):
    from m2_plugin.ops.kernels.gates import short_conv_backward

    p, grad = torch.randn(2, 6, 3, length, device=KERNEL_DEVICE).permute(0, 2, 3, 1)
    weight, p_bias = torch.randn(6, 3, device=KERNEL_DEVICE), torch.randn(6, device=KERNEL_DEVICE)
    leaves = [t.double().requires_grad_() for t in (p, weight, p_bias * 0, p_bias)]
    y = short_conv_reference(leaves[0] + leaves[3], *leaves[1:3])
    exact = gradients(y, grad.double(), *leaves)
    names = ("dp", "dweight", "dbias", "dp_bias")
    actual = short_conv_backward(grad, p, weight, p_bias)
    for name, a, e in zip(names, actual, exact, strict=True):
        assert_close(name, a, e)
    without = short_conv_backward(grad, p, weight, None)
    assert without[3].numel() == 0
    assert torch.equal(without[0], actual[0])


def test_causal_kernel_does_not_see_the_future():
    args = [t.to(KERNEL_DEVICE) for t in inputs(1, 40, 2, causal=True)]
    y = gated_long_conv(*args, causal=True, backend="triton")
    args[0][:, 23] += 1
    args[4][:, 23] += 1
    changed = (gated_long_conv(*args, causal=True, backend="triton") - y).abs().amax((0, 2)) > 1e-6
    assert not changed[:23].any() and changed[23:].all()


def test_sizes_that_do_not_fit_are_named():
    p, weight, bias, taps, u, res_taps = inputs(1, 8, 2)
    with pytest.raises(ValueError, match=r"taps has shape \(2, 14\).* needs \(2, 15\)"):
        gated_long_conv(p, weight, bias, taps[:, 1:])
    with pytest.raises(ValueError, match="u and res_taps belong together"):
        gated_long_conv(p, weight, bias, taps, u=u)


def test_kernel_op_is_registered_as_torch_expects():
    from m2_plugin.ops.kernels.gated_long_conv import gated_long_conv_op

    p, weight, bias, taps, u, res_taps, p_bias = (
        t.to(KERNEL_DEVICE).requires_grad_() for t in inputs(2, 16, 2, p_bias=True)
    )
    args = p, u, weight, bias, p_bias, taps, res_taps, None, False, True
    torch.library.opcheck(gated_long_conv_op.custom, args)


@pytest.mark.parametrize("kernel", ["forward", "backward", "taps", "taps_res"])
def test_a_choice_of_tiles_fits_all_lengths_of_its_class(kernel):
    """A choice is kept for lengths with the same next power of two, and for any batch."""
    from m2_plugin.ops.kernels.toeplitz_conv import _configs

    for unit, size in itertools.product((1, 8), (2, 4)):
        for low, high in ((1, 2), (17, 32), (65, 128), (129, 256), (257, 512), (2049, 4096)):
            found = [
                list(_configs(kernel, size, unit, batch, length))
                for length in (low, high)
                for batch in (1, 64)
            ]
            assert all(configs == found[0] for configs in found)
