import pytest
import torch
import torch.nn.functional as F

from m2_plugin.ops.block_diagonal_linear import block_diagonal_to_dense, block_shape
from m2_plugin.ops.monarch_mlp import monarch_mlp
from m2_plugin.ops.reference.monarch_mlp import monarch_mlp_reference
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients

LN2 = 0.6931471805599453
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


def mlp_inputs(rows, width, size, nblocks, glu):
    return [
        torch.randn(rows, width),
        torch.randn(block_shape(width, size * (2 if glu else 1), nblocks)) / width**0.5,
        torch.randn(block_shape(size, width, nblocks)) / size**0.5,
        torch.randn(width),
    ]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize(
    "shape",
    [
        *[(37, 128, 256, 4), (70, 384, 128, 2), (5, 16, 64, 1)],  # fused
        *[(37, 96, 136, 4), (17, 24, 48, 1), (5, 60, 36, 3), (70, 200, 40, 2)],
    ],
    ids=lambda s: "N{}-D{}-F{}-K{}".format(*s),
)
def test_kernel(shape, glu, dtype):
    rows, width, size, nblocks = shape
    tensors = mlp_inputs(*shape, glu)
    dy = torch.randn(rows, width)

    def run(backend, to):
        args = [t.to(dtype).to(KERNEL_DEVICE, to).requires_grad_() for t in tensors]
        y = monarch_mlp(*args, size, glu, backend=backend)
        return y, *gradients(y, dy.to(dtype).to(y), *args)

    for name, actual, exact, plain in zip(
        ("y", "dx", "dup", "ddown", "dbias"),
        run("triton", dtype),
        run("torch", torch.float64),
        run("torch", dtype),
        strict=True,
    ):
        assert actual.dtype == dtype
        assert_close(name, actual, exact, plain)


@pytest.mark.parametrize("width", [13, 16, 30, 48, 96, 100, 192, 240, 384, 448, 512])
def test_kernel_cuts_block_widths_into_powers_of_two(width):
    from m2_plugin.ops.kernels.monarch_mlp import split_width

    parts = [q for q in split_width(width) if q]
    assert all(q >= 16 and q & (q - 1) == 0 for q in parts) and parts == sorted(parts)[::-1]
    assert width <= sum(parts) <= max(16, 4 / 3 * width)


def test_fused_kernels_take_blocks_that_tiles_fill():
    from m2_plugin.ops.kernels.monarch_mlp import takes_blocks

    device = torch.device(KERNEL_DEVICE)
    for width, size, taken in (
        (192, 768, True),  # 80M
        (384, 1536, False),  # 260M
        (32, 128, True),  # the quickstart
        (240, 960, False),  # 110M
        (448, 1792, False),  # 341M
        (192, 20, False),
        (1024, 1024, False),
    ):
        assert takes_blocks(width, size, device, torch.bfloat16) is taken


def test_kernel_dropout_is_the_same_mask_in_both_directions(monkeypatch):
    """With the seed fixed the op is linear in x's gradient path, so finite differences hold."""
    from m2_plugin.ops.kernels import monarch_mlp as kernels

    monkeypatch.setattr(kernels, "BACKWARD_ROWS", 16)  # the mask must not depend on the parts
    x, up, down, bias = (t.to(KERNEL_DEVICE) for t in mlp_inputs(40, 32, 64, 4, True))
    seed = torch.tensor([7], device=KERNEL_DEVICE)
    x.requires_grad_()

    def run(x):
        return kernels.monarch_mlp_op(x, up, down, bias, seed, True, 0.3, True)

    direction, dy = torch.randn_like(x), torch.randn_like(x)
    (grad,) = gradients(run(x), dy, x)
    with torch.no_grad():
        step = 1e-2
        slope = ((run(x + step * direction) - run(x - step * direction)) * dy).sum() / (2 * step)
    assert abs(slope - (grad * direction).sum()) < 5e-3 * abs(slope) + 1e-2


@pytest.mark.parametrize("width", [32, 48], ids=["one_part", "two_parts"])
def test_working_ahead_changes_nothing(width, monkeypatch):
    from m2_plugin.ops.kernels import monarch_mlp as kernels

    if not kernels.works_ahead(torch.device(KERNEL_DEVICE)):
        pytest.skip("only Hopper has kernels that work ahead")
    inputs = [t.to(KERNEL_DEVICE, torch.float16) for t in mlp_inputs(70, 2 * width, 256, 2, True)]
    args = [t.requires_grad_() for t in inputs]
    seed = torch.tensor([7], device=KERNEL_DEVICE)
    dy = torch.randn(70, 2 * width).to(args[0])
    tried = []

    def run(ahead):
        def take(op, key, candidates, run, device):
            tried.append((op, ahead))
            return next(c for c in candidates if c.ahead == ahead)

        monkeypatch.setattr(kernels.tuning, "best", take)
        y = kernels.monarch_mlp_op(*args, seed, True, 0.3, True)
        return y, *gradients(y, dy, *args)

    for name, actual, expected in zip(
        ("y", "dx", "dup", "ddown", "dbias"), run(True), run(False), strict=True
    ):
        assert_close(name, actual, expected.double(), atol=2e-3)
    assert ("monarch_mlp", True) in tried and ("monarch_mlp_backward", True) in tried


