"""Graphs of a model for other runtimes: traces, and exports with any batch and length."""

import pytest
import torch
from torch.export import Dim, export

from m2_plugin.models import M2BertConfig, M2BertForSequenceClassification, M2BertForTextEmbedding

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "long_conv_l_max": 24,
    "hyena_filter_order": 8,
}


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 100, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_can_be_saved(tmp_path, grad):
    model = M2BertForSequenceClassification(M2BertConfig(**SIZES, return_dict=False)).eval()
    example, other = inputs(3, 20), inputs(2, 20)
    with torch.set_grad_enabled(grad):
        trace = torch.jit.trace(model, tuple(example.values()))
    torch.jit.save(trace, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert torch.allclose(loaded(*other.values())[0], model(**other)[0], atol=1e-6)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"mask_padding": True, "classifier_pooling": "mean"},
        {"sequence_mixer": "alibi_attention", "num_attention_heads": 4},
    ],
    ids=["mixer", "masked", "alibi"],
)
def test_an_export_takes_any_batch_and_length(sizes, strict):
    model = M2BertForTextEmbedding(M2BertConfig(**SIZES, **sizes)).eval()
    batch, length = Dim("batch"), Dim("length", max=24)
    for dynamic, shapes in (
        ({0: batch, 1: length}, [(1, 1), (2, 2), (5, 24)]),
        ({0: batch}, [(1, 20), (7, 20)]),
    ):
        with torch.no_grad():
            program = export(
                model,
                (),
                inputs(3, 20),
                dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
                strict=strict,
            ).module()
            for shape in shapes:
                given = inputs(*shape)
                expected = model(**given).sentence_embedding
                assert torch.allclose(program(**given).sentence_embedding, expected, atol=1e-6), (
                    shape
                )
