import functools
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from m2_plugin.ops import backend
from m2_plugin.ops.fixed import declare_fixed
from m2_plugin.ops.gated_long_conv import gated_long_conv
from m2_plugin.ops.kernels import monarch_conv, monarch_plan
from tests.ops.test_gated_long_conv import check_kernels, inputs, run
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, relative_error


@pytest.fixture
def small_fft(monkeypatch):
    """FFTs of 256 points for every length, so that short sequences take several of them."""
    config = monarch_plan.Config(n1=16, n2=16, num_warps=4)
    monkeypatch.setattr(backend, "MAX_TOEPLITZ_LENGTH", 0)
    monkeypatch.setattr(
        monarch_plan, "CONFIGS", dict.fromkeys(monarch_plan.CONFIGS, ((None, config),))
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "residual", "masked", "causal"),
    [
        ((3, 20, 2), True, False, False),
        ((4, 150, 2), True, True, False),
        ((1, 256, 1), False, False, True),
        ((3, 300, 2), True, True, False),
        ((3, 701, 2), True, True, False),
        ((2, 701, 1), False, True, False),
        ((1, 1100, 2), True, False, True),
        ((1, 1, 2), True, False, True),
    ],
    ids=[
        "padded",
        "two_passes",
        "causal",
        "folded",
        "folded_before",
        "folded_before_no_residual",
        "half_of_the_classes",
        "one_position",
    ],
)
def test_fft_kernels(shape, residual, masked, causal, dtype, small_fft):
    # PyTorch transforms in fp32 what these multiply in half precision: gradients of taps, which
    # nothing rounds afterwards, show it.
    atol = 1e-5 if dtype == torch.float32 else 1e-3
    check_kernels(shape, residual, masked, causal, dtype, atol)


@pytest.mark.parametrize(
    ("length", "algorithm"),
    [(1500, "fft"), (2100, "fft"), (8192, "fft"), (8192, "largest fft")],
)
def test_fft_kernel_with_its_own_configurations(length, algorithm, monkeypatch):
    from m2_plugin.ops.kernels import gated_long_conv as kernels

    monkeypatch.setattr(kernels, "_candidates", lambda x: [algorithm])
    batch, channels = 1, 1
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


@pytest.mark.parametrize("number", [1, 2])
def test_fft_kernels_work_in_turn_on_channels_that_do_not_fit_together(
    number, small_fft, monkeypatch
):
    """Of two filters with three channels each, the second two channels are of both."""
    from m2_plugin.ops.kernels import monarch_spectra

    def chunks(channels, *_):
        return [slice(i, min(i + number, channels)) for i in range(0, channels, number)]

    tensors, dy = inputs(2, 300, 3), torch.randn(2, 300, 3)
    together = run(tensors, dy, "triton", torch.float32)
    _, _, _, taps, u, res_taps = (t.to(KERNEL_DEVICE) for t in tensors)
    plan = monarch_conv.plan_for("convolve", u.half())
    filters = monarch_conv.spectra([taps, res_taps], plan)
    if number == 1:  # nothing fits with another
        monkeypatch.setattr(monarch_conv, "WORKSPACE_BYTES", 1)
    for module in (monarch_conv, monarch_spectra):
        if number == 1:
            monkeypatch.setattr(module, "SPECTRUM_BYTES", 1)
        else:
            monkeypatch.setattr(module, "chunks", chunks)
    for actual, expected in zip(run(tensors, dy, "triton", torch.float32), together, strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)
    neighbours = torch.stack([taps, res_taps]).unbind()
    for both in ((taps, res_taps), neighbours):
        for actual, expected in zip(monarch_conv.spectra(both, plan), filters, strict=True):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    (joined,) = monarch_spectra._joined(neighbours)
    assert len(monarch_spectra._joined([taps, res_taps])) == 2
    assert torch.equal(joined, torch.cat([taps, res_taps]))


def test_rows_are_split_where_a_tensor_ends():
    from m2_plugin.ops.kernels.monarch_spectra import split_rows

    assert list(split_rows(slice(2, 4), 3)) == [
        (0, slice(2, 3), slice(0, 1)),
        (1, slice(0, 1), slice(1, 2)),
    ]
    assert list(split_rows(slice(3, 6), 3)) == [(1, slice(0, 3), slice(0, 3))]


