"""`m2-plugin predict`: the input's rows with the model's answers, killed or not."""

import csv
import errno
import inspect
import json
import os
import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from m2_plugin import predict
from m2_plugin.cli import main
from m2_plugin.data.rows import read_rows
from m2_plugin.files import locked
from m2_plugin.models import M2BertForMaskedLM, M2BertForSequenceClassification
from m2_plugin.tasks import TextClassification
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER, write_rows

NAMES = ["so so", "good", "ärgerlich"]
WORDS = ["a", "film", "that", "is", "good", "bad", "Ünïcode", "x,y", '"so"', "two\nlines", "\r"]
OURS = ["prediction", *(f"probability_{name}" for name in NAMES)]


def texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(0, 12))) for _ in range(count)]


LINES = [*texts(40), "", "None", "a very long text " * 20]


def spread(model):
    """Give the model weights with which texts differ."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def save(path, model):
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=24).save_pretrained(path)
    return path


def classifier(num_labels=3, **fields):
    torch.manual_seed(0)
    config = small(vocab_size=30522, num_labels=num_labels, **fields)
    if num_labels == 3:
        config.id2label = dict(enumerate(NAMES))
        config.label2id = {name: i for i, name in enumerate(NAMES)}
    return spread(M2BertForSequenceClassification(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), classifier(mask_padding=True))


def alone(folder, rows, **how):
    """The logits of texts, or of pairs, that are in no batch with others."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how = {"truncation": "longest_first", "max_length": 24, "return_tensors": "pt"} | how
    with torch.no_grad():
        logits = [
            model(**tokenizer(*([row] if isinstance(row, str) else row), **how)).logits
            for row in rows
        ]
    return torch.cat(logits)


def run(folder, file, out, *flags):
    arguments = ["--model", folder, "--out", out, "--num-workers", 1, *flags]
    return main(["predict", str(file), *map(str, arguments)])


def rows_of(path):
    return [row.values for row in read_rows(str(path))]


def assert_answers(rows, logits):
    assert [row["prediction"] for row in rows] == [NAMES[i] for i in logits.argmax(1)]
    found = [[float(row[column]) for column in OURS[1:]] for row in rows]
    np.testing.assert_allclose(found, logits.softmax(1).numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("ending", "out"),
    [
        *(("csv", "csv"), ("csv", "jsonl"), ("csv", "parquet"), ("jsonl", "csv")),
        *(("jsonl.gz", "parquet"), ("txt", "csv"), ("tsv", "jsonl"), ("saved", "csv")),
        *(("parquet", "parquet"), ("parquet", "csv"), ("saved", "parquet")),
    ],
)
def test_each_kind_of_file(ending, out, folder, tmp_path, capsys):
    """All columns of the input, unchanged and in their order, also one called label."""
    lines = [re.sub(r"\s", " ", line) for line in LINES] if ending in ("txt", "tsv") else LINES
    data = {"id": list(range(len(lines))), "body": lines, "label": ["x"] * len(lines)}
    file = tmp_path / f"texts.{ending}"
    if ending == "txt":
        file.write_text("".join(f"{line}\n" for line in lines))
        data = {"body": lines}
    elif ending == "saved":
        Dataset.from_dict(data).save_to_disk(str(file))
    elif ending == "csv":
        Dataset.from_dict(data).to_csv(file)
    elif ending == "tsv":
        rows = [f"{i}\t{line}\tx" for i, line in enumerate(lines)]
        file.write_text("\n".join(["id\tbody\tlabel", *rows]) + "\n")
    elif ending == "parquet":
        Dataset.from_dict(data).to_parquet(file)
    else:
        Dataset.from_dict(data).to_json(file, compression="gzip" if ending.endswith("gz") else None)
    target = tmp_path / "deep" / f"preds.{out}"
    assert run(folder, file, target, "--text-column", "body", "--batch-tokens", 100) == 0
    assert list(target.parent.iterdir()) == [target]
    found = rows_of(target)
    assert list(found[0]) == [*data, *OURS]
    as_text = ending in ("csv", "tsv") or out == "csv"
    for column, values in data.items():
        assert [row[column] for row in found] == [str(v) if as_text else v for v in values]
    assert_answers(found, alone(folder, lines))
    said = capsys.readouterr()
    assert said.out.startswith(f"{len(lines)} rows: ") and said.out.endswith(f"\n{target}\n")


