"""Adapters of PEFT: every task trains, and a merged model computes what the adapters did."""

import inspect

import pytest
import torch

from m2_plugin.models import (
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertForTokenClassification,
    M2BertModel,
)
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import max_error

peft = pytest.importorskip("peft")

PROJECTIONS = ["in_proj", "out_proj"]
MONARCH_MLP = ["mlp.up_proj.weight", "mlp.down_proj.weight"]
# Task → the model, and the labels of a batch of two.
TASKS = {
    "SEQ_CLS": (M2BertForSequenceClassification, {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": (M2BertForTokenClassification, {"labels": torch.arange(40).view(2, 20) % 2}),
    "QUESTION_ANS": (
        M2BertForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
}


def inputs():
    x = ids()
    return {
        "input_ids": x,
        "attention_mask": torch.ones_like(x),
        "token_type_ids": torch.zeros_like(x),
    }


def train(model, batch, steps=3):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None, name
        optimizer.step()
    return model.eval()


def adapted(model):
    """The modules that have an adapter, by name."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }


@pytest.mark.parametrize("task", TASKS)
def test_lora_trains_merges_saves_and_loads(task, tmp_path):
    cls, labels = TASKS[task]
    base, batch = cls(small(num_labels=2)), inputs()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type=task, target_modules=PROJECTIONS)
    model = train(peft.get_peft_model(base, config), batch | labels)
    key = "start_logits" if task == "QUESTION_ANS" else "logits"
    with torch.no_grad():
        expected = model(**batch)[key]
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(
            cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert max_error(loaded.eval()(**batch)[key], expected) < 1e-6
        with model.disable_adapter():
            assert max_error(model(**batch)[key], expected) > 1e-4
        merged = model.merge_and_unload()
        assert type(merged) is cls
        assert max_error(merged(**batch)[key], expected) < 1e-5


@pytest.mark.parametrize("cls", [M2BertModel, M2BertForTextEmbedding], ids=lambda c: c.__name__)
def test_feature_extraction(cls):
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules="all-linear")
    model = peft.get_peft_model(cls(small()), config)
    assert model(**inputs()).last_hidden_state.shape == (2, 20, 16)


@pytest.mark.parametrize("kind", ["ia3", "prompt tuning", "p-tuning"])
def test_other_methods_train(kind):
    config = {
        "ia3": lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=PROJECTIONS, feedforward_modules=["out_proj"]
        ),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8
        ),
    }[kind]()
    cls, labels = TASKS["SEQ_CLS"]
    model = peft.get_peft_model(cls(small(num_labels=2)), config)
    train(model, inputs() | labels)


@pytest.mark.parametrize("monarch", [True, False])
def test_all_linear_reaches_projections_and_pooler(monarch):
    """And a dense MLP; not a Monarch MLP, and no filter."""
    base = M2BertForSequenceClassification(small(use_monarch_mlp=monarch))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    names = [f"mixer.{name}" for name in PROJECTIONS]
    names += [] if monarch else ["mlp.up_proj", "mlp.down_proj"]
    layers = {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}
    assert adapted(peft.get_peft_model(base, config)) == layers | {"pooler.dense"}


def test_a_new_pooler_is_trained_whole(tmp_path):
    """It is saved with the adapter, as PEFT does with the classifier."""
    cls, labels = TASKS["SEQ_CLS"]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["pooler"]
    )
    base, batch = cls(small(num_labels=2)), inputs()
    base.save_pretrained(tmp_path / "base")
    model = train(peft.get_peft_model(base, config), batch | labels)
    assert not any("pooler" in name for name in adapted(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert max_error(loaded.eval()(**batch).logits, model(**batch).logits) < 1e-6
    pooler = model.base_model.model.pooler
    trained, first = pooler.modules_to_save["default"].dense, pooler.original_module.dense
    assert max_error(trained.weight, first.weight) > 1e-4


@pytest.mark.parametrize("glu", [True, False])
def test_target_parameters_reach_the_monarch_mlp(glu):
    """Beside the projections; each block of the matrices has its own adapter."""
    if "target_parameters" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip("this version of PEFT has no target_parameters")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=PROJECTIONS, target_parameters=MONARCH_MLP
    )
    cls, labels = TASKS["SEQ_CLS"]
    base, batch = cls(small(num_labels=2, use_glu_mlp=glu)).eval(), inputs()
    with torch.no_grad():
        before = base(**batch).logits
    model = peft.get_peft_model(base, config).eval()
    layers = {f"model.layers.{i}." for i in (0, 1)}
    names = [f"mixer.{name}" for name in PROJECTIONS] + ["mlp.up_proj", "mlp.down_proj"]
    assert adapted(model) == {layer + name for layer in layers for name in names}
    with torch.no_grad():
        assert max_error(model(**batch).logits, before) < 1e-6  # adapters begin at zero
    model = train(model, batch | labels)
    with torch.no_grad():
        expected = model(**batch).logits
        assert max_error(model.merge_and_unload()(**batch).logits, expected) < 1e-5
    assert max_error(expected, before) > 1e-4
