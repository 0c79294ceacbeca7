import copy
import math

import pytest
import torch

from m2_plugin.checkpoints.names import from_reference
from m2_plugin.layers.alibi_attention import AlibiAttention, alibi_slopes
from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.long_conv import (
    FilterMLP,
    HyenaFilter,
    LongConv,
    batched_taps,
    taps_of,
)
from m2_plugin.layers.mlp import DenseMLP, MonarchMLP
from m2_plugin.layers.monarch_mixer import MonarchMixer, ShortConv
from m2_plugin.ops.block_diagonal_linear import block_diagonal_to_dense
from tests.utils import KERNEL_DEVICE, load_golden, max_error, relative_error, with_prefix

FILTERS = [u for u in load_golden("units")[0] if u["prefix"].startswith("filter")]


@pytest.mark.parametrize("unit", FILTERS, ids=lambda u: u["prefix"].strip("/"))
def test_hyena_filter_golden(unit):
    t = with_prefix(load_golden("units")[1], unit["prefix"])
    conv = LongConv(
        unit["d_model"],
        unit["seq_len"],
        emb_dim=unit["emb_dim"],
        order=unit["order"],
        w=unit["w"],
        w_mod=unit["w_mod"],
        bidirectional=unit["bidirectional"],
    )
    initial = conv.filter.pos_emb.detach().clone()
    full_name = "bert.encoder.layer.0.attention.filter_fn."
    reference = from_reference({full_name + k: v for k, v in with_prefix(t, "sd/").items()})
    conv.load_state_dict(with_prefix(reference, "model.layers.0.mixer.long_conv."))
    assert relative_error(initial, conv.filter.pos_emb) < 1e-6  # the fixture has initial features

    # The sines amplify the rounding of the products, which depends on the processor: by up to 500
    # here. So both are compared with fp64, and the reference's own error is what is allowed.
    exact = copy.deepcopy(conv).double()
    u = t["u"].transpose(1, 2)
    (k_fwd, k_rev), taps = conv.filter(unit["L"]), exact.filter(unit["L"])
    assert (k_rev is None) is not unit["bidirectional"]
    found = [(k_fwd.T, t["k_fwd"], taps[0].T), (conv(u).mT, t["y"], exact(u.double()).mT)]
    if unit["bidirectional"]:
        found.append((k_rev.T, t["k_rev"], taps[1].T))
    for ours, golden, expected in found:
        error = relative_error(golden, expected)
        assert error < 1e-4  # the same function
        assert relative_error(ours, expected) < 3 * error + 1e-6


def test_taps_do_not_change_with_the_length():
    hyena = HyenaFilter(channels=6, max_length=40, order=8)
    for short, full in zip(hyena(13), hyena(40), strict=True):
        assert max_error(short, full[:13]) < 1e-6


def test_filters_stay_in_fp32_under_autocast_and_in_half_precision():
    hyena = HyenaFilter(channels=6, max_length=16, order=8)
    exact = hyena(16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hyena(16)[0], exact)
    assert hyena.to(torch.bfloat16)(16)[0].dtype == torch.float32


@pytest.mark.parametrize("size", [(8, 12, 4), (10, 7, 3), (6, 6, 1)], ids=str)
def test_block_diagonal_linear_is_a_linear_layer(size):
    size_in, size_out, nblocks = size
    layer = BlockDiagonalLinear(size_in, size_out, nblocks)
    dense = torch.nn.Linear(size_in, size_out)
    dense.weight.data = block_diagonal_to_dense(layer.weight, size_in, size_out).data
    dense.bias.data = layer.bias.data
    x = torch.randn(3, 5, size_in)
    assert max_error(layer(x), dense(x)) < 1e-5


def test_block_diagonal_linear_initialisation():
    layer = BlockDiagonalLinear(768, 6144, nblocks=4)
    # A dense U(±1/√768), scaled by √4: standard deviation √4/√(3·768).
    assert layer.weight.std().item() == pytest.approx(2 / math.sqrt(3 * 768), rel=0.01)
    assert layer.bias.abs().max() <= 1 / math.sqrt(6144)


@pytest.mark.parametrize("nblocks", [0, 9])
def test_impossible_number_of_blocks(nblocks):
    with pytest.raises(ValueError, match=f"nblocks must be between 1 and .* = 8, not {nblocks}"):
        BlockDiagonalLinear(8, 16, nblocks)


