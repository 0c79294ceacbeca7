"""Weights tell which head a model has, and a head that is not whole goes no further."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import m2_plugin.models
from m2_plugin.checkpoints.config import model_class_of
from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.folder import load_folder
from m2_plugin.checkpoints.names import to_reference
from m2_plugin.cli import main
from m2_plugin.models import (
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTokenClassification,
)
from tests.models.test_modeling_m2_bert import small

MODELS = [getattr(m2_plugin.models, n) for n in m2_plugin.models.__all__ if n != "M2BertConfig"]
NEW = [M2BertForMultipleChoice, M2BertForQuestionAnswering, M2BertForTokenClassification]


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_the_weights_tell_the_model(cls, tmp_path):
    """Also without a config that names it: bare weights become the folder that they are from."""
    model = cls(small(num_labels=3, initializer_range=0.5))
    assert model_class_of(model.state_dict(), model.config) is cls
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    report = import_checkpoint(tmp_path / "weights.pt", tmp_path / "m2")
    assert report.found.model_class is cls
    assert AutoConfig.from_pretrained(tmp_path / "m2").architectures == [cls.__name__]
    loaded, info = cls.from_pretrained(tmp_path / "m2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("cls", NEW, ids=lambda cls: cls.__name__)
def test_the_reference_has_no_such_heads(cls, tmp_path, capsys):
    cls(small()).save_pretrained(tmp_path / "m2")
    assert main(["export", str(tmp_path / "m2"), "--out", str(tmp_path / "back.pt")]) == 1
    assert "reference" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("names", ["own", "reference"])
def test_a_classifier_without_its_pooler_is_none_of_tokens(names, tmp_path):
    """Whether names or config tell so, it is one of texts that is not whole."""
    M2BertForSequenceClassification(small(num_labels=3)).save_pretrained(tmp_path / "m2")
    weights = load_file(tmp_path / "m2" / "model.safetensors")
    weights = {name: t for name, t in weights.items() if not name.startswith("pooler.")}
    if names == "reference":
        torch.save(to_reference(weights), tmp_path / "m2.pt")
        with pytest.raises(ValueError, match=r"lacks bert\.pooler\.dense\.weight"):
            import_checkpoint(tmp_path / "m2.pt", tmp_path / "out")
        return
    save_file(weights, tmp_path / "m2" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks pooler\.dense\.weight"):
        import_checkpoint(tmp_path / "m2", tmp_path / "out")
    with pytest.raises(ValueError, match=r"not complete: its weights lack pooler\.dense\.weight"):
        load_folder(tmp_path / "m2")
    # A config that names no head leaves it to the weights.
    config = json.loads((tmp_path / "m2" / "config.json").read_text()) | {"architectures": None}
    (tmp_path / "m2" / "config.json").write_text(json.dumps(config))
    found = import_checkpoint(tmp_path / "m2", tmp_path / "out").found
    assert found.model_class is M2BertForTokenClassification