def test_kernel_dropout_drops_the_right_share_anew_each_time():
    x = torch.ones(64, 16, device=KERNEL_DEVICE)
    # Each output is the sum of its block's activations, all gelu(1)·1 = 0.841 before dropout.
    up = torch.full((2, 64, 8), 1 / 8, device=KERNEL_DEVICE)
    down = torch.zeros(2, 8, 32, device=KERNEL_DEVICE)
    down[:, :, 0] = 1  # reads one activation: dropped or scaled
    args = x, up, down, None, 64
    full = monarch_mlp(*args, backend="triton")[0, 0]
    first, second = (monarch_mlp(*args, dropout_p=0.25, backend="triton") for _ in range(2))
    assert not torch.equal(first, second)
    kept = first[:, ::8]  # one column of each block: outputs of a block share their activation
    dropped = kept.abs() < 1e-6
    assert torch.allclose(kept[~dropped], full / 0.75, rtol=1e-4)
    assert 0.12 < dropped.float().mean() < 0.40  # 128 draws: 0.25 ± 3.4 standard deviations


@pytest.mark.parametrize("size", [16, 13], ids=["even", "odd"])
@pytest.mark.parametrize("failing", ["_forward", "_backward"])
def test_pytorch_takes_over_with_the_kernels_dropout_mask(failing, size, monkeypatch):
    from m2_plugin.ops import backend
    from m2_plugin.ops.kernels import monarch_mlp as kernels

    def fail(*args):
        raise RuntimeError("no shared memory left")

    args = [t.to(KERNEL_DEVICE).requires_grad_() for t in mlp_inputs(40, 32, 4 * size, 4, True)]
    seed = torch.tensor([2**31 - 5], device=KERNEL_DEVICE)
    dy = torch.randn(40, 32, device=KERNEL_DEVICE)

    def run(strict):
        y = kernels.monarch_mlp_op(*args, seed, True, 0.3, strict)
        return y, *gradients(y, dy, *args)

    expected = run(strict=True)
    monkeypatch.setattr(backend, "_failed", {})
    monkeypatch.setattr(kernels, failing, fail)
    for name, actual, kernel in zip(
        ("y", "dx", "dup", "ddown", "dbias"), run(strict=False), expected, strict=True
    ):
        assert_close(name, actual, kernel)
    assert "no shared memory" in backend.failures()["monarch_mlp"]


@pytest.mark.parametrize(
    ("p", "share"), [(0.1, 0.1), (0.5, 0.5), (1e-7, 0.0), (1.0, 65535 / 65536)]
)
def test_dropout_mask_is_random_and_keeps_the_mean(p, share):
    from m2_plugin.ops.kernels.monarch_mlp import dropout_mask, dropout_threshold

    threshold, scale = dropout_threshold(p)
    assert abs(threshold / 65536 - share) < 1e-5
    assert scale == 0 if p == 1 else abs(scale * (1 - threshold / 65536) - 1) < 1e-9
    kept = dropout_mask(torch.tensor([7]), 512, 4, 256, threshold).double()
    other = dropout_mask(torch.tensor([8]), 512, 4, 256, threshold).double()
    if p != 0.1 and p != 0.5:
        return
    deviation = (share * (1 - share)) ** 0.5
    centred = (kept - (1 - share)) / deviation
    for pairs in (  # each a mean of about 5e5 products, 0 ± 0.0014 if they are independent
        centred,
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[:, 2:] * centred[:, :-2],
        centred[1:, 1:] * centred[:-1, :-1],
        centred[1:, 1:] * centred[:-1, :-1] * centred[1:, :-1] * centred[:-1, 1:],
        centred[:, 256:] * centred[:, :-256],
        centred * (other - (1 - share)) / deviation,
    ):
        assert abs(pairs.mean()) < 7e-3
    # Rows and columns differ in how many they keep as much as independent draws do.
    assert 0.8 < centred.sum(1).square().mean() / kept.shape[1] < 1.2
    assert 0.8 < centred.sum(0).square().mean() / kept.shape[0] < 1.2


def test_approximate_gelu_and_its_gradient():
    """As the kernels compute them for 16-bit inputs, but in fp64."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    square = (x * x).clamp_max(40)
    cdf = torch.sigmoid(x * (2.30112134 + square * (0.106775726 - square * 0.00101426330)) * LN2)
    exact = torch.special.ndtr(x)
    assert (x * (cdf - exact)).abs().max() < 2.6e-5
    tail = (x > -5) & (x < 0)
    assert ((cdf - exact) / exact)[tail].abs().max() < 0.04


def test_kernel_op_is_registered_as_torch_expects():
    from m2_plugin.ops.kernels.monarch_mlp import monarch_mlp_op

    args = [t.to(KERNEL_DEVICE).requires_grad_() for t in mlp_inputs(9, 32, 64, 4, True)]
    torch.library.opcheck(monarch_mlp_op.custom, (*args, None, True, 0.0, True))


def test_kernel_takes_strided_rows():
    x, up, down, bias = (t.to(KERNEL_DEVICE) for t in mlp_inputs(40, 32, 64, 4, True))
    y = monarch_mlp(x, up, down, bias, 64, backend="triton")
    transposed = x.T.contiguous().T
    assert torch.equal(monarch_mlp(transposed, up, down, bias, 64, backend="triton"), y)
