"""Models where they are served: ONNX Runtime, torch.compile, bf16 and int8 on a CPU."""

import sys

import numpy as np
import pytest
import torch

from m2_plugin.checkpoints import onnx as onnx_export
from m2_plugin.cli import main
from m2_plugin.models import (
    M2BertForMaskedLM,
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertForTokenClassification,
    M2BertModel,
)
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import max_error

# Each model, the kinds of layer that lead to other graphs, and the outputs of the file.
MODELS = {
    "masked_lm": (M2BertForMaskedLM, {"mask_padding": True}, ["logits"]),
    "as_published": (M2BertForMaskedLM, {"hyena_training_additions": True}, ["logits"]),
    "causal_dense": (
        M2BertForMaskedLM,
        {
            "bidirectional": False,
            "residual_long_conv": False,
            "use_monarch_mlp": False,
            "use_positional_encodings": False,
        },
        ["logits"],
    ),
    "extended": (M2BertForMaskedLM, {"hyena_extended_from": [12]}, ["logits"]),
    "classification": (
        M2BertForSequenceClassification,
        {"num_labels": 3, "monarch_mlp_nblocks": 3, "backend": "triton"},
        ["logits"],
    ),
    "embedding": (
        M2BertForTextEmbedding,
        {"mask_padding": True, "classifier_pooling": "mean", "normalize_embeddings": True},
        ["last_hidden_state", "pooler_output", "sentence_embedding"],
    ),
    "tokens": (M2BertForTokenClassification, {"num_labels": 7}, ["logits"]),
    "answers": (
        M2BertForQuestionAnswering,
        {"mask_padding": True},
        ["start_logits", "end_logits"],
    ),
    "choices": (
        M2BertForMultipleChoice,
        {"mask_padding": True, "classifier_pooling": "mean"},
        ["logits"],
    ),
}


def batch(size, length):
    """Inputs of which all but the first text are padded."""
    tokens = torch.linspace(length, max(length // 2, 1), size).long()
    attention_mask = (torch.arange(length) < tokens[:, None]).long()
    input_ids = ids(size, length) * attention_mask
    types = (torch.arange(length) > length // 3).long().expand(size, -1) * attention_mask
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}


def batch_for(cls, size, length):
    """`batch`, or for multiple choice one of 2 or of `size` choices."""
    if cls is not M2BertForMultipleChoice:
        return batch(size, length)
    choices = (size, 2) if size > 1 else (2, size)
    inputs = batch(2 * size, length)
    return {key: value.unflatten(0, choices) for key, value in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_computes_the_same(name, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    cls, fields, outputs = MODELS[name]
    model = cls(small(**fields)).eval()
    model.save_pretrained(tmp_path / "folder")
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    path = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "folder"), "--onnx", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == str(path)
    assert set(outputs) <= set(said[0].removeprefix("outputs: ").split(", "))
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "model.onnx"}

    onnx = pytest.importorskip("onnx")
    assert "Dropout" not in {node.op_type for node in onnx.load(path).graph.node}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(onnx_export.INPUTS)
    choices = cls is M2BertForMultipleChoice
    axes = ["batch", "choices", "sequence"] if choices else ["batch", "sequence"]
    assert [entry.shape for entry in session.get_inputs()] == [axes] * 3
    for size, length in ((1, 1), (2, 7), (1, 8), (5, 13), (3, 24)):
        inputs = batch_for(cls, size, length)
        found = session.run(outputs, {key: value.numpy() for key, value in inputs.items()})
        with torch.no_grad():
            exact = model(**inputs)
        for output, values in zip(outputs, found, strict=True):
            assert max_error(torch.from_numpy(values), exact[output]) < 1e-4, (size, length)

    errors = runtime.capi.onnxruntime_pybind11_state
    refused = (errors.RuntimeException, errors.InvalidArgument, errors.Fail)
    with pytest.raises(refused, match="while running (Add|Conv|Gather) node"):
        session.run(outputs, {key: value.numpy() for key, value in batch_for(cls, 2, 25).items()})


def test_what_is_not_exported(tmp_path, capsys, monkeypatch):
    def refused(model):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        assert main(["export", str(folder), "--onnx", str(tmp_path / "model.onnx")]) == 1
        assert not list(tmp_path.glob("*model.onnx*"))
        return capsys.readouterr().err

    alibi = M2BertForMaskedLM(small(sequence_mixer="alibi_attention", num_attention_heads=4))
    assert "'alibi_attention'" in refused(alibi)
    assert "['M2BertModel']" in refused(M2BertModel(small()))
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    assert "long_conv_l_max = 24" in refused(M2BertForMaskedLM(small()))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in refused(M2BertForMaskedLM(small()))


def labels(cls, inputs):
    """What each head's loss takes; no two texts have as many labelled tokens."""
    if cls is M2BertForMaskedLM:
        chosen = inputs["attention_mask"].bool() & (torch.arange(inputs["input_ids"].shape[1]) > 3)
        return {"labels": inputs["input_ids"].masked_fill(~chosen, -100)}
    return {"labels": torch.tensor([0, 2])} if cls is M2BertForSequenceClassification else {}


@pytest.mark.parametrize(
    ("name", "training"),
    [("masked_lm", False), ("masked_lm", True), ("classification", True), ("embedding", True)],
)
def test_one_graph(name, training):
    """torch.compile with fullgraph=True raises at a graph break, and here computes alike."""
    cls, fields, (*_, output) = MODELS[name]
    fields = fields | {"hidden_dropout_prob": 0.0, "backend": "auto", "num_hidden_layers": 1}
    model = cls(small(**fields)).train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (20, 9, 24):  # the second length makes the graph dynamic
        inputs = batch(2, length)
        results = []
        for run in (model, compiled):
            with torch.set_grad_enabled(training):
                found = run(**inputs, **labels(cls, inputs))
            loss = found[output].square().mean() if name == "embedding" else found.loss
            weights = list(model.parameters()) if training else []
            grads = torch.autograd.grad(loss, weights) if training else ()
            results.append((found[output], loss, *grads))
        for found, exact in zip(*results, strict=True):
            assert max_error(found, exact) < 1e-5


def test_masked_logits_only_takes_two_graphs():
    """The encoder, and what is computed for a number of tokens that depends on the data."""
    model = M2BertForMaskedLM(small(hidden_dropout_prob=0.0))
    inputs = batch(2, 20)
    inputs |= labels(M2BertForMaskedLM, inputs)
    graphs = torch._dynamo.explain(model)(**inputs, masked_logits_only=True).graph_count
    assert graphs <= 2


def test_reduced_precision_stays_near():
    """What bench_serving.py times computes nearly the same, far nearer than an unrelated model."""
    model = M2BertForMaskedLM(small()).eval()
    inputs = batch(3, 24)
    with torch.inference_mode():
        exact = model(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(**inputs).logits
        dynamic = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
        int8 = dynamic(**inputs).logits
        bf16 = model.bfloat16()(**inputs).logits
    assert autocast.dtype == bf16.dtype == torch.bfloat16
    for found in (autocast, int8, bf16):
        error = np.sqrt((found.float() - exact).square().mean() / exact.square().mean())
        assert 0 < error < 0.1