def test_pairs_and_cut_texts(folder, tmp_path, caplog):
    """Cut as in training: the longer one of a pair first; one warning counts the rows."""
    caplog.set_level("WARNING")
    pairs = [*zip(texts(20), texts(20, seed=1), strict=True), ("a " * 50, "b c"), ("a", "b " * 30)]
    file = write_rows(tmp_path / "a.jsonl", [{"text": a, "other": b} for a, b in pairs])
    assert run(folder, file, tmp_path / "p.jsonl", "--pair-column", "other") == 0
    assert_answers(rows_of(tmp_path / "p.jsonl"), alone(folder, pairs))
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1000)
    longer = sum(len(tokenizer(*pair)["input_ids"]) > 24 for pair in pairs)
    assert caplog.messages == [f"{longer} texts of 22 were cut to the model's maximum"]


def test_a_model_that_padding_changes_sees_the_padding_of_training(tmp_path):
    """Each text is padded to the maximum, as the loaders do for such a model."""
    folder = save(tmp_path / "model", classifier(mask_padding=False))
    file = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in LINES])
    assert run(folder, file, tmp_path / "p.csv") == 0
    padded = alone(folder, LINES, padding="max_length")
    assert_answers(rows_of(tmp_path / "p.csv"), padded)
    assert (padded - alone(folder, LINES)).abs().max() > 0.01


@pytest.mark.parametrize("pair", [False, True])
def test_a_bert_of_transformers(pair, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    folder = save(tmp_path / "model", spread(BertForSequenceClassification(config)))
    rows = list(zip(texts(9), texts(9, seed=1), strict=True)) if pair else LINES
    cells = [{"text": r[0], "b": r[1]} if pair else {"text": r} for r in rows]
    file = write_rows(tmp_path / "a.jsonl", cells)
    assert run(folder, file, tmp_path / "p.csv", *(["--pair-column", "b"] if pair else [])) == 0
    assert_answers(rows_of(tmp_path / "p.csv"), alone(folder, rows))


def test_regression(tmp_path, capsys):
    folder = save(tmp_path / "model", classifier(1, mask_padding=True, problem_type="regression"))
    file = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in LINES])
    for ending in ("csv", "parquet"):
        assert run(folder, file, tmp_path / f"p.{ending}") == 0
        found = rows_of(tmp_path / f"p.{ending}")
        assert list(found[0]) == ["text", "score"]
        scores = np.array([float(row["score"]) for row in found])
        np.testing.assert_allclose(scores, alone(folder, LINES)[:, 0], rtol=0, atol=1e-3)
    assert capsys.readouterr().out.startswith(f"{len(LINES)} rows\n")


def test_a_composer_checkpoint(folder, tmp_path):
    """The .pt file of a run, with config and tokenizer inside, gives the same file."""
    from composer.models.huggingface import HuggingFaceModel

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    composer = HuggingFaceModel(model, tokenizer=tokenizer)
    state = {
        "model": composer.state_dict(),
        "integrations": {"huggingface": composer.get_metadata()},
    }
    torch.save({"state": state, "rng": []}, tmp_path / "run.pt")
    file = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in LINES])
    assert run(folder, file, tmp_path / "folder.csv") == 0
    assert run(tmp_path / "run.pt", file, tmp_path / "file.csv") == 0
    assert (tmp_path / "file.csv").read_bytes() == (tmp_path / "folder.csv").read_bytes()


