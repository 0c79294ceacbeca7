import pytest
import torch

from m2_plugin.ops.fft_conv import fft_conv_reference
from m2_plugin.ops.gated_long_conv import gated_long_conv, two_sided_taps
from m2_plugin.ops.short_conv import short_conv_reference
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients, relative_error


def inputs(batch, length, channels, residual=True, causal=False):
    """p, weight, bias, taps, u, res_taps."""

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
    ]


def run(tensors, dy, backend, dtype, mask=None, causal=False):
    """Output and gradients, activations in ``dtype``, parameters in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    args = []
    for i, tensor in enumerate(tensors):
        to = dtype if i in (0, 4) else wide
        given = tensor is not None
        args.append(tensor.to(KERNEL_DEVICE, to).requires_grad_() if given else None)
    mask = None if mask is None else mask.to(KERNEL_DEVICE, dtype)
    y = gated_long_conv(*args, mask, causal, backend)
    grads = gradients(y, dy.to(y), *(a for a in args if a is not None))
    return y, *grads


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
    ("shape", "residual", "masked", "causal"),
    [
        ((3, 20, 5), True, False, False),
        ((17, 80, 2), True, True, False),
        ((2, 33, 3), False, False, True),
        ((5, 130, 1), False, True, False),
        ((1, 1, 2), True, False, True),
    ],
    ids=["residual", "masked", "causal", "no_residual", "one_position"],
)
def test_kernel(shape, residual, masked, causal, dtype):
    batch, length, channels = shape
    tensors = inputs(*shape, residual, causal)
    tensors = [None if t is None else t.to(dtype).float() for t in tensors]
    dy = torch.randn(batch, length, channels).to(dtype)
    mask = (torch.rand(batch, length) > 0.3).float() if masked else None
    for name, actual, exact, plain in zip(
        ("y", "dp", "dweight", "dbias", "dtaps", "du", "dres_taps"),
        run(tensors, dy, "triton", dtype, mask, causal),
        run(tensors, dy, "torch", torch.float64, mask, causal),
        run(tensors, dy, "torch", dtype, mask, causal),
        strict=False,
    ):
        assert actual.dtype == (dtype if name in ("y", "dp", "du") else torch.float32)
        assert_close(name, actual, exact, plain)


def test_kernel_with_several_batch_tiles_and_scratch_shared_by_channels(monkeypatch):
    from m2_plugin.ops.kernels import gated_long_conv as kernels

    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(kernels, "BATCH_PER_PROGRAM", 32)
    tensors, dy = inputs(70, 16, 2), torch.randn(70, 16, 2)
    for name, actual, exact, plain in zip(
        ("y", "dp", "dweight", "dbias", "dtaps", "du", "dres_taps"),
        run(tensors, dy, "triton", torch.float32),
        run(tensors, dy, "torch", torch.float64),
        run(tensors, dy, "torch", torch.float32),
        strict=True,
    ):
        assert_close(name, actual, exact, plain)


def test_kernel_takes_channels_last_and_sequence_last():
    p, *rest = (t.to(KERNEL_DEVICE) for t in inputs(2, 16, 3))
    rest[3] = rest[3].transpose(1, 2).contiguous().transpose(1, 2)
    last = p.transpose(1, 2).contiguous().transpose(1, 2)
    y = gated_long_conv(p, *rest, backend="triton")
    assert torch.equal(y, gated_long_conv(last, *rest, backend="triton"))


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

    p, weight, bias, taps, u, res_taps = (
        t.to(KERNEL_DEVICE).requires_grad_() for t in inputs(2, 16, 2)
    )
    args = p, u, weight, bias, taps, res_taps, None, False, True
    torch.library.opcheck(gated_long_conv_op, args)