@pytest.mark.parametrize("glu", [True, False])
def test_monarch_mlp_is_a_dense_mlp(glu):
    monarch = MonarchMLP(hidden_size=16, intermediate_size=24, nblocks=4, glu=glu).eval()
    dense = DenseMLP(hidden_size=16, intermediate_size=24, glu=glu).eval()
    up, down = monarch.up_proj, monarch.down_proj
    dense.load_state_dict(
        {
            "up_proj.weight": block_diagonal_to_dense(up.weight, 16, up.out_features),
            "down_proj.weight": block_diagonal_to_dense(down.weight, 24, 16),
            "down_proj.bias": down.bias,
            "norm.weight": monarch.norm.weight,
            "norm.bias": monarch.norm.bias,
        }
    )
    x = torch.randn(2, 9, 16)
    assert max_error(monarch(x), dense(x)) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_mlp_dropout_only_in_training(training):
    mlp = MonarchMLP(16, 32, dropout=0.5).train(training)
    x = torch.randn(2, 3, 16)
    assert torch.equal(mlp(x), mlp(x)) is not training


def small_mixer(**kwargs) -> MonarchMixer:
    return MonarchMixer(hidden_size=12, max_length=32, filter_order=8, **kwargs).double().eval()


def test_causal_mixer_does_not_see_the_future():
    mixer = small_mixer(bidirectional=False)
    u = torch.randn(1, 32, 12, dtype=torch.float64)
    y = mixer(u)
    u[:, 20] += 1
    changed = (mixer(u) - y).abs().amax((0, 2)) > 1e-9
    assert not changed[:20].any() and changed[20:].all()


def test_masked_padding_does_not_leak():
    mixer = small_mixer()
    u = torch.randn(2, 32, 12, dtype=torch.float64)
    mask = torch.ones(2, 32, 1, dtype=torch.float64)
    mask[:, 20:] = 0
    alone = mixer(u[:, :20])
    assert max_error(mixer(u, mask)[:, :20], alone) < 1e-12
    assert max_error(mixer(u)[:, :20], alone) > 1e-3  # without a mask it does


def test_sequence_longer_than_the_filters():
    with pytest.raises(ValueError, match="33 positions.* long_conv_l_max = 32"):
        small_mixer()(torch.zeros(1, 33, 12, dtype=torch.float64))


def test_kept_spectrum_is_used_and_follows_the_parameters():
    conv = LongConv(6, 32, order=8).eval()
    u = torch.randn(2, 20, 6)

    def infer(u: torch.Tensor = u) -> torch.Tensor:
        with torch.no_grad():
            return conv(u)

    def scale_behind_the_version_counter() -> None:
        conv.filter.freq.data = conv.filter.freq.data * 1.5

    def scale_in_place() -> None:
        with torch.no_grad():
            conv.filter.fwd.out.weight.mul_(2)

    infer()
    kept = conv.kept
    infer()
    assert kept is not None and conv.kept is kept
    for change in (scale_in_place, scale_behind_the_version_counter) * 2:
        before = infer()
        change()
        after = infer()
        exact = conv(u).detach()  # with gradients: computed anew
        assert max_error(after, exact) < 1e-5 < max_error(after, before)
    infer()
    assert max_error(infer(u[:, :7]), conv(u[:, :7]).detach()) < 1e-5
    infer()
    conv.train()
    infer()
    assert conv.kept is None


def test_kept_taps_are_used_and_follow_the_parameters():
    conv = LongConv(6, 100, order=8, bidirectional=False).eval()
    u = torch.randn(2, 6, 90)
    with torch.no_grad():
        for length in (1, 2, 64, 65, 90, 33):
            expected = conv(u[..., :length].transpose(1, 2))[:, -1]
            assert max_error(conv.last(u[..., :length]), expected) < 1e-5
        conv.last(u)
        kept = conv.kept_taps
        assert kept is not None and kept.value.shape == (6, 100)
        conv.last(u[..., :80])
        assert conv.kept_taps is kept and copy.deepcopy(conv).kept_taps is None
        before = conv.last(u)
        conv.filter.freq.data = conv.filter.freq.data * 1.5
        after = conv.last(u)
        assert max_error(after, conv(u.transpose(1, 2))[:, -1]) < 1e-5 < max_error(after, before)
    assert conv.last(u).requires_grad and conv.kept_taps is None  # with gradients: computed anew


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_resumed_mixer_equals_the_whole(residual, norm):
    mixer = MonarchMixer(
        12, 24, bidirectional=False, residual_long_conv=residual, pre_norm=norm, filter_order=8
    ).double()  # fmt: skip
    u = torch.randn(2, 20, 12, dtype=torch.float64)
    mask = torch.ones(2, 20, 1, dtype=torch.float64)
    mask[0, :4] = 0
    for hooked in (False, True):  # a hook of a convolution must run
        if hooked:
            mixer.long_conv.register_forward_hook(lambda module, args, output: 2 * output)
        expected = mixer(u, mask)
        state, outputs = (), []
        for part in (slice(0, 1), slice(1, 9), *(slice(i, i + 1) for i in range(9, 20))):
            y, state = mixer.resume(u[:, part], mask[:, part], state)
            outputs.append(y)
        assert max_error(torch.cat(outputs, 1), expected) < 1e-12
        assert [t.shape[1:] for t in state] == [(12, 20), (2, 36), (12, 20)][: 2 + residual]
    with pytest.raises(ValueError, match="bidirectional mixer cannot resume"):
        small_mixer().resume(u[:, :1])