def test_values_of_every_type(folder, tmp_path):
    """Rows with other columns than the first, nested values, and the types of Parquet."""
    rows = [
        {"text": "a", "n": 1, "deep": {"x": [1, None]}},
        {"text": "b", "flag": True, "n": None},
        {"n": 2.5, "text": "c"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    for ending in ("jsonl", "csv", "parquet"):
        assert run(folder, file, tmp_path / f"p.{ending}") == 0
    ours = set(OURS)
    kept = [
        {k: v for k, v in row.items() if k not in ours} for row in rows_of(tmp_path / "p.jsonl")
    ]
    assert kept == rows
    with open(tmp_path / "p.csv", newline="") as opened:
        found = list(csv.DictReader(opened))
    assert [row["n"] for row in found] == ["1", "", "2.5"]
    assert [row["flag"] for row in found] == ["", "true", ""]
    assert json.loads(found[0]["deep"]) == rows[0]["deep"]
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["text", "n", "deep", "flag", *OURS]
    assert table["n"].to_pylist() == [1, None, 2.5]

    schema = pa.schema([("text", pa.large_string()), ("n", pa.int8()), ("t", pa.timestamp("ns"))])
    table = pa.table({"text": ["a", "b"], "n": [1, None], "t": [7, 8]}, schema=schema)
    pq.write_table(table, tmp_path / "b.parquet")
    assert run(folder, tmp_path / "b.parquet", tmp_path / "q.parquet") == 0
    assert pq.read_table(tmp_path / "q.parquet").select(table.column_names).equals(table)


def test_the_column_of_a_class_called_like_another(folder, tmp_path, capsys):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "prediction": "mine"}])
    assert run(folder, file, tmp_path / "p.csv") == 1
    assert "a.jsonl' has a column 'prediction', as the predictions will have: rename it" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_stopped_while_it_writes_the_file(ending, folder, tmp_path, monkeypatch):
    """The model does not run again."""
    file = write_rows(tmp_path / "a.jsonl", [{"text": line} for line in LINES])
    out = tmp_path / f"preds.{ending}"
    assert run(folder, file, tmp_path / f"unbroken.{ending}") == 0

    def some(*args):
        yield next(joined(*args))
        raise KeyboardInterrupt

    joined = predict._joined
    with monkeypatch.context() as patched:
        patched.setattr(predict, "_joined", some)
        assert run(folder, file, out) == 130
    assert not out.exists() and (tmp_path / f".preds.{ending}.partial").exists()
    monkeypatch.setattr(TextClassification, "run", None)
    assert run(folder, file, out) == 0
    assert out.read_bytes() == (tmp_path / f"unbroken.{ending}").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_interrupted_and_other_data_or_damaged_answers(
    folder, tmp_path, capsys, monkeypatch, caplog
):
    """What a run continues is what it would have made itself; else it starts again."""
    monkeypatch.setattr("m2_plugin.chunks.CHUNK_ROWS", 3)
    file, out = tmp_path / "a.jsonl", tmp_path / "p.csv"
    write_rows(file, [{"id": i, "text": line} for i, line in enumerate(LINES)])
    assert run(folder, file, tmp_path / "whole.csv") == 0
    forward, calls = M2BertForSequenceClassification.forward, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    stop.__signature__ = inspect.signature(forward)

    def interrupt():
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(M2BertForSequenceClassification, "forward", stop)
            assert run(folder, file, out) == 130
        assert "run the same command again to continue" in capsys.readouterr().err
        assert not out.exists()
        (part,) = tmp_path.glob(".p.csv.partial/*/0*")
        return part

    part = interrupt()
    part.write_bytes(part.read_bytes().replace(b"prediction", b"predictiom", 1))
    assert run(folder, file, out) == 0
    assert f"{part} is damaged: its 3 rows are done again" in caplog.text
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    out.unlink()
    interrupt()
    rows = [{"id": -i, "text": line} for i, line in enumerate(LINES)]  # only another column
    write_rows(file, rows)
    assert run(folder, file, out) == 0
    assert "was made with another file: starting again" in caplog.text
    assert [int(row["id"]) for row in rows_of(out)] == [row["id"] for row in rows]
    assert not list(tmp_path.glob(".*"))


