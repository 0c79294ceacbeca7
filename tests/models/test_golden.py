"""Parity with the reference, stage by stage: 1e-5 of the norm in fp32, for every golden tensor."""

import pytest
import torch

from m2_plugin.checkpoints.names import from_reference
from m2_plugin.models import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
)
from tests.utils import GOLDEN, load_golden, relative_error, with_prefix

NAMES = sorted(p.stem for p in GOLDEN.glob("*.safetensors") if p.stem != "units")
MONARCH = [name for name in NAMES if name != "alibi_attention_baseline"]
# What the reference's configuration holds beside fields of ours: its optimizer settings, the size
# of a cache, and switches of its retrieval experiments, all of them off.
NOT_IN_OURS = {
    "monarch_mixer_sequence_mixing",
    "long_conv_kernel_learning_rate",
    "hyena_lr_pos_emb",
    "hyena_wd",
    "alibi_starting_size",
    "use_cls_token",
    "sequence_token_planting",
    "expand_positional_embeddings",
    "gather_sentence_embeddings",
    "use_normalized_embeddings",
    "performing_BEIR_evaluation",
}


def golden_config(meta: dict, **kwargs) -> M2BertConfig:
    reference = meta["config"]
    fields = {k: v for k, v in reference.items() if k not in NOT_IN_OURS}
    monarch = reference["monarch_mixer_sequence_mixing"]
    mixer = "monarch_mixer" if monarch else "alibi_attention"
    return M2BertConfig(**fields, sequence_mixer=mixer, **kwargs)


def golden_model(name: str):
    meta, tensors = load_golden(name)
    model = M2BertForMaskedLM(golden_config(meta)).eval()
    model.load_state_dict(from_reference(with_prefix(tensors, "sd/")), strict=True)
    inputs = with_prefix(tensors, "in/")
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    return model, batch, inputs, with_prefix(tensors, "out/"), meta


def assert_parity(name, actual, expected):
    error = relative_error(actual, expected)
    assert error < 1e-5, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("name", MONARCH)
def test_every_stage(name):
    model, batch, _, golden, _ = golden_model(name)
    compared = set()

    def check(stage, actual):
        if stage in golden:  # h64_L128_nblocks2 stores a part of its second layer only
            assert_parity(stage, actual, golden[stage])
            compared.add(stage)

    with torch.no_grad():
        u = model.model.embeddings(batch["input_ids"], batch["token_type_ids"], None, None)
        check("emb", u)
        for i, layer in enumerate(model.model.layers):
            u = golden["emb"] if i == 0 else golden[f"l{i - 1}.mlp"]
            mixer, of = layer.mixer, f"l{i}."
            normed = mixer.norm(u)
            projected = mixer.project(normed)
            check(of + "in_linear", projected)
            check(of + "in_linear", mixer.in_proj(normed))
            short = mixer.short_conv(projected)
            check(of + "short_filter", short.transpose(1, 2))
            x1, _, v = short.chunk(3, dim=-1)
            convs = {"longconv": (mixer.long_conv, "k", v * x1)}
            if mixer.residual_conv is not None:
                convs["longconv_residual"] = (mixer.residual_conv, "k2", normed)
            for stage, (conv, k, w) in convs.items():
                k_fwd, k_rev = conv.filter(u.shape[1])
                check(f"{of}{k}_fwd", k_fwd.T)
                if k_rev is not None:
                    check(f"{of}{k}_rev", k_rev.T)
                check(of + stage, conv(w).transpose(1, 2))
            check(of + "mixer", mixer(u))
            check(of + "mlp", layer.mlp(golden[of + "mixer"]))
    assert compared == {k for k in golden if k[0] == "l" or k == "emb"}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_loss_and_gradients(name):
    model, batch, inputs, golden, _ = golden_model(name)
    output = model(**batch, output_hidden_states=True)
    assert_parity("logits", output.logits, golden["mlm_logits"])
    assert_parity("emb", output.hidden_states[0], golden["emb"])
    assert_parity("hidden", model.model(**batch).last_hidden_state, golden["hidden"])

    output = model(**batch, labels=inputs["labels"], masked_logits_only=True)
    assert_parity("loss", output.loss, golden["mlm_loss"].squeeze())
    full = model(**batch, labels=inputs["labels"])
    assert_parity("loss with all logits", full.loss, golden["mlm_loss"].squeeze())
    assert_parity("all logits", full.logits, golden["mlm_logits"])
    assert_parity("masked", output.logits, full.logits[inputs["labels"] != -100])

    output.loss.backward()
    parameters = dict(model.named_parameters())
    checked = 0
    for key, grad in from_reference(with_prefix(load_golden(name)[1], "grad/")).items():
        if key == "decoder.weight":  # the same tensor as the word embeddings
            continue
        assert_parity(key, parameters[key].grad, grad)
        checked += 1
    assert checked == len(parameters) or name == "h64_L128_nblocks2"  # that one stores a subset


def test_attention_layers_of_the_baseline():
    model, batch, _, golden, _ = golden_model("alibi_attention_baseline")
    tokens = batch["attention_mask"].bool()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    x = golden["emb"]
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            mixed = layer.mixer(x, mask)
            assert_parity(f"l{i}.mixer", mixed[tokens], golden[f"l{i}.mixer"])
            x = layer.mlp(mixed)
            assert_parity(f"l{i}.mlp", x[tokens], golden[f"l{i}.mlp"])


@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier(pooling, num_labels):
    found = 0
    for name in NAMES:
        meta, tensors = load_golden(name)
        head = with_prefix(tensors, f"sdc/nl{num_labels}/")
        if not head:
            continue
        found += 1
        config = golden_config(meta, classifier_pooling=pooling, num_labels=num_labels)
        model = M2BertForSequenceClassification(config).eval()
        body = {k: v for k, v in with_prefix(tensors, "sd/").items() if k.startswith("bert.")}
        model.load_state_dict(from_reference(body | head), strict=True)
        t = with_prefix(tensors, "in/")
        labels = t[f"cls_labels_nl{num_labels}"]
        batch = {k: t[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        of = f"{'first' if pooling == 'cls' else 'all'}_nl{num_labels}"
        output = model(**batch, labels=labels)
        assert_parity(f"{name} logits", output.logits, tensors[f"out/cls_logits_{of}"])
        assert_parity(f"{name} loss", output.loss, tensors[f"out/cls_loss_{of}"].squeeze())
        hidden = model.model(**batch).last_hidden_state
        pooled = model.pooler(hidden, batch["attention_mask"])
        assert_parity(f"{name} pooled", pooled, tensors[f"out/pooled_{of}"])
    assert found
