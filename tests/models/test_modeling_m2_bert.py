import copy
import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from m2_plugin.checkpoints.names import from_reference
from m2_plugin.models import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertModel,
    modeling_m2_bert,
)
from tests.utils import GOLDEN, KERNEL_DEVICE, TOKENIZER, max_error

REFERENCE = json.loads((GOLDEN / "reference_80M.json").read_text())
SIZES = {
    "m2_80M": (768, 3072),
    "m2_110M": (960, 3840),
    "m2_260M": (1536, 6144),
    "m2_341M": (1792, 7168),
}
SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "long_conv_l_max": 24,
    "hyena_filter_order": 8,
}


def small(**kwargs) -> M2BertConfig:
    return M2BertConfig(**SMALL | kwargs)


def ids(batch=2, length=20) -> torch.Tensor:
    return torch.randint(5, 100, (batch, length))


def on_meta(cls, config):
    with torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    return model


def test_loaded_filters_give_the_taps_of_the_saved_model(tmp_path):
    """Mapped from a file at an odd address, the same weights once gave other last digits."""
    model = M2BertModel(small(initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    for ours, theirs in zip(model.layers, loaded.layers, strict=True):
        expected, found = (layer.mixer.long_conv.filter(24) for layer in (ours, theirs))
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_what_transformers_has_loaded_is_not_drawn_again():
    """transformers 5 initialises after loading, and marks the parameters that it has loaded."""
    model = M2BertForMaskedLM(small())
    for parameter in model.parameters():
        parameter.data.normal_()
        parameter._is_hf_initialized = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.modules():
        model._init_weights(module)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_references(size):
    hidden, intermediate = SIZES[size]
    config = M2BertConfig(hidden_size=hidden, intermediate_size=intermediate)
    model = on_meta(M2BertForMaskedLM, config)
    count = sum(p.numel() for p in model.parameters())
    assert count == REFERENCE["param_counts"][size]["total"]
    embeddings = model.get_input_embeddings().weight.numel()
    assert embeddings == REFERENCE["param_counts"][size]["word_emb"]
    filters = sum(
        p.numel() for n, p in model.named_parameters() if ".filter." in n or n.endswith("skip")
    )
    features = sum(p.numel() for n, p in model.named_parameters() if n.endswith("pos_emb"))
    assert filters == REFERENCE["param_counts"][size]["filter_params"]
    assert features == REFERENCE["param_counts"][size]["pos_emb_z_params"]
    config.num_labels = 2
    classifier = on_meta(M2BertForSequenceClassification, config)
    count = sum(p.numel() for p in classifier.parameters())
    assert count == REFERENCE["seqcls_2label_counts"][size]["total"]


def test_parameter_count_with_training_additions():
    model = on_meta(M2BertForMaskedLM, M2BertConfig(hyena_training_additions=True))
    count = sum(p.numel() for p in model.parameters())
    assert count == REFERENCE["m2_80M_with_training_additions_total"]


def test_published_names_and_shapes_load():
    shapes = REFERENCE["state_dict_keys_nonlayer_and_layer0"]
    reference = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    ours = from_reference(reference)
    model = on_meta(M2BertForMaskedLM, M2BertConfig(num_hidden_layers=1))
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in ours.items()} == expected


def test_unknown_reference_name_is_named():
    with pytest.raises(ValueError, match="'bert.encoder.layer.0.attention.qkv.weight'"):
        from_reference({"bert.encoder.layer.0.attention.qkv.weight": torch.zeros(1)})


def test_initialisation_is_the_references():
    torch.manual_seed(17)
    model = M2BertForMaskedLM(M2BertConfig(num_hidden_layers=2))
    state = model.state_dict()
    compared = 0
    for name, stats in REFERENCE["init_stats"].items():
        ours = from_reference({name: torch.empty(stats["shape"], device="meta")})
        for key in ours:
            # Both are samples of n values: 6 standard errors of their difference.
            n, std = state[key].numel(), stats["std"]
            mean_error, std_error = 6 * std * (2 / n) ** 0.5, 6 * std * n**-0.5
            assert abs(state[key].mean().item() - stats["mean"]) <= mean_error + 1e-6, key
            assert abs(state[key].std().item() - std) <= std_error + 1e-6, key
            compared += 1
    assert compared > 30
    assert (state["model.embeddings.word_embeddings.weight"][0] == 0).all()
    first, second = (f"model.layers.{i}.mixer.short_conv.weight" for i in (0, 1))
    assert not torch.equal(state[first], state[second])  # the reference copies its first layer


def test_meta_device_initialisation_reaches_every_parameter():
    meta = on_meta(M2BertForMaskedLM, small())
    meta.to_empty(device="cpu")
    for parameter in meta.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    meta.apply(meta._init_weights)
    meta.tie_weights()
    for name, parameter in meta.named_parameters():
        assert parameter.isfinite().all(), name
    assert meta(ids()).logits.isfinite().all()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_save_and_load(tmp_path, auto):
    model = M2BertForMaskedLM(small()).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    x = ids()
    if auto is AutoModel:
        assert max_error(loaded(x).last_hidden_state, model.model(x).last_hidden_state) < 1e-6
    else:
        assert not info["unexpected_keys"]
        assert max_error(loaded(x).logits, model(x).logits) < 1e-6
        saved = model.state_dict()
        assert all(torch.equal(v, saved[k]) for k, v in loaded.state_dict().items())
        assert loaded.decoder.weight is loaded.get_input_embeddings().weight
    again = AutoConfig.from_pretrained(tmp_path)
    assert {k: getattr(again, k) for k in SMALL} == {k: getattr(model.config, k) for k in SMALL}


def test_fill_mask_pipeline_loads_a_folder(tmp_path):
    M2BertForMaskedLM(small(vocab_size=30522)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path)
    guesses = pipeline("fill-mask", model=str(tmp_path))("He did not know what to [MASK].")
    assert len(guesses) == 5 and guesses[0]["score"] >= guesses[1]["score"]
    assert guesses[0]["sequence"].startswith("he did not know what to")


def test_classifier_loads_a_pretrained_body(tmp_path):
    pretrained = M2BertForMaskedLM(small()).eval()
    pretrained.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    heads = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert set(info["missing_keys"]) == heads
    x = ids()
    expected = pretrained.model(x).last_hidden_state
    assert max_error(model.eval().model(x).last_hidden_state, expected) < 1e-6
    assert model(x, labels=torch.tensor([0, 2])).logits.shape == (2, 3)


def test_problem_types():
    x = ids()
    regression = M2BertForSequenceClassification(small(num_labels=1))
    assert regression(x, labels=torch.tensor([0.5, 2.0])).loss.isfinite()
    several = M2BertForSequenceClassification(small(num_labels=3))
    assert several(x, labels=torch.ones(2, 3)).loss.isfinite()


def test_gradient_checkpointing_gives_the_same_gradients():
    x, labels = ids(), ids()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = M2BertForMaskedLM(small()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.gradient_checkpointing
        torch.manual_seed(4)  # the same dropout
        model(x, labels=labels).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_inputs_embeds_and_hidden_states():
    model = M2BertModel(small()).eval()
    x = ids()
    by_ids = model(x, output_hidden_states=True)
    embedded = model(inputs_embeds=model.get_input_embeddings()(x))
    assert torch.equal(by_ids.last_hidden_state, embedded.last_hidden_state)
    assert len(by_ids.hidden_states) == 3
    assert torch.equal(by_ids.hidden_states[-1], by_ids.last_hidden_state)
    assert torch.equal(model(x, return_dict=False)[0], by_ids.last_hidden_state)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(x, inputs_embeds=model.get_input_embeddings()(x))


def test_position_ids_default_to_a_range():
    model = M2BertModel(small()).eval()
    x = ids()
    given = model(x, position_ids=torch.arange(20)[None])
    assert torch.equal(model(x).last_hidden_state, given.last_hidden_state)
    moved = model(x, position_ids=torch.arange(3, 23)[None])
    assert not torch.equal(model(x).last_hidden_state, moved.last_hidden_state)


@pytest.mark.parametrize("mixer", ["monarch_mixer", "alibi_attention"])
def test_mask_padding_makes_padding_invisible(mixer):
    """The reference's outputs for 20 tokens alone and padded differ by up to 3.5."""
    config = small(mask_padding=True, sequence_mixer=mixer, num_attention_heads=4)
    model = M2BertForMaskedLM(config).eval()
    x = ids(length=24)
    mask = torch.ones_like(x)
    mask[:, 15:] = 0
    alone = model(x[:, :15], attention_mask=mask[:, :15]).logits
    assert max_error(model(x, attention_mask=mask).logits[:, :15], alone) < 1e-5
    x[:, 15:] = 0
    assert max_error(model(x, attention_mask=mask).logits[:, :15], alone) < 1e-5


def test_label_zero_counts_and_no_label_gives_no_nan():
    model = M2BertForMaskedLM(small()).eval()
    x = ids()
    labels = torch.full_like(x, -100)
    empty = model(x, labels=labels, masked_logits_only=True)
    assert empty.loss.item() == 0 and empty.logits.shape == (0, 104)
    empty.loss.backward()
    labels[0, 3] = 0  # the reference drops it
    loss = model(x, labels=labels).loss
    expected = -model(x).logits[0, 3].log_softmax(0)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_only_gives_the_loss_and_its_gradients():
    model = M2BertForMaskedLM(small(hidden_dropout_prob=0.0))
    x = ids()
    labels = torch.where(torch.rand(x.shape) < 0.3, x, -100)
    results = []
    for flag in ("loss_only", "masked_logits_only"):
        output = model(x, labels=labels, **{flag: True})
        assert (output.logits is None) == (flag == "loss_only")
        results.append((output.loss, *torch.autograd.grad(output.loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    loss, *_ = model(x, labels=labels, loss_only=True, return_dict=False)
    assert loss == results[0][0]
    assert model(x, loss_only=True).logits.shape == (2, 20, 104)
    none = model(x, labels=torch.full_like(x, -100), loss_only=True)
    assert none.loss == 0 and none.logits is None


def test_loss_only_calls_a_decoder_that_has_hooks():
    """As an adapter's: its logits decide."""
    model = M2BertForMaskedLM(small()).eval()
    x = ids()
    model.decoder.register_forward_hook(lambda module, args, output: output * 0)
    output = model(x, labels=x, loss_only=True)
    assert output.logits.shape == (40, 104)
    assert output.loss.item() == pytest.approx(4.644, abs=1e-3)  # ln 104


def test_a_few_steps_fit_a_batch():
    model = M2BertForMaskedLM(small(hidden_dropout_prob=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = ids()
    losses = []
    for _ in range(60):
        loss = model(x, labels=x, masked_logits_only=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4.6, abs=0.5)  # ln 104
    assert losses[-1] < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    """Whole-model casts, as for inference: the filters are computed in fp32 at least."""
    model = M2BertForMaskedLM(small(mask_padding=True)).eval()
    x, mask = ids(), torch.ones(2, 20, dtype=torch.long)
    exact = model(x, attention_mask=mask).logits
    cast = model.to(dtype)
    output = cast(x, attention_mask=mask, labels=x)
    assert output.logits.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert max_error(output.logits, exact) < tolerance * exact.abs().max()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in cast.parameters())


def test_autocast_trains():
    model = M2BertForMaskedLM(small()).train()
    x = ids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x, masked_logits_only=True).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_replaced_projections_are_called():
    """As by int8 dynamic quantisation or an adapter."""
    model = M2BertForMaskedLM(small()).eval()
    x = ids()
    exact = model(x).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    mixer = quantised.model.layers[0].mixer
    assert type(mixer.in_proj) is not torch.nn.Linear
    error = max_error(quantised(x).logits, exact)
    assert 0 < error < 0.2 * exact.abs().max()


def test_torch_compile_agrees():
    model = M2BertForMaskedLM(small()).eval()
    x = ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert max_error(compiled(x).logits, model(x).logits) < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_trains_alike():
    """llm-foundry's `compile_config` uses Inductor, which sees neither our FFT nor its gradient."""
    model = M2BertForMaskedLM(small(num_hidden_layers=1, hidden_dropout_prob=0.0))
    x = ids()
    results = []
    plain = {"cpp.vec_isa_ok": False}  # C++ without vectors is compiled in two thirds of the time
    for run in (model, torch.compile(model, options=plain)):
        loss = run(x, labels=x).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for compiled, eager in zip(*results, strict=True):
        assert max_error(compiled, eager) < 1e-5


def test_kernels_give_pytorchs_loss_and_gradients():
    config = small(hidden_dropout_prob=0.0, mask_padding=True)
    model = M2BertForMaskedLM(config).to(KERNEL_DEVICE)
    ids = torch.randint(5, config.vocab_size, (2, 12), device=KERNEL_DEVICE)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 9:] = 0
    results = {}
    for backend in ("torch", "triton"):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        loss = model(ids, attention_mask=attention_mask, labels=ids).loss
        results[backend] = loss, *torch.autograd.grad(loss, list(model.parameters()))
    for ours, plain in zip(results["triton"], results["torch"], strict=True):
        assert max_error(ours, plain) < 1e-5 * max(1.0, plain.abs().max().item())


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton.*'cuda'"):
        small(backend="cuda")


def test_longer_than_the_model():
    for config in (small(long_conv_l_max=16), small(max_position_embeddings=16)):
        with pytest.raises(ValueError, match="20 positions, but this model takes at most 16"):
            M2BertModel(config)(ids())
    endless = small(
        sequence_mixer="alibi_attention", num_attention_heads=4, use_positional_encodings=False
    )
    assert M2BertModel(endless)(ids(length=40)).last_hidden_state.shape == (2, 40, 16)


@pytest.fixture
def filter_launches(monkeypatch):
    """The numbers of filters that kernels computed taps of, a list that grows."""
    from m2_plugin.ops.kernels import hyena_filters

    found, compute = [], hyena_filters.compute_taps

    def spy(packed, scale, rates, sizes, *args):
        found.append(sizes.filters)
        return compute(packed, scale, rates, sizes, *args)

    monkeypatch.setattr(hyena_filters, "compute_taps", spy)
    return found


def small_with_kernels() -> M2BertModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "hyena_filter_order": 8}
    config = small(backend="triton", use_monarch_mlp=False, hidden_dropout_prob=0.0, **sizes)
    return M2BertModel(config).to(KERNEL_DEVICE)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "other"])
def test_filters_of_all_layers_at_once_or_by_layer(reentrant, monkeypatch, filter_launches):
    model = small_with_kernels().train()
    layers = len(model.layers)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    embeddings = torch.randn(2, 6, 8, device=KERNEL_DEVICE, requires_grad=True)
    results = []
    for limit in (1 << 28, 1):
        monkeypatch.setattr(modeling_m2_bert, "TAPS_BYTES", limit)
        y = model(inputs_embeds=embeddings).last_hidden_state
        model.zero_grad()
        y.sum().backward()
        results.append((y, *(p.grad for p in model.layers.parameters())))
    by_layer = layers if reentrant is None else 2 * layers  # computed again
    assert filter_launches == [2 * layers] + by_layer * [2]
    for one, other in zip(*results, strict=True):
        assert max_error(one, other) < 1e-6 * max(1.0, other.abs().max().item())


def test_a_layer_that_is_not_plain_computes_its_own_filters(filter_launches):
    model = small_with_kernels().eval()
    x = torch.randint(5, 100, (1, 6), device=KERNEL_DEVICE)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        model.layers[-1].register_forward_hook(lambda *_: None)
        assert torch.equal(model(x).last_hidden_state, expected)
    layers = len(model.layers)
    assert filter_launches == [2 * layers] + layers * [2]


def test_embeddings_of_consecutive_ids_are_those_of_a_lookup():
    """Also where somebody listens to the embedding."""
    model = M2BertModel(small(hidden_dropout_prob=0.0))
    x = torch.randint(5, 100, (2, 7))
    positions, types = torch.arange(7)[None], torch.zeros(2, 7, dtype=torch.int64)
    calls = []
    for hooked in (False, True):
        if hooked:
            model.embeddings.position_embeddings.register_forward_hook(lambda *_: calls.append(1))
        results = []
        for ids in ({}, {"position_ids": positions, "token_type_ids": types}):
            model.zero_grad()
            y = model(x, **ids).last_hidden_state
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.embeddings.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert max_error(actual, expected) < 1e-5
    assert len(calls) == 2


def test_kept_taps_follow_the_model(filter_launches):
    model = small_with_kernels().eval()
    x = torch.randint(5, 100, (1, 6), device=KERNEL_DEVICE)
    with torch.no_grad():
        before = model(x).last_hidden_state
        assert torch.equal(model(x).last_hidden_state, before)
        assert len(filter_launches) == 1
        model.layers[1].mixer.residual_conv.filter.fwd.out.weight.data += 1
        after = model(x).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(x).last_hidden_state, after)
    assert max_error(before, after) > 1e-3
    assert len(filter_launches) == 3  # one for the new values, one for the copy
    model.train()
    assert not model._keeper.kept
    with torch.no_grad():
        model(x)  # in training nothing is kept
        assert not model._keeper.kept
        model.eval()(x)
    assert model._keeper.kept
    model.to(torch.float16)
    assert not model._keeper.kept
