import inspect
import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.models import M2BertConfig, M2BertForMaskedLM
from m2_plugin.models.configuration_m2_bert import KINDS
from tests.models.test_modeling_m2_bert import small
from tests.utils import max_error


def test_defaults_are_the_published_80m():
    config = M2BertConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        768,
        3072,
        12,
    )
    assert config.vocab_size == 30528  # 30,522 WordPiece tokens, rounded up to a multiple of 8


def test_every_field_is_documented():
    fields = set(inspect.signature(M2BertConfig.__init__).parameters) - {"self", "kwargs"}
    arguments = M2BertConfig.__doc__.split("Args:")[1].split("**kwargs")[0]
    documented = set(re.findall(r"^ {8}(\w+): ", arguments, re.MULTILINE))
    assert fields == documented


def test_round_trip(tmp_path):
    config = M2BertConfig(vocab_size=1001, hyena_w=14, num_labels=3, classifier_pooling="mean")
    config.save_pretrained(tmp_path)
    again = M2BertConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.vocab_size, again.num_labels) == (1008, 3)


def test_a_saved_config_may_have_keys_of_other_tools(tmp_path, caplog):
    """It loads with one warning, and keeps them; values are checked, and a YAML is strict still."""
    written = {"tool.settings": {"dtype": "q8"}, "some_use_cache": False, "bos_token_id": None}
    M2BertConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | written))
    for _ in range(2):
        config = AutoConfig.from_pretrained(tmp_path)
    assert written.items() <= config.to_dict().items()
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("m2_plugin")]
    assert warning.endswith("keys of a saved config: tool.settings, some_use_cache")
    assert AutoConfig.from_pretrained(tmp_path, some_use_cache=True).some_use_cache is True
    with pytest.raises(ValueError, match="no key 'some_use_cache'"):
        M2BertConfig(some_use_cache=False)
    with pytest.raises(ValueError, match="hyena_emb_dim must be odd"):
        M2BertConfig.from_dict(saved | {"hyena_emb_dim": 4})
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, not 'many'"):
        M2BertConfig.from_dict(saved | {"vocab_size": "many"})


# Key → value, and who writes it beside the fields of the config.
WRITTEN_BY_OTHERS = {
    "bos_token_id": 101,  # transformers 5's Trainer
    "eos_token_id": 102,
    "sep_token_id": 102,
    "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"},  # its CrossEncoder
    "adapters": {"adapters": {}, "config_map": {}},
    "transformers.js_config": {"dtype": "q8"},
    "unsloth_version": "2025.1",
    "gradient_checkpointing": False,  # older transformers, this one and those that follow
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "finetuning_task": "mnli",
    "use_cache": True,
    "is_decoder": False,
    "output_attentions": True,
}


@pytest.mark.parametrize("key", WRITTEN_BY_OTHERS)
def test_what_clients_write_is_loaded_and_kept(key, tmp_path):
    """By transformers and by our commands; also from a file to the next."""
    model = M2BertForMaskedLM(small()).eval()
    model.save_pretrained(tmp_path / "0")
    path = tmp_path / "0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: WRITTEN_BY_OTHERS[key]}))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "0").eval()
    again.save_pretrained(tmp_path / "1")
    config, weights = load_folder(tmp_path / "1")
    assert getattr(again.config, key) == getattr(config, key) == WRITTEN_BY_OTHERS[key]
    ids = torch.randint(5, 90, (2, 20))
    with torch.no_grad():
        built = build_model(M2BertForMaskedLM, config, weights)
        for other in (again, built):
            assert max_error(other(ids).logits, model(ids).logits) < 1e-6


def test_the_description_of_a_quantised_model_is_for_transformers(caplog):
    """It reads this key from the config; so the key is none that is without effect."""
    described = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    saved = M2BertConfig().to_dict() | {"quantization_config": described}
    assert M2BertConfig.from_dict(saved).quantization_config == described
    assert not caplog.records


@pytest.mark.parametrize("size", [107, 104, 93])
def test_a_resized_vocabulary_is_saved_and_loaded(size, tmp_path):
    """A size in a file is that of the weights; only a new model's size is rounded up."""
    model = M2BertForMaskedLM(small()).eval()
    assert model.config.vocab_size == 104
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == size
    ids = torch.randint(5, 90, (2, 20))
    with torch.no_grad():
        assert max_error(again(ids).logits, model(ids).logits) < 1e-6
    assert AutoConfig.from_pretrained(tmp_path, vocab_size=50).vocab_size == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 64}, "no key 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"long_conv_max": 64}, "no key 'long_conv_max'. Did you mean 'long_conv_l_max'?"),
        ({"xyzzy": 1}, "no key 'xyzzy'.$"),
        ({"hyena_emb_dim": 4}, "hyena_emb_dim must be odd and at least 3.*, not 4"),
        ({"hyena_emb_dim": 1}, "hyena_emb_dim must be odd and at least 3.*, not 1"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, not 0"),
        ({"long_conv_l_max": -1}, "long_conv_l_max must be a positive integer, not -1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a positive integer, not 2.5"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be a positive integer"),
        ({"vocab_size": "30522"}, "vocab_size must be a positive integer, not '30522'"),
        ({"pad_token_id": None}, "pad_token_id must be an integer, not None"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob must be a number, not '0.1'"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a number, not None"),
        ({"hyena_w_mod": float("nan")}, "hyena_w_mod must be a number, not nan"),
        ({"classifier_dropout": "no"}, "classifier_dropout must be a number or null, not 'no'"),
        ({"bidirectional": 1}, "bidirectional must be true or false, not 1"),
        ({"hyena_extended_from": [12.5]}, "hyena_extended_from must be integers, or null, not"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be .* below 1, not 1.0"),
        ({"sequence_mixer": "attention"}, "sequence_mixer must be one of monarch_mixer, .*"),
        ({"classifier_pooling": "max"}, "classifier_pooling must be one of cls, mean, not 'max'"),
        ({"monarch_mlp_nblocks": 1000}, "monarch_mlp_nblocks must be at most .* = 768, not 1000"),
        ({"pad_token_id": 40000}, "pad_token_id must be a token id below vocab_size = 30528"),
        (
            {"sequence_mixer": "alibi_attention", "hidden_size": 100},
            "num_attention_heads must be a divisor of hidden_size = 100, not 12",
        ),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        M2BertConfig(**fields)


def test_every_kind_of_field_is_checked():
    annotations = {
        p.annotation for p in inspect.signature(M2BertConfig.__init__).parameters.values()
    }
    unchecked = annotations - set(KINDS)
    assert unchecked == {inspect.Parameter.empty, str, Any}  # self, names of choices, kwargs
