"""What clients pass to every model."""

import inspect

import pytest
import torch

import m2_plugin.models
from tests.models.test_modeling_m2_bert import ids, small

MODELS = [getattr(m2_plugin.models, n) for n in m2_plugin.models.__all__ if n != "M2BertConfig"]


def inputs_for(cls):
    return ids()


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_output_attentions_is_accepted(cls):
    """PEFT and others pass it to every model; there are none to return."""
    model, x = cls(small()).eval(), inputs_for(cls)
    expected = model(x)
    for value in (False, True, None):
        output = model(x, output_attentions=value)
        assert output.attentions is None and set(output) == set(expected)
        for key in expected:
            assert torch.equal(output[key], expected[key])
    parameters = inspect.signature(model.forward).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)  # clients read the names
