import pytest
import torch

from m2_plugin.ops import backend
from m2_plugin.ops.backend import use_long_conv_kernel
from m2_plugin.ops.gated_long_conv import gated_long_conv, two_sided_taps
from m2_plugin.ops.reference.fft_conv import fft_conv_reference
from m2_plugin.ops.reference.short_conv import short_conv_reference
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
    """Output and gradients, activations in `dtype`, parameters in fp32 at least."""
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


def check_kernels(shape, residual, masked, causal, dtype, atol=1e-5):
    """Compares output and gradients with fp64 and with plain PyTorch's errors."""
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
    check_kernels(shape, residual, masked, causal, dtype)


@pytest.fixture
def small_fft(monkeypatch):
    """FFTs of 256 points for every length, so that short sequences take several of them."""
    from m2_plugin.ops.kernels import monarch_conv

    config = monarch_conv.Config(n1=16, n2=16, num_warps=4)
    monkeypatch.setattr(backend, "MAX_TOEPLITZ_LENGTH", 0)
    monkeypatch.setattr(
        monarch_conv, "CONFIGS", dict.fromkeys(monarch_conv.CONFIGS, ((None, config),))
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "residual", "masked", "causal"),
    [
        ((3, 20, 2), True, False, False),
        ((4, 150, 2), True, True, False),
        ((1, 256, 1), False, False, True),
        ((3, 300, 2), True, True, False),
        ((2, 701, 1), False, True, False),
        ((1, 1, 2), True, False, True),
    ],
    ids=["padded", "two_passes", "causal", "folded", "folded_no_residual", "one_position"],
)
def test_fft_kernels(shape, residual, masked, causal, dtype, small_fft):
    # PyTorch transforms in fp32 what these multiply in half precision: gradients of taps, which
    # nothing rounds afterwards, show it.
    atol = 1e-5 if dtype == torch.float32 else 1e-3
    check_kernels(shape, residual, masked, causal, dtype, atol)


def test_fft_kernel_with_its_own_configurations():
    batch, length, channels = 1, 2100, 1
    tensors = [t.half().float() for t in inputs(batch, length, channels)]
    dy = torch.randn(batch, length, channels).half()
    for name, actual, exact in zip(
        ("y", "dp", "dweight", "dbias", "dtaps", "du", "dres_taps"),
        run(tensors, dy, "triton", torch.float16),
        run(tensors, dy, "torch", torch.float64),
        strict=True,
    ):
        assert relative_error(actual, exact) < 2e-3, name


def test_fft_kernel_takes_spectra_that_half_precision_cannot_hold(small_fft):
    p, weight, bias, _, u, _ = inputs(2, 200, 1)
    taps = torch.full((1, 399), 1 / 400)
    args = [p, weight, bias, taps, u + 1000, taps]  # its sum is 200,000
    y = run(args, torch.ones(2, 200, 1), "triton", torch.float16)[0]
    assert relative_error(y, run(args, torch.ones(2, 200, 1), "torch", torch.float64)[0]) < 2e-3


def test_fft_kernel_takes_numbers_whose_reciprocal_is_infinite(small_fft):
    tensors = inputs(2, 20, 1)
    tensors[3] = torch.full_like(tensors[3], 1e-40)
    for result in run(tensors, torch.randn(2, 20, 1), "triton", torch.float16):
        assert torch.isfinite(result).all()


def test_fft_kernels_work_in_turn_on_channels_that_do_not_fit_together(small_fft, monkeypatch):
    from m2_plugin.ops.kernels import monarch_conv

    tensors, dy = inputs(2, 300, 3), torch.randn(2, 300, 3)
    together = run(tensors, dy, "triton", torch.float32)
    monkeypatch.setattr(monarch_conv, "WORKSPACE_BYTES", 1)
    for actual, expected in zip(run(tensors, dy, "triton", torch.float32), together, strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


def test_auto_leaves_long_fp32_sequences_to_torch(monkeypatch):
    monkeypatch.setattr(backend, "use_kernel", lambda backend, name, x: True)
    assert not use_long_conv_kernel("auto", torch.empty(1, 1025, 3))
    assert use_long_conv_kernel("auto", torch.empty(1, 1025, 3, dtype=torch.bfloat16))
    assert use_long_conv_kernel("auto", torch.empty(1, 1024, 3))
    assert use_long_conv_kernel("triton", torch.empty(1, 1025, 3))


def test_algorithm_is_measured_where_it_is_close(monkeypatch):
    from m2_plugin.ops.kernels import gated_long_conv as kernels

    asked = {}

    def last(op, key, candidates, run, device):
        asked[op, key[0]] = candidates
        return candidates[-1]

    monkeypatch.setattr(kernels.tuning, "best", last)
    for length, dtype, chosen in (
        (256, torch.bfloat16, "toeplitz"),
        (512, torch.bfloat16, "fft"),
        (2048, torch.bfloat16, "toeplitz"),
        (8192, torch.bfloat16, "fft"),
        (512, torch.float32, "toeplitz"),
    ):
        x = torch.empty(2, length, 3, dtype=dtype)
        assert kernels.algorithm("forward", x, lambda kernels: None) is kernels.ALGORITHMS[chosen]
    assert asked["gated_long_conv forward", "fft"] == ("fft",)  # the last to ask had 8192


def test_kernel_with_several_batch_tiles_and_scratch_shared_by_channels(monkeypatch):
    from m2_plugin.ops.kernels import toeplitz_conv as kernels

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
