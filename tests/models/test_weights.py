"""Who reads and writes weights: hooks, offloading, averages, quantisation, and other dtypes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import configuration_utils

from m2_plugin.layers.long_conv import HyenaFilter, LongConv
from m2_plugin.models import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForTextEmbedding,
    M2BertModel,
    modeling_m2_bert,
)
from tests.utils import max_error

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "long_conv_l_max": 24,
    "hyena_filter_order": 8,
}
HALF = [torch.bfloat16, torch.float16]


def model_of(cls=M2BertForMaskedLM, **sizes):
    torch.manual_seed(2)
    return cls(M2BertConfig(**SIZES, **sizes)).eval()


def ids(batch=2, length=20) -> torch.Tensor:
    return torch.randint(5, 100, (batch, length))


def fresh(model, x) -> torch.Tensor:
    """Return what a model with these weights gives that has kept nothing."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(x)[0]


def kept(model) -> list:
    return [m.kept for m in model.modules() if isinstance(m, LongConv)]


@torch.no_grad()
def test_no_way_to_write_a_weight_leaves_an_old_spectrum():
    model, x = model_of(), ids()
    others = [torch.randn_like(p) * 0.2 for p in model.parameters()]

    def average() -> None:  # as EMA libraries do
        for p, other in zip(model.parameters(), others, strict=True):
            p.data.mul_(0.9).add_(other, alpha=0.1)

    def swap() -> None:
        for p, other in zip(model.parameters(), others, strict=True):
            p.data = other.clone()

    def through_numpy() -> None:
        for p in model.parameters():
            p.detach().numpy()[...] *= 0.8

    def load() -> None:
        model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})

    for write in (average, swap, through_numpy, load, average):
        before = model(x)[0]
        assert None not in kept(model)
        write()
        after = model(x)[0]
        assert max_error(after, fresh(model, x)) < 1e-6 < max_error(after, before), write.__name__


