import subprocess
import sys

import catalogue
import pytest
import torch
from llmfoundry import registry

NAMES = {
    "models": [
        "m2_bert_mlm",
        "m2_bert_classification",
        "m2_bert_contrastive",
        "hf_bert_mlm",
        "hf_bert_classification",
        "m2_bert_token_classification",
        "m2_bert_question_answering",
        "hf_bert_token_classification",
        "hf_bert_question_answering",
    ],
    "dataloaders": [
        *("mlm_text", "glue", "text_classification"),
        *("token_classification", "question_answering"),
    ],
    "callbacks": ["seed_each_batch", "loss_curve", "eval_results", "mlm_probability_schedule"],
    "callbacks_with_config": ["run_guard", "run_summary", "model_card"],
    "loggers": ["tensorboard_file"],
    "optimizers": ["fused_decoupled_adamw"],
    "schedulers": ["warmup_stable_decay"],
    "ffns": ["monarch_mlp", "monarch_glu"],
    "attention_classes": ["monarch_mixer"],
    "module_init_fns": ["monarch"],
    "tokenizers": ["m2_plugin"],
    "config_transforms": ["m2_plugin"],
}
OTHERS = {  # registered as they are
    "optimizers": ["torch_adamw"],
    "fcs": ["block_diagonal", "monarch"],
}


@pytest.mark.parametrize("group", list(NAMES))
def test_llm_foundry_finds_our_names(group):
    for name in NAMES[group]:
        assert name in getattr(registry, group)
        assert getattr(registry, group).get(name).__module__.startswith("m2_plugin.foundry")


def test_llm_foundry_finds_torchs_adamw():
    assert registry.optimizers.get("torch_adamw") is torch.optim.AdamW


def test_llm_foundry_finds_our_fully_connected_layers():
    for name in OTHERS["fcs"]:
        layer = registry.fcs.get(name)
        assert layer.__module__.startswith("m2_plugin.layers")
        assert isinstance(layer, type)  # llm-foundry's initialisation checks for instances of each


def test_no_name_is_one_of_llm_foundrys():
    """An entry point of the same name would override llm-foundry's in every run of every user."""
    for group, names in [*NAMES.items(), *OTHERS.items()]:
        namespace = tuple(getattr(registry, group).namespace)
        registered = {key[-1] for key in catalogue.REGISTRY if key[:-1] == namespace}
        assert registered
        assert not registered & set(names)


def test_llm_foundrys_command_line_lists_our_models():
    out = subprocess.run(
        [sys.executable, "-m", "llmfoundry.cli.cli", "registry", "get", "--group", "models"],
        capture_output=True, text=True, timeout=240, check=True, env={"COLUMNS": "200"},
    ).stdout  # fmt: skip
    for name in NAMES["models"]:
        assert name in out