def test_two_models_do_not_write_one_file(folder, tmp_path, capsys):
    file, out = write_rows(tmp_path / "a.jsonl", [{"text": "One."}]), tmp_path / "p.csv"
    with locked(out):
        assert run(folder, file, out) == run(folder, file, out, "--overwrite") == 1
        error = capsys.readouterr().err
        assert f"{str(out)!r} is being written by another process: process {os.getpid()}" in error
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_what_is_refused(folder, tmp_path, capsys):
    good, out = tmp_path / "a.csv", tmp_path / "p.csv"
    good.write_text("text,label\nOne.,x\nTwo.,y\n")
    (tmp_path / "bad.csv").write_text("text,label\nOne.,x\nTwo.\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    write_rows(tmp_path / "null.jsonl", [{"text": "One."}, {"text": None}])
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "b", "x": "\\ud83d"}\n')
    write_rows(tmp_path / "mixed.jsonl", [{"text": "a", "x": 1}, {"text": "b", "x": "c"}])
    M2BertForMaskedLM(small(vocab_size=30522)).save_pretrained(tmp_path / "masked")
    shutil.copytree(folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "bare" / name).unlink()
    shutil.copytree(TOKENIZER, tmp_path / "masked", dirs_exist_ok=True)
    lost = tmp_path / "lost"
    save(lost, BertForSequenceClassification(BertConfig(
        vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )))  # fmt: skip
    from safetensors.torch import load_file, save_file

    weights = load_file(lost / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, lost / "model.safetensors", metadata={"format": "pt"})
    for file, model, flags, message in [
        ("none.csv", folder, [], "there is no file .*none.csv"),
        ("a.csv", folder, ["--text-column", "txt"],
         r"a.csv:2: no column 'txt' \(--text-column\); the row has 'text', 'label'"),
        ("a.csv", folder, ["--pair-column", "b"], r"a.csv:2: no column 'b' \(--pair-column\)"),
        ("bad.csv", folder, [], "bad.csv:3: 1 columns where there should be 2"),
        ("empty.csv", folder, [], "empty.csv' has no rows"),
        ("null.jsonl", folder, [], "null.jsonl:2: 'text' should be a text, got NoneType None"),
        ("half.jsonl", folder, [], "half.jsonl.* row 2: 'x' holds half of a surrogate pair"),
        ("a.csv", tmp_path / "masked", [], "masked' is a model ForMaskedLM, for which there is no"),
        ("a.csv", tmp_path / "bare", [], "bare' has no tokenizer that can be loaded"),
        ("a.csv", lost, [], "lost' lacks classifier.weight"),
        ("a.csv", tmp_path / "nowhere", [], "there is no file .*nowhere/config.json"),
        ("a.csv", folder, ["--device", "cuda:99"], "--device: torch has no device 'cuda:99' here"),
        ("a.csv", folder, ["--batch-tokens", 0], "--batch-tokens must be at least 1, not 0"),
    ]:  # fmt: skip
        capsys.readouterr()
        assert run(model, tmp_path / file, out, *flags) == 1
        said = capsys.readouterr().err
        assert re.search(message, said), (message, said)
        assert len(said.splitlines()) == 1, said
    assert run(folder, tmp_path / "mixed.jsonl", tmp_path / "p.parquet") == 1
    assert "the columns have no one type each, as Parquet needs" in capsys.readouterr().err
    assert run(folder, good, tmp_path / "p.xlsx") == 1
    assert "--out must end in .csv or .jsonl or .parquet" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))
    out.write_text("mine")
    assert run(folder, good, out) == 1 and out.read_text() == "mine"
    assert "exists already: give another name, or --overwrite" in capsys.readouterr().err
    assert run(folder, good, out, "--overwrite") == 0 and len(rows_of(out)) == 2


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk(name, folder, tmp_path, capsys, monkeypatch):
    """One line names the file; a run with more space writes it."""
    file, out = write_rows(tmp_path / "a.jsonl", [{"text": "One."}]), tmp_path / "p.csv"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        assert run(folder, file, out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.lower().startswith(f"{out}: no space left on") and not out.exists()
    assert run(folder, file, out) == 0 and not list(tmp_path.glob(".*"))