def test_memory_limits_the_channels_that_are_transformed_together():
    from m2_plugin.ops.kernels.monarch_spectra import chunks

    assert chunks(5, 10, 25) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunks(4, 10, 35) == [slice(0, 2), slice(2, 4)]  # not three and one
    assert chunks(2, 10, 1) == [slice(0, 1), slice(1, 2)] and chunks(3, 1, 9) == [slice(0, 3)]


def core(tensors, dy, scales, dtype=torch.float16):
    """The kernels' output and the gradients of p and u, each row's input scaled by its factor."""
    from m2_plugin.ops.kernels.gates import Inputs

    p, weight, bias, taps, u, res_taps = (t.to(KERNEL_DEVICE) for t in tensors)
    rows = torch.tensor(scales, device=KERNEL_DEVICE)[:, None, None]
    given = Inputs(p.to(dtype), (u * rows).to(dtype), weight, bias, taps, res_taps, None)
    y = monarch_conv.forward(given, causal=False)
    plain = given._replace(u=u.to(dtype))
    grad = (dy.to(KERNEL_DEVICE) * rows).to(dtype)
    return y, *monarch_conv.backward(grad, plain)[:2]


@pytest.mark.parametrize("length", [120, 300], ids=["whole", "folded"])
def test_rows_of_a_batch_do_not_change_each_other(length, small_fft):
    tensors, dy = inputs(2, length, 1), torch.randn(2, length, 1)
    alone = core([t[:1] if i in (0, 4) else t for i, t in enumerate(tensors)], dy[:1], [1.0])
    for scale in (1.0, 30.0, 1000.0):
        for actual, expected in zip(core(tensors, dy, [1.0, scale]), alone, strict=True):
            assert relative_error(actual[0], expected[0]) < 1.5e-3, scale
    for scale in (float("inf"), float("nan")):
        for actual, expected in zip(core(tensors, dy, [1.0, scale]), alone, strict=True):
            assert relative_error(actual[0], expected[0]) < 1.5e-3, scale
            assert not torch.isfinite(actual[1]).any()


@pytest.mark.parametrize("length", [120, 300], ids=["whole", "folded"])
def test_gradient_of_taps_adds_rows_of_any_size(length, small_fft):
    tensors, dy = inputs(4, length, 1), torch.randn(4, length, 1)
    rows = torch.tensor([1.0, 1e-3, 30.0, 1e3])[:, None, None]
    tensors[4] = tensors[4] * rows  # u is large where its gradient is small
    dy = dy * rows.flip(0)
    actual = run(tensors, dy, "triton", torch.float16)
    exact = run(tensors, dy, "torch", torch.float64)
    for name, i in (("dtaps", 4), ("dres_taps", 6)):
        assert relative_error(actual[i], exact[i]) < 2e-3, name


def test_spectra_of_fixed_taps_are_computed_once(small_fft, monkeypatch):
    monkeypatch.setenv("M2_PLUGIN_AUTOTUNE", "0")  # each candidate would compute them
    transforms, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda *a, **k: transforms.append(1) or rfft(*a, **k))
    tensors = [t.to(KERNEL_DEVICE) for t in inputs(2, 300, 2)]
    p, weight, bias, taps, u, res_taps = tensors

    def core(rows):
        with torch.no_grad():
            x = p[:rows].half(), weight, bias, taps, u[:rows].half(), res_taps
            return gated_long_conv(*x, backend="triton")

    expected = {rows: core(rows) for rows in (1, 2)}  # one row has half of the residue classes
    assert len(transforms) == 2
    declare_fixed(taps)
    core(2), core(2)
    assert len(transforms) == 4  # the other filter may change
    declare_fixed(taps, res_taps)
    for rows in (2, 2, 1, 1, 2):
        assert torch.equal(core(rows), expected[rows])
    assert len(transforms) == 7


def test_a_backward_pass_takes_the_spectra_of_its_forward_pass(small_fft, monkeypatch):
    monkeypatch.setenv("M2_PLUGIN_AUTOTUNE", "0")
    transforms, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda *a, **k: transforms.append(1) or rfft(*a, **k))
    dy = torch.randn(2, 300, 2, device=KERNEL_DEVICE)
    tensors = [t.to(KERNEL_DEVICE).requires_grad_() for t in inputs(2, 300, 2)]
    results = {}
    for kept in (False, True):
        transforms.clear()
        p, weight, bias, taps, u, res_taps = tensors
        own = 2 * taps, 2 * res_taps
        if kept:
            declare_fixed(*own, reused=False)
        y = gated_long_conv(p, weight, bias, own[0], u, own[1], backend="triton")
        results[kept] = y, *torch.autograd.grad(y, tensors, dy)
        # The filters' in either pass, and that of both gradients.
        assert len(transforms) == (1 if kept else 2) + 1
    for kept, computed in zip(results[True], results[False], strict=True):
        assert torch.equal(kept, computed)