class Doubled(nn.Module):
    """As an adapter, it can be switched without a change of any weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.on = layer, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (2 if self.on else 1)


@torch.no_grad()
def test_a_module_in_place_of_a_filters_layer_is_asked_each_time():
    model, x = model_of(M2BertModel), ids()
    plain = model(x)[0]
    filters = model.layers[0].mixer.long_conv.filter
    filters.fwd.out = adapter = Doubled(filters.fwd.out)
    assert max_error(model(x)[0], plain) < 1e-6
    adapter.on = True
    assert max_error(model(x)[0], plain) > 1e-4
    adapter.on = False
    assert max_error(model(x)[0], plain) < 1e-6
    filters.fwd.out = adapter.layer
    handle = filters.fwd.out.register_forward_hook(lambda module, args, y: 2 * y)
    assert max_error(model(x)[0], plain) > 1e-4
    handle.remove()
    assert max_error(model(x)[0], plain) < 1e-6


@torch.no_grad()
def test_a_copy_takes_no_kept_spectrum_along():
    model, x = model_of(), ids()
    y = model(x)[0]
    assert None not in kept(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(kept(other))
        assert torch.equal(other(x)[0], y)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"use_monarch_mlp": False, "hyena_training_additions": True},
        {"monarch_mlp_nblocks": 3, "use_glu_mlp": False},
        {"sequence_mixer": "alibi_attention", "num_attention_heads": 4},
    ],
    ids=["monarch", "dense", "uneven", "alibi"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_every_module_with_weights_is_called(sizes, grad):
    """Hooks fire, and what they compute is what the model computes."""
    model, x = model_of(**sizes), ids()
    expected = model(x).logits
    seen = set()
    named = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    for name, module in named.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    with torch.set_grad_enabled(grad):
        y = model(x).logits
    assert seen == set(named)
    assert max_error(y, expected) < 1e-6


def test_a_hook_changes_what_the_projections_give():
    for name in ("mixer.in_proj", "mixer.short_conv", "mlp.up_proj", "mlp.down_proj"):
        model, x = model_of(M2BertModel), ids()
        plain = model(x)[0]
        module = model.layers[1].get_submodule(name)
        module.register_forward_hook(lambda module, args, y: 2 * y)
        assert max_error(model(x)[0], plain) > 1e-4, name


def test_gradients_agree_with_and_without_hooks():
    model, x = model_of(), ids()
    plain = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    hooked = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    for one, other in zip(hooked, plain, strict=True):
        assert max_error(one, other) < 1e-6


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads(tmp_path, where):
    accelerate = pytest.importorskip("accelerate")
    model, x = model_of(M2BertForTextEmbedding), ids()
    with torch.no_grad():
        expected = model(x).sentence_embedding
        if where == "cpu":
            offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            offloaded = accelerate.disk_offload(
                model, str(tmp_path), execution_device=torch.device("cpu")
            )
        assert all(p.is_meta for p in offloaded.parameters())
        for _ in range(2):
            assert max_error(offloaded(x).sentence_embedding, expected) < 1e-6


def test_a_model_loads_with_layers_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, x = model_of(), ids()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = M2BertForMaskedLM.from_pretrained(
        tmp_path / "model",
        device_map=places | {"head": "cpu", "decoder": "cpu"},
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    assert loaded.model.layers[1].mixer.in_proj.weight.is_meta
    with torch.no_grad():
        assert max_error(loaded(x).logits, model(x).logits) < 1e-6


def test_weights_of_a_tensor_class_are_called():
    """As torchao's int8 weights, which know `F.linear` and no other product."""

    class OnlyLinear(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                assert "mm" not in func.__name__ and "matmul" not in func.__name__, func
                return func(*args, **(kwargs or {}))

    model, x = model_of(), ids()
    with torch.no_grad():
        expected = model(x).logits
        for module in model.model.layers.modules():
            if type(module) is nn.Linear:
                module._parameters["weight"] = module.weight.detach().as_subclass(OnlyLinear)
        assert type(model.model.layers[0].mixer.in_proj.weight) is OnlyLinear
        assert max_error(model(x).logits, expected) < 1e-6


def dtypes(model) -> tuple[set, set]:
    """Return the dtypes of the filters' parameters, and those of all others."""
    inside = {id(p) for m in model.modules() if isinstance(m, HyenaFilter) for p in m.parameters()}
    return (
        {p.dtype for p in model.parameters() if id(p) in inside},
        {p.dtype for p in model.parameters() if id(p) not in inside},
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_casts_leave_the_filters_exact(dtype):
    casts = (
        lambda model: model.to(dtype),
        lambda model: model.half() if dtype == torch.float16 else model.bfloat16(),
        lambda model: model.to("cpu", dtype),
        lambda model: model.type(dtype),
        lambda model: model.to(dtype).to(dtype).cpu(),
    )
    exact = model_of().model.layers[0].mixer.long_conv.filter(24)
    for cast in casts:
        model = cast(model_of())
        assert dtypes(model) == ({torch.float32}, {dtype})
        taps = model.model.layers[0].mixer.long_conv.filter(24)
        assert all(torch.equal(a, b) for a, b in zip(taps, exact, strict=True))
    model = model_of().double()
    assert dtypes(model) == ({torch.float64}, {torch.float64})
    assert dtypes(model.to(dtype)) == ({torch.float32}, {dtype})
    assert dtypes(model.float()) == ({torch.float32}, {torch.float32})


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("extended", [None, [12]], ids=["plain", "extended"])
def test_loading_in_another_dtype_leaves_the_filters_exact(tmp_path, dtype, extended):
    model, x = model_of(hyena_extended_from=extended), ids()
    model.save_pretrained(tmp_path / "a")
    loaded = M2BertForMaskedLM.from_pretrained(tmp_path / "a", torch_dtype=dtype).eval()
    assert dtypes(loaded) == ({torch.float32}, {dtype})
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(theirs, ours.to(theirs.dtype)), name
    loaded.save_pretrained(tmp_path / "b")
    again = M2BertForMaskedLM.from_pretrained(tmp_path / "b", torch_dtype="auto").eval()
    assert dtypes(again) == ({torch.float32}, {dtype})
    assert torch.equal(again(x).logits, loaded(x).logits)
    back = M2BertForMaskedLM.from_pretrained(tmp_path / "b", torch_dtype=torch.float32)
    assert dtypes(back) == ({torch.float32}, {torch.float32})


def test_models_without_filters_load_in_another_dtype(tmp_path):
    model = model_of(sequence_mixer="alibi_attention", num_attention_heads=4)
    model.save_pretrained(tmp_path)
    loaded = M2BertForMaskedLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert dtypes(loaded) == (set(), {torch.bfloat16})


def test_filters_are_fp32_under_a_default_dtype_and_after_an_assignment():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_of()
    finally:
        torch.set_default_dtype(before)
    assert dtypes(model) == ({torch.float32}, {torch.bfloat16})
    features = model.model.layers[0].mixer.long_conv.filter.pos_emb
    assert len(features[:, 0].unique()) == 24
    rounded = {name: value.bfloat16() for name, value in model_of().state_dict().items()}
    other = model_of()
    other.load_state_dict(rounded, assign=True)
    assert dtypes(other) == ({torch.float32}, {torch.bfloat16})
    assert rounded["model.layers.0.mixer.long_conv.filter.freq"].dtype == torch.bfloat16


def test_half_precision_models_train():
    model, x = model_of().to(torch.bfloat16).train(), ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(x, labels=x).loss
    for _ in range(10):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < first and dtypes(model) == ({torch.float32}, {torch.bfloat16})


@torch.no_grad()
def test_filters_in_half_precision_would_change_long_sequences():
    """Of 2,048 positions bf16 tells 641 apart."""
    length = {"long_conv_l_max": 2048, "max_position_embeddings": 2048}
    torch.manual_seed(2)
    config = M2BertConfig(**SIZES | length, initializer_range=0.1)
    model = M2BertModel(config).eval()
    x = ids(1, 2048)
    exact = model(x)[0]
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, HyenaFilter):
            for p in module.parameters():
                p.data = p.data.bfloat16().float()
    error = max_error(model.bfloat16()(x)[0].float(), exact)
    assert error < 0.5 * max_error(rounded.bfloat16()(x)[0].float(), exact)


def test_mean_pooling_without_a_token_is_finite():
    model, x = model_of(M2BertForTextEmbedding, classifier_pooling="mean"), ids(3)
    mask = torch.ones_like(x)
    mask[1] = 0
    y = model(x, attention_mask=mask).sentence_embedding
    assert y.isfinite().all()
    alone = model(x[[0, 2]], attention_mask=mask[[0, 2]]).sentence_embedding
    assert max_error(y[[0, 2]], alone) < 1e-6
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_without_a_mask_is_warned_of(monkeypatch):
    model, x = model_of(), ids()
    said: list[str] = []
    monkeypatch.setattr(modeling_m2_bert.log, "warning_once", said.append)
    model(x)
    x[:, 15:] = 0
    model(x, attention_mask=(x != 0).long())
    assert not said
    model(x)
    assert "attention_mask" in said[0]


def test_return_dict_is_read_without_a_warning(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", said.append)
    model = model_of()
    assert model(ids()).logits is not None
    model.config.return_dict = False
    assert isinstance(model(ids()), tuple)
    assert not said
