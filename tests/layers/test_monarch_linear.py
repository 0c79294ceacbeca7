import pytest
import torch

from m2_plugin.layers.monarch_linear import MonarchLinear

SIZES = [(16, 16, 4), (12, 20, 2), (20, 12, 3), (13, 29, 4), (29, 13, 4), (7, 7, 7), (5, 9, 1)]
sizes = pytest.mark.parametrize("n_in, n_out, nblocks", SIZES)


def dense(layer: MonarchLinear) -> torch.Tensor:
    """P · L · P · R, each factor and permutation written out entry by entry."""

    def block_diagonal(weight):
        blocks, n_out, n_in = weight.shape
        matrix = torch.zeros(blocks * n_out, blocks * n_in, dtype=weight.dtype)
        for k in range(blocks):
            for o in range(n_out):
                for i in range(n_in):
                    matrix[k * n_out + o, k * n_in + i] = weight[k, o, i]
        return matrix

    def permutation(blocks, size):
        matrix = torch.zeros(blocks * size, blocks * size, dtype=torch.float64)
        for k in range(blocks):
            for j in range(size):
                matrix[j * blocks + k, k * size + j] = 1
        return matrix

    with torch.no_grad():
        right, left = block_diagonal(layer.right), block_diagonal(layer.left)
        middle, outer = (permutation(layer.nblocks, w.shape[1]) for w in (layer.right, layer.left))
        return (outer @ left @ middle @ right)[: layer.out_features, : layer.in_features]


@sizes
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_matrix(n_in, n_out, nblocks, bias):
    layer = MonarchLinear(n_in, n_out, nblocks, bias).double()
    x = torch.randn(3, 5, n_in, dtype=torch.float64)
    expected = x @ dense(layer).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@sizes
def test_gradients(n_in, n_out, nblocks):
    layer = MonarchLinear(n_in, n_out, nblocks).double()
    x = torch.randn(2, n_in, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["right", "left", "bias"]

    def apply(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *layer.parameters()))


@pytest.mark.parametrize("n_in, n_out, nblocks", [(64, 64, 8), (61, 35, 4), (30, 90, 5)])
def test_every_output_depends_on_every_input(n_in, n_out, nblocks):
    """A single block-diagonal factor has 1/K of the entries only."""
    layer = MonarchLinear(n_in, n_out, nblocks).double()
    matrix = dense(layer)
    assert matrix.shape == (n_out, n_in)
    assert (matrix != 0).all()


def test_has_two_kths_of_a_dense_layers_weights():
    layer = MonarchLinear(64, 64, nblocks=8, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 64 * 64 // 8


@pytest.mark.parametrize("n_in, n_out", [(512, 512), (256, 1024), (1024, 256)])
def test_starts_with_the_variance_of_a_dense_layer(n_in, n_out):
    torch.manual_seed(0)
    x = torch.randn(512, n_in)
    monarch, linear = (
        layer(n_in, n_out, bias=False)(x).std().item() for layer in (MonarchLinear, torch.nn.Linear)
    )
    assert monarch == pytest.approx(linear, rel=0.05)


@pytest.mark.parametrize("nblocks", [0, 6])
def test_refuses_blocks_that_do_not_fit(nblocks):
    with pytest.raises(ValueError, match=r"between 1 and min.* = 5, not"):
        MonarchLinear(8, 5, nblocks)


def test_is_made_where_asked():
    assert {p.device.type for p in MonarchLinear(8, 8, device="meta").parameters()} == {"meta"}
