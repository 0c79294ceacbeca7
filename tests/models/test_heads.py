"""Heads for tokens, answers and choices, and what clients pass to every model."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import m2_plugin.models
from m2_plugin.models import (
    M2BertForMaskedLM,
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForTokenClassification,
)
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import TOKENIZER, max_error

MODELS = [getattr(m2_plugin.models, n) for n in m2_plugin.models.__all__ if n != "M2BertConfig"]
HEADS = {
    M2BertForTokenClassification: AutoModelForTokenClassification,
    M2BertForQuestionAnswering: AutoModelForQuestionAnswering,
    M2BertForMultipleChoice: AutoModelForMultipleChoice,
}


def inputs_for(cls):
    return ids().unflatten(0, (1, 2)) if cls is M2BertForMultipleChoice else ids()


GOOD = torch.full((2, 6), 7)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": GOOD[:0]}, r"input_ids \(0, 6\) hold no token"),
        ({"input_ids": GOOD[:, :0]}, r"input_ids \(2, 0\) hold no token"),
        ({"input_ids": GOOD[0]}, r"input_ids must be \(batch, length\), not \(6,\)"),
        ({"input_ids": GOOD + 97}, r"from 0 to 103 \(vocab_size is 104\), but hold 104"),
        ({"input_ids": GOOD - 8}, r"input_ids must be from 0 to 103 .*, but hold -1"),
        ({"input_ids": GOOD, "attention_mask": GOOD[:, 1:]}, r"_mask \(2, 5\) must be \(2, 6\)"),
        ({"input_ids": GOOD, "attention_mask": GOOD[:1]}, r"_mask \(1, 6\) must be \(2, 6\)"),
        ({"input_ids": GOOD, "token_type_ids": GOOD}, r"token_type_ids must be .*, but hold 7"),
        ({"input_ids": GOOD, "position_ids": GOOD + 17}, r"position_ids .* 23 .*, but hold 24"),
        ({"input_ids": GOOD, "position_ids": GOOD[0]}, r"position_ids \(6,\) must be \(2, 6\)"),
        ({"inputs_embeds": torch.zeros(0, 6, 16)}, r"inputs_embeds \(0, 6, 16\) hold no token"),
        ({"inputs_embeds": torch.zeros(2, 6)}, r"inputs_embeds must be .*, not \(2, 6\)"),
    ],
)
def test_inputs_that_cannot_be_encoded_are_named(inputs, message):
    for cls in MODELS:
        if cls is not M2BertForMultipleChoice:
            with pytest.raises(ValueError, match=message):
                cls(small())(**inputs)
        elif (
            min(tensor.ndim for tensor in inputs.values()) > 1 and "must be .*, not" not in message
        ):
            with pytest.raises(ValueError, match=message):
                cls(small())(**{name: tensor[:, None] for name, tensor in inputs.items()})


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


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_a_head_is_saved_and_loaded_and_may_be_new(cls, tmp_path):
    model, x = cls(small(num_labels=5)).eval(), inputs_for(cls)
    model.save_pretrained(tmp_path / "head")
    loaded, info = HEADS[cls].from_pretrained(tmp_path / "head", output_loading_info=True)
    assert type(loaded) is cls and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    for key, value in model(x).items():
        assert max_error(loaded.eval()(x)[key], value) < 1e-6
    assert isinstance(model(x, return_dict=False), tuple)

    body = M2BertForMaskedLM(small())
    body.save_pretrained(tmp_path / "body")
    started, info = HEADS[cls].from_pretrained(tmp_path / "body", output_loading_info=True)
    assert all(not name.startswith("model.") for name in info["missing_keys"])
    words = body.get_input_embeddings().weight
    assert torch.equal(started.get_input_embeddings().weight, words)


def test_tokens_are_classified():
    model = M2BertForTokenClassification(small(num_labels=5)).eval()
    x = ids()
    labels = torch.randint(0, 5, x.shape)
    labels[:, 12:] = -100
    output = model(x, labels=labels, output_hidden_states=True)
    hidden = output.hidden_states[-1]
    assert output.logits.shape == (2, 20, 5)
    assert max_error(output.logits, model.classifier(hidden)) < 1e-6
    exact = F.cross_entropy(output.logits[:, :12].flatten(0, 1), labels[:, :12].flatten())
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    nothing = model(x, labels=torch.full_like(x, -100)).loss
    nothing.backward()
    assert nothing.item() == 0


def test_answers_are_found():
    model = M2BertForQuestionAnswering(small()).eval()
    x, start, end = ids(), torch.tensor([3, 5]), torch.tensor([[4], [19]])
    output = model(x, start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (2, 20)
    exact = F.cross_entropy(output.start_logits, start)
    exact = (exact + F.cross_entropy(output.end_logits, end[:, 0])) / 2
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    # An answer that was cut off has no loss, wherever its position was set.
    for outside in (20, 400, -100):
        cut = model(x, start_positions=torch.tensor([3, outside]), end_positions=end).loss
        first = F.cross_entropy(output.start_logits[:1], start[:1])
        exact = (first + F.cross_entropy(output.end_logits, end[:, 0])) / 2
        assert cut.item() == pytest.approx(exact.item(), rel=1e-6)
    none = torch.tensor([20, 20])
    assert model(x, start_positions=none, end_positions=none).loss.item() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_choices_are_scored_one_by_one(pooling):
    model = M2BertForMultipleChoice(small(classifier_pooling=pooling, mask_padding=True)).eval()
    x = ids(batch=6).unflatten(0, (2, 3))
    mask = torch.ones_like(x)
    mask[1, 2, 9:] = 0
    types = (torch.arange(20) > 7).long().expand_as(x)
    labels = torch.tensor([2, 0])
    output = model(x, attention_mask=mask, token_type_ids=types, labels=labels)
    assert output.logits.shape == (2, 3)
    for row in range(2):
        for choice in range(3):
            one = {"attention_mask": mask, "token_type_ids": types}
            one = {key: value[row, choice][None] for key, value in one.items()}
            hidden = model.model(x[row, choice][None], **one).last_hidden_state
            pooled = model.pooler(hidden, one["attention_mask"])
            score = model.choice_scorer(pooled)[0, 0]
            assert max_error(output.logits[row, choice], score) < 1e-6
    exact = F.cross_entropy(output.logits, labels)
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    embeds = model.get_input_embeddings()(x)
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types).logits
    assert max_error(by_embeds, output.logits) < 1e-6
    with pytest.raises(ValueError, match=r"\(batch, choices, length\).*not \(3, 20\)"):
        model(x[0])


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_a_few_steps_fit_a_batch(cls):
    torch.manual_seed(1)
    model, x = cls(small(hidden_dropout_prob=0.0, num_labels=3)).train(), inputs_for(cls)
    labels = {
        M2BertForTokenClassification: {"labels": x % 3},
        M2BertForQuestionAnswering: {
            "start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([9, 8]),
        },
        M2BertForMultipleChoice: {"labels": torch.tensor([1])},
    }[cls]  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(x, **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6 and losses[-1] < 0.1


def test_token_classification_pipeline(tmp_path):
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    fields = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    model = M2BertForTokenClassification(
        small(vocab_size=30522, initializer_range=0.5, **fields)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(tmp_path)
    text = "Ann met Bob in London."
    tag = pipeline("token-classification", model=str(tmp_path), ignore_labels=[])
    found = tag(text)
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        classes = model(**batch).logits[0].argmax(-1).tolist()
    words = batch.tokens()
    assert [(f["word"], f["entity"]) for f in found] == [
        (word, labels[c]) for word, c in zip(words[1:-1], classes[1:-1], strict=True)
    ]


def test_question_answering_pipeline(tmp_path):
    try:
        from transformers import QuestionAnsweringPipeline
    except ImportError:
        pytest.skip("this version of transformers has no such pipeline")
    model = M2BertForQuestionAnswering(small(vocab_size=30522, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=24).save_pretrained(tmp_path)
    answer = pipeline("question-answering", model=str(tmp_path))
    assert isinstance(answer, QuestionAnsweringPipeline)
    context = "Ann met Bob in London, and they went to see a play there."
    found = answer(question="Who met Bob?", context=context, doc_stride=4)
    assert found["answer"] and context[found["start"] : found["end"]] == found["answer"]


def test_all_linear_layers_are_the_projections_and_heads():
    """What adapters and quantisation reach when they are told to take every linear layer."""
    model = M2BertForMaskedLM(small())
    linear = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {f"model.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")}
    assert linear == layers | {"head.dense", "decoder"}
