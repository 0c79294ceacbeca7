"""What runs between the kernels of the layers: no casts, copies and sums of activations."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2_plugin.models import M2BertConfig, M2BertForMaskedLM, M2BertModel, modeling_m2_bert
from m2_plugin.ops import fixed
from m2_plugin.ops.fixed import is_fixed
from m2_plugin.ops.kernels.launch import noted_launches
from tests.utils import KERNEL_DEVICE, relative_error

BATCH, LENGTH, HIDDEN = 3, 20, 4  # the interpreter takes its time for each channel
LAYERS = 2


def config(**kwargs) -> M2BertConfig:
    fields = {
        "vocab_size": 100,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": LENGTH,
        "long_conv_l_max": LENGTH,
        "hyena_filter_order": 8,
        "hidden_dropout_prob": 0.0,
    }
    return M2BertConfig(**fields | kwargs)


def ids() -> torch.Tensor:
    return torch.randint(5, 100, (BATCH, LENGTH), device=KERNEL_DEVICE)


class Launches(TorchDispatchMode):
    """The names of ops that write at least one activation, without views, in order."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest = smallest
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        own = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _real(t)}
        in_place = func._schema.name.endswith("_")
        for t in filter(_real, tree_leaves(out)):
            viewed = t.untyped_storage().data_ptr() in own and not in_place
            if t.numel() >= self.smallest and not viewed:
                self.names.append(func._schema.name.split("::")[-1])
                break
        return out


def _real(t) -> bool:
    return isinstance(t, torch.Tensor)


def autocast():
    return torch.autocast(KERNEL_DEVICE, torch.float16)  # the interpreter multiplies it rightly


FORWARD = ["mm", "gated_long_conv", "addmm", "monarch_mlp", "add_layer_norm"]
BACKWARD = [
    "add_layer_norm_backward",
    "monarch_mlp_backward",
    "add",  # of the MLP's and the LayerNorm's gradients
    "mm",  # out_proj
    "gated_long_conv_backward",
    "addmm_",  # in_proj, onto the gradient of the residual convolution's input
]


def test_a_layer_launches_nothing_between_its_kernels():
    width = 64  # the fused MLP takes no less
    model = M2BertModel(config(backend="triton", hidden_size=width, intermediate_size=4 * width))
    model = model.to(KERNEL_DEVICE).train()
    x = ids().repeat(4, 1)
    smallest = x.numel() * width  # more than a weight or a filter has
    with noted_launches(), autocast(), Launches(smallest) as forward:
        y = model(x, attention_mask=torch.ones_like(x)).last_hidden_state
    assert y.dtype == torch.float32 and y.is_contiguous()
    layers = forward.names[-LAYERS * len(FORWARD) :]
    assert layers == FORWARD * LAYERS
    assert forward.names[: -len(layers)] == ["embedding", "add_layer_norm"]
    dy = torch.randn_like(y)
    with noted_launches(), Launches(smallest) as backward:
        y.backward(dy)
    assert backward.names[: LAYERS * len(BACKWARD)] == BACKWARD * LAYERS


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"residual_long_conv": False, "mask_padding": True},
        {"hyena_training_additions": True},
        {"use_monarch_mlp": False, "use_glu_mlp": False, "use_positional_encodings": False},
        {"sequence_mixer": "alibi_attention", "num_attention_heads": 4},
        {"pad_inputs": True},
        {"mixer_dropout_prob": 0.1},
    ],
    ids=str,
)
def test_kernels_and_pytorch_give_the_same(fields):
    backend = "auto" if "mixer_dropout_prob" in fields else "triton"
    model = M2BertForMaskedLM(config(**fields)).to(KERNEL_DEVICE)
    other = M2BertForMaskedLM(config(**fields, backend=backend)).to(KERNEL_DEVICE)
    other.load_state_dict(model.state_dict())
    x, labels = ids()[:, :-3], ids()[:, :-3]
    mask, types = torch.ones_like(x), torch.randint(2, x.shape, device=x.device)
    mask[0, 9:] = 0
    given = {"token_type_ids": types, "position_ids": x % 7} if "mask_padding" in fields else {}
    results = []
    for m in (model.eval(), other.eval()):
        out = m(x, mask, labels=labels, output_hidden_states=True, **given)
        out.loss.backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([*out.hidden_states, out.logits, *grads])
    for ours, plain in zip(*results, strict=True):
        assert ours.shape == plain.shape
        assert relative_error(ours, plain) < 2e-5


def test_only_mixers_get_positions_contiguous_in_memory():
    model = M2BertModel(config(backend="triton")).to(KERNEL_DEVICE).eval()
    output = model(ids(), output_hidden_states=True)
    *inner, last = output.hidden_states
    assert all(h.permute(2, 0, 1).is_contiguous() for h in inner)
    assert last.is_contiguous()
    model.layers = model.layers[:-1]
    assert model(ids()).last_hidden_state.is_contiguous()


def test_norms_with_hooks_are_called():
    model = M2BertModel(config(backend="triton")).to(KERNEL_DEVICE).eval()
    x = ids()
    expected = model(x).last_hidden_state
    called = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *_: called.append(1))
    assert relative_error(model(x).last_hidden_state, expected) < 1e-5
    assert len(called) == LAYERS + 1


def test_labelled_positions_are_found_before_the_encoder_runs():
    """On a GPU the host waits for their number."""
    model = M2BertForMaskedLM(config())
    x = ids().cpu()
    with Launches(smallest=1) as launches:
        model(x, labels=x, masked_logits_only=True)
    assert launches.names.index("nonzero") < launches.names.index("embedding")


def test_other_devices_are_asked_for_padding_once(monkeypatch):
    """A look at the ids makes the host wait for a GPU."""
    looks = []
    monkeypatch.setattr(torch.Tensor, "__contains__", lambda *_: looks.append(1))
    for device, expected in (("cpu", 3), ("meta", 1)):
        looks.clear()
        model, x = M2BertModel(config()), ids().to(device)
        for _ in range(3):
            model._warn_of_padding(x)
        assert len(looks) == expected


def test_torch_compile_finds_one_graph():
    model = M2BertModel(config(backend="triton")).to(KERNEL_DEVICE).train()
    x, mask = ids(), torch.ones(BATCH, LENGTH, device=KERNEL_DEVICE)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(x, mask).last_hidden_state
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results.append([y, *grads])
    for compiled, eager in zip(*results, strict=True):
        assert relative_error(compiled, eager) < 1e-5


def test_filters_spectra_stay_for_the_backward_pass_if_there_is_room(monkeypatch):
    """And no longer than that."""
    found, taps_of_mixers = [], modeling_m2_bert.taps_of_mixers
    monkeypatch.setattr(
        modeling_m2_bert,
        "taps_of_mixers",
        lambda *args: found.append(taps_of_mixers(*args)) or found[-1],
    )
    model = M2BertModel(config(backend="triton")).to(KERNEL_DEVICE).train()

    def stay():
        found.clear()
        with noted_launches():
            model(ids())
        return {is_fixed(taps) for layer in found[0] for taps in layer}

    before = len(fixed._fixed)
    assert stay() == {True}
    found.clear()
    gc.collect()
    assert len(fixed._fixed) == before
    with torch.no_grad():
        assert stay() == {False}
    model.gradient_checkpointing_enable()
    assert stay() == {False}
    model.gradient_checkpointing_disable()
    monkeypatch.setattr(modeling_m2_bert, "_keeps_spectra", lambda nbytes, device: nbytes < 1)
    assert stay() == {False}