def test_tables_are_made_once_and_never_while_a_graph_is_captured(monkeypatch):
    tables = monarch_plan._tables
    config = monarch_plan.Config(n1=16, n2=16, num_warps=4)
    args = config, 3, 3, 2, 16, 4, torch.float16
    assert tables(*args, torch.device("cpu")) is tables(*args, torch.device("cpu"))
    assert tables.cache_info().maxsize is None  # a graph may read them as long as the process lives
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tables(*args, torch.device("cuda", 7))  # where no other test has made them


def test_tables_of_a_gpu_are_made_outside_of_the_thread_whose_memory_may_be_a_graphs(monkeypatch):
    import threading

    seen = []

    def new_tables(*args):
        seen.append(threading.current_thread())
        return SimpleNamespace(device=args[-1])

    monkeypatch.setattr(monarch_plan, "_new_tables", new_tables)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    config, device = monarch_plan.Config(n1=16, n2=16, num_warps=4), torch.device("cuda", 0)
    make = functools.partial(
        monarch_plan._tables.__wrapped__, config, 3, 3, 2, 16, 4, torch.float16
    )
    assert make(device).device == device
    assert seen[0] is not threading.current_thread() and seen[1] == device


@pytest.mark.parametrize(("n1", "n2", "warps"), [(64, 32, 4), (128, 16, 8), (16, 16, 4)])
@pytest.mark.parametrize("vector", [4, 8])
def test_order_of_tables_is_that_of_the_kernels(n1, n2, warps, vector):
    from m2_plugin.ops.kernels import monarch_spectra

    config = monarch_plan.Config(n1=n1, n2=n2, num_warps=warps)
    table = torch.arange(n1 * n2).view(1, n1, n2)
    at = torch.arange(n1 * n2)
    size = {"VECTOR": vector, "WARPS": config.row_warps, "N2": n2}
    k1, k2 = monarch_spectra._place.fn(at, N1=n1, **size)
    assert torch.equal(monarch_plan.order(table, config, vector)[0], k1 * n2 + k2)
    assert torch.equal(monarch_spectra._offset.fn(k1, k2, **size), at)


@triton.jit
def twiddles_kernel(
    ptr, out_ptr, r, SPLIT: tl.constexpr, TWIDDLES: tl.constexpr, WARPS: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    ptr = monarch_conv._class_twiddles(ptr, r, SPLIT, N1, N2)
    re, im = monarch_conv._twiddles(ptr, SPLIT, TWIDDLES, WARPS, N1, N2)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(out_ptr + at, re)
    tl.store(out_ptr + N1 * N2 + at, im)


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_twiddles_that_are_not_stored(split):
    config = monarch_plan.Config(n1=32, n2=64, num_warps=4, split=split)
    residues, r, vector = 5, 3, 8 if split == 1 else 4
    device = torch.device(KERNEL_DEVICE)
    tables = monarch_plan._new_tables(config, residues, 5, 2, 32, vector, torch.float16, device)
    assert tables.twiddle[0].numel() == 2 * 32 * (64 // split + 3)
    out = torch.empty(2, 32, 64, device=device)
    twiddles_kernel[(1,)](
        tables.twiddle, out, r, SPLIT=split, TWIDDLES=vector, WARPS=config.row_warps, N1=32, N2=64
    )
    rows, columns = torch.arange(32.0, dtype=torch.float64), torch.arange(64.0, dtype=torch.float64)
    angles = 2 * torch.pi * (rows[:, None] + r / residues) * columns / config.points
    exact = torch.stack([angles.cos(), -angles.sin()])
    assert (out.cpu() - exact).abs().max() < 4e-7


def test_one_row_takes_half_of_the_residue_classes():
    from m2_plugin.ops.kernels.launch import device_class

    x = torch.empty(1, 5000, 3, dtype=torch.float16)
    plan = monarch_plan.plan_for("convolve", x)
    large = device_class(x.device) == "large"
    assert (plan.residues, plan.classes, plan.segments) == ((3, 2, 2) if large else (5, 3, 3))
    assert monarch_plan.plan_for("convolve", x.expand(2, -1, -1)).classes == plan.residues