def test_short_conv_initialisation_is_conv1ds():
    torch.manual_seed(1)
    ours = ShortConv(9)
    torch.manual_seed(1)
    theirs = torch.nn.Conv1d(9, 9, 3, groups=9)
    assert torch.allclose(ours.weight, theirs.weight.squeeze(1))
    assert torch.allclose(ours.bias, theirs.bias)


def test_alibi_slopes():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == alibi_slopes(8) + alibi_slopes(16)[:8:2]
    with pytest.raises(ValueError, match="must divide hidden_size = 12, not 5"):
        AlibiAttention(12, 5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"bidirectional": False}, {"residual_long_conv": False}], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_mixer_kernel_equals_pytorch(masked, kwargs):
    mixer = MonarchMixer(hidden_size=8, max_length=24, filter_order=8, **kwargs).to(KERNEL_DEVICE)
    u = torch.randn(3, 20, 8, device=KERNEL_DEVICE, requires_grad=True)
    dy = torch.randn(3, 20, 8, device=KERNEL_DEVICE)
    mask = (torch.rand(3, 20, 1, device=KERNEL_DEVICE) > 0.3).float() if masked else None
    results = {}
    for backend in ("torch", "triton"):
        mixer.backend = backend
        y = mixer(u, mask)
        results[backend] = y, *torch.autograd.grad(y, [u, *mixer.parameters()], dy)
    for ours, plain in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(ours, plain) < 1e-5


def test_forced_kernel_without_dropout_says_so():
    mixer = MonarchMixer(hidden_size=8, max_length=24, dropout=0.1, backend="triton").train()
    with pytest.raises(RuntimeError, match="set mixer_dropout_prob to 0"):
        mixer(torch.zeros(1, 4, 8))


def kernel_convs(**kwargs):
    convs = [LongConv(5, 12, emb_dim=3, order=8, backend="triton", **kwargs) for _ in range(2)]
    return [conv.to(KERNEL_DEVICE) for conv in convs]


def exact_taps(conv, length):
    conv = copy.deepcopy(conv).double()
    conv.filter.backend = "torch"
    return conv.taps(length)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_taps_of_many_filters_are_those_of_each(bidirectional):
    convs = kernel_convs(bidirectional=bidirectional)
    together = batched_taps(convs, 9)
    for conv, taps in zip(convs, together, strict=True):
        assert torch.equal(conv.taps(9), taps)
        assert max_error(taps, exact_taps(conv, 9)) < 1e-5


def test_a_called_filter_gives_the_taps_that_the_kernel_gives():
    """FSDP gathers a filter's parameters in its call, and installs hooks."""
    conv = kernel_convs()[0]
    taps = conv.taps(9)
    conv.filter.register_forward_pre_hook(lambda *_: None)
    assert batched_taps([conv], 9) is None
    assert max_error(conv.taps(9), taps) < 1e-6
    assert conv.filter(12)[1].shape == (12, 5)


class OtherFilter(HyenaFilter):
    def forward(self, length):
        k_fwd, k_rev = super().forward(length)
        return 2 * k_fwd, 2 * k_rev


def change(conv, how):
    hyena = conv.filter
    if how == "hook of a part":
        hyena.rev.layers[1].register_forward_hook(lambda *_: None)
    elif how == "window":
        hyena.decay = lambda length, dtype, device: torch.ones(length, 5, device=device)
    elif how == "class":
        conv.filter = OtherFilter(5, 12, emb_dim=3, order=8, backend="triton").to(KERNEL_DEVICE)
    elif how == "class of a part":
        hyena.fwd = type("Other", (FilterMLP,), {})(3, 8, 5).to(KERNEL_DEVICE)
    elif how == "empty parameter":
        hyena.fwd.out.weight = torch.nn.Parameter(torch.empty(0, device=KERNEL_DEVICE))
    elif how == "settings":
        hyena.w_mod = 0.5


@pytest.mark.parametrize(
    "how",
    ["hook of a part", "window", "class", "class of a part", "empty parameter", "settings"],
)
def test_what_only_a_call_computes_is_called(how):
    convs = kernel_convs()
    change(convs[1], how)
    assert batched_taps(convs, 9) is None
    if how != "empty parameter":
        for conv, taps in zip(convs, taps_of(convs, 9), strict=True):
            assert max_error(taps, exact_taps(conv, 9)) < 1e-5
