"""`m2-plugin predict` for words and for questions, on the files that the dataloaders read."""

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

from m2_plugin.cli import main
from m2_plugin.data.squad import answer_question, encode_question
from m2_plugin.data.token_labels import encode_words, entities, word_predictions
from m2_plugin.models import M2BertForQuestionAnswering, M2BertForTokenClassification
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER, write_rows

L = 24
NAMES = ["O", "B-PER", "I-PER", "B-LOC"]
WORDS = ["he", "Obergefreiter", "\u200b", "London", "…", "naïve"]
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: i for i, name in enumerate(NAMES)},
}


def save(path, model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=L).save_pretrained(path)
    return model.eval()


def run(tmp_path, file, out):
    arguments = [str(file), "--model", str(tmp_path / "model"), "--out", str(tmp_path / out)]
    return main(["predict", *arguments, "--batch-tokens", "200", "--num-workers", "1"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logits(model, ids, **more):
    with torch.inference_mode():
        found = model(torch.tensor([ids]), **{k: torch.tensor([v]) for k, v in more.items()})
    return {key: value[0].numpy() for key, value in found.items()}


@pytest.mark.parametrize("kind", ["m2_bert", "bert"])
def test_words(tmp_path, kind, monkeypatch):
    """Each word has a tag, in sentences of any length; CoNLL and rows give the same."""
    monkeypatch.setattr("m2_plugin.chunks.CHUNK_ROWS", 7)
    if kind == "m2_bert":
        fields = {"max_position_embeddings": L, "long_conv_l_max": L, "mask_padding": True}
        model = save(
            tmp_path / "model",
            M2BertForTokenClassification(small(vocab_size=30522, **fields, **LABELS)),
        )
    else:
        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=L, **LABELS,
        )  # fmt: skip
        model = save(tmp_path / "model", BertForTokenClassification(config))
    rng = random.Random(0)
    rows = [{"tokens": rng.choices(WORDS, k=rng.randrange(40)), "note": i} for i in range(20)]
    assert run(tmp_path, write_rows(tmp_path / "a.jsonl", [*rows, {"tokens": []}]), "o.jsonl") == 0
    found = lines(tmp_path / "o.jsonl")
    assert [{k: row[k] for k in given} for row, given in zip(found, rows, strict=False)] == rows
    assert found[-1] == {"tokens": [], "prediction": [], "probability": [], "entities": []}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in found[:-1]:
        windows = encode_words(tokenizer, row["tokens"], L)
        scores = [logits(model, w.input_ids)["logits"] for w in windows]
        ids, shares = word_predictions(windows, scores)
        assert row["prediction"] == [NAMES[i] for i in ids]
        assert len(ids) == len(row["tokens"])
        assert np.allclose(row["probability"], shares, atol=1e-4)
        for entity, (name, start, end) in zip(
            row["entities"], entities(row["prediction"]), strict=True
        ):
            text = " ".join(row["tokens"][start:end])
            share = entity.pop("probability")
            assert entity == {"type": name, "start": start, "end": end, "text": text}
            assert np.isclose(share, np.mean(row["probability"][start:end]), atol=1e-6)

    rows = [row for row in rows if row["tokens"]]
    for tags in ("", "\tO"):
        text = "\n".join("".join(f"{w}{tags}\n" for w in row["tokens"]) for row in rows)
        (tmp_path / "a.conll").write_text(text)
        out = f"o{len(tags)}.parquet"
        assert run(tmp_path, tmp_path / "a.conll", out) == 0
        table = pq.read_table(tmp_path / out)
        assert ("tags" in table.column_names) == bool(tags)
        expected = [row["prediction"] for row in found if row["tokens"]]
        assert table["prediction"].to_pylist() == expected


def test_questions(tmp_path, capsys):
    fields = {"max_position_embeddings": L, "long_conv_l_max": L, "mask_padding": True}
    config = small(vocab_size=30522, type_vocab_size=2, **fields)
    model = save(tmp_path / "model", M2BertForQuestionAnswering(config))
    rng = random.Random(0)
    contexts = [" ".join(rng.choices(WORDS, k=n)) for n in (0, 1, 5, 60)]
    asked = [{"id": f"q{i}", "question": "Who?", "extra": i} for i in range(4)]
    paragraphs = [{"context": c, "qas": [q]} for c, q in zip(contexts, asked, strict=True)]
    data = {"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert run(tmp_path, tmp_path / "a.json", "o.jsonl") == 0
    assert capsys.readouterr().out.startswith("4 rows\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = lines(tmp_path / "o.jsonl")
    assert [row["extra"] for row in found] == [0, 1, 2, 3]
    assert found[0]["prediction"] == "" and found[0]["score"] is None
    for row in found:
        features = encode_question(tokenizer, "Who?", row["context"], L, L // 2)
        scores = [logits(model, f.input_ids, token_type_ids=f.token_type_ids) for f in features]
        starts, ends = ([s[f"{which}_logits"] for s in scores] for which in ("start", "end"))
        answer = answer_question(row["context"], features, starts, ends)
        assert row["prediction"] == answer.text
        assert (row["prediction_start"], row["prediction_end"]) == (answer.start, answer.end)
        assert np.isclose(row["null_score"], answer.null_score, atol=1e-2)


def test_texts_are_split_into_words(tmp_path):
    """An entity's place then counts characters."""
    model = M2BertForTokenClassification(small(vocab_size=30522, mask_padding=True, **LABELS))
    save(tmp_path / "model", model)
    text = "He went (at last) to London, naïve as ever."
    assert run(tmp_path, write_rows(tmp_path / "a.jsonl", [{"text": text}]), "o.jsonl") == 0
    (row,) = lines(tmp_path / "o.jsonl")
    assert len(row["prediction"]) == 13
    assert row["entities"]
    for entity in row["entities"]:
        assert entity["text"] == text[entity["start"] : entity["end"]]


def test_errors_name_the_row(tmp_path, capsys):
    model = M2BertForTokenClassification(small(vocab_size=30522, **LABELS))
    save(tmp_path / "model", model)
    file = write_rows(tmp_path / "a.jsonl", [{"tokens": "a b"}])
    assert run(tmp_path, file, "o.jsonl") == 1
    assert "a.jsonl:1: no column 'text'" in capsys.readouterr().err
    assert run(tmp_path, write_rows(tmp_path / "a.jsonl", [{"tokens": [1]}]), "o.jsonl") == 1
    assert "a.jsonl:1: " in capsys.readouterr().err
