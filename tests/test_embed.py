"""`m2-plugin embed`: every text's vector, whatever it is batched with, killed or not."""

import inspect
import json
import os
import re
import shutil
from itertools import count

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from m2_plugin.cli import main
from m2_plugin.files import locked
from m2_plugin.inference import batches
from m2_plugin.models import M2BertForMaskedLM, M2BertForTextEmbedding
from m2_plugin.tasks import TextEmbedding
from tests.models.test_modeling_m2_bert import small
from tests.models.test_text_embedding import TEXTS, embedder
from tests.utils import TOKENIZER

LINES = [*TEXTS, "", "None", "a very long text " * 20, "Ünïcode, 海"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path, mask_padding=True, normalize_embeddings=True)
    return path


def save(path, **fields):
    embedder(**fields).save_pretrained(path)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)


def alone(folder, texts):
    """The vectors of texts that are in no batch with others."""
    model = type(embedder()).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": True, "max_length": model.config.max_sequence_length}
    with torch.no_grad():
        rows = [model(**tokenizer(t, return_tensors="pt", **cut)).sentence_embedding for t in texts]
    return torch.cat(rows).numpy()


def run(folder, file, out, *flags):
    arguments = ["--model", folder, "--out", out, "--num-workers", 1, *flags]
    return main(["embed", str(file), *map(str, arguments)])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("m2_plugin.chunks.CHUNK_ROWS", 3)


def interrupt(monkeypatch, folder, file, out):
    """Runs until the second chunk; returns the file with the results for the first."""
    forward, calls = M2BertForTextEmbedding.forward, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        stop.__signature__ = inspect.signature(forward)
        patched.setattr(M2BertForTextEmbedding, "forward", stop)
        assert run(folder, file, out) == 130
    (part,) = out.parent.glob(f".{out.name}.partial/*/0*")
    return part


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"])
def test_each_kind_of_file(ending, folder, tmp_path, capsys):
    file, data = tmp_path / f"texts.{ending}", Dataset.from_dict({"body": LINES, "id": [1] * 8})
    if ending == "txt":
        file.write_text("".join(f"{line}\n" for line in LINES))
    elif ending == "saved":
        data.save_to_disk(str(file))
    elif ending == "csv":
        data.to_csv(file)
    elif ending == "parquet":
        data.to_parquet(file)
    else:
        data.to_json(file, compression="gzip" if ending.endswith("gz") else None)
    out = tmp_path / "deep" / "vectors.npy"
    assert run(folder, file, out, "--text-column", "body", "--batch-tokens", 40) == 0
    vectors = np.load(out)
    assert vectors.dtype == np.float32 and list(out.parent.iterdir()) == [out]
    np.testing.assert_allclose(vectors, alone(folder, LINES), rtol=0, atol=1e-5)
    assert f"{len(LINES)} vectors of 16 numbers" in capsys.readouterr().out


def test_texts_are_those_of_the_file_as_it_is(folder, tmp_path):
    """Not of a file that the name would match, nor of what the file held at that time before."""
    texts = ["second", "one\rtwo", "None"]
    rows = [{"text": text, "n": [1, "a", None][i]} for i, text in enumerate(texts)]
    for name, content in [
        ("a [1].txt", "\n".join(texts)),
        ("a?.json", json.dumps(rows)),
        ("a*.csv", 'id,text\n1,second\n2,"one\rtwo"\n3,None\n'),
    ]:
        file, other = tmp_path / name, tmp_path / re.sub(r"[*?]| \[1\]", "1", name)
        other.write_text("other\n")
        for content_then in (content.replace("second", "first"), content):
            file.write_text(content_then)
            os.utime(file, (1, 1))
            assert run(folder, file, tmp_path / "v.npy", "--overwrite") == 0
        found = np.load(tmp_path / "v.npy")
        np.testing.assert_allclose(found, alone(folder, texts), rtol=0, atol=1e-5)


def test_a_file_that_changes_meanwhile(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo\n")
    monkeypatch.setattr("m2_plugin.embed.survey", lambda *_: (3, "of three texts"))
    assert run(folder, file, tmp_path / "v.npy") == 1
    assert "was changed while it was read" in capsys.readouterr().err


def test_as_sentence_transformers_does(folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    assert run(folder, file, out) == 0
    expected = SentenceTransformer(str(folder), device="cpu").encode(LINES)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(
    "fields", [{}, {"classifier_pooling": "mean", "normalize_embeddings": True}]
)
def test_a_folder_that_sentence_transformers_saved(fields, older, tmp_path, capsys):
    """Its encoder is a model of its own, the pooler lies in 2_Dense; others are refused."""
    from sentence_transformers import SentenceTransformer

    save(tmp_path / "model", mask_padding=True, **fields)
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        model[2].linear.weight *= 1.5  # as if it had been trained
    model.save(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "1_Pooling" / "config.json"
    if older:
        shutil.copy(tmp_path / "model" / "1_Pooling" / "config.json", path)
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    assert run(tmp_path / "saved", file, out) == 0
    np.testing.assert_allclose(np.load(out), model.encode(LINES), rtol=0, atol=1e-5)
    longer = tmp_path / "longer"
    assert (
        main(["extend", str(tmp_path / "saved"), "--max-seq-len", "48", "--out", str(longer)]) == 0
    )
    assert main(["export", str(longer), "--hub", str(tmp_path / "hub")]) == 0
    found = SentenceTransformer(str(longer), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), rtol=0, atol=1e-5)

    pooling = json.loads(path.read_text())
    other = {"pooling_mode_max_tokens": True} if older else {"pooling_mode": "max"}
    path.write_text(json.dumps(pooling | other))
    capsys.readouterr()
    assert run(tmp_path / "saved", file, tmp_path / "other.npy") == 1
    assert "encode with sentence-transformers" in capsys.readouterr().err


def test_without_mask_padding_no_text_is_padded(tmp_path):
    """Padding would change the vectors: a batch of all differs from each text alone."""
    save(tmp_path / "model", mask_padding=False)
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES * 3))
    assert run(tmp_path / "model", file, out) == 0
    expected = alone(tmp_path / "model", LINES * 3)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)


def test_batches():
    lengths = [3, 9, 3, 30, 1, 5]
    assert list(batches(lengths, 10, equal=False)) == [[4, 0, 2], [5], [1], [3]]
    assert list(batches(lengths, 10, equal=True)) == [[4], [0, 2], [5], [1], [3]]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-4], lambda data: data[:-4] + b"\0\0\0\0"]
)
@pytest.mark.usefixtures("small_chunks")
def test_damaged_results_are_not_published(damage, folder, tmp_path, caplog, monkeypatch):
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    assert run(folder, file, tmp_path / "unbroken.npy") == 0
    part = interrupt(monkeypatch, folder, file, out)
    part.write_bytes(damage(part.read_bytes()))
    assert run(folder, file, out) == 0
    assert f"{part} is damaged: its 3 rows are done again" in caplog.text
    assert out.read_bytes() == (tmp_path / "unbroken.npy").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_two_models_do_not_write_one_file(folder, tmp_path, capsys):
    """The first goes on; the second is told who has the file."""
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    with locked(out):
        assert run(folder, file, out) == run(folder, file, out, "--overwrite") == 1
        error = capsys.readouterr().err
        assert f"{str(out)!r} is being written by another process: process {os.getpid()}" in error
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("small_chunks")
def test_interrupted(folder, tmp_path, capsys, caplog, monkeypatch):
    """Says how to go on, and does; what was done is not done again."""
    caplog.set_level("INFO")
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    interrupt(monkeypatch, folder, file, out)
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not out.exists()
    embedded = []
    embed = TextEmbedding.run
    monkeypatch.setattr(
        TextEmbedding, "run", lambda self, rows: embedded.extend(rows) or embed(self, rows)
    )
    assert run(folder, file, out) == 0
    assert "continuing after 3 rows" in caplog.text
    assert embedded == [(line,) for line in LINES[3:]]
    np.testing.assert_allclose(np.load(out), alone(folder, LINES), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_killed_after_it_wrote_the_file(folder, tmp_path, capsys, monkeypatch):
    """The file is complete; the next run removes what was left beside it."""
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    interrupt(monkeypatch, folder, file, out)
    out.write_bytes(b"complete")
    (tmp_path / ".vectors.npy.lock").write_text("process 1 on a machine\n")
    assert run(folder, file, out) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == b"complete" and not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("small_chunks")
def test_another_job_starts_anew(folder, tmp_path, caplog, monkeypatch):
    """Another file, other settings, or the hidden file of an older version."""
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES))
    interrupt(monkeypatch, folder, file, out)
    file.write_text("\n".join(TEXTS))
    assert run(folder, file, out, "--dtype", "bfloat16") == 0
    assert "was made with another file, dtype: starting again" in caplog.text
    (tmp_path / ".vectors.npy.partial").write_bytes(b"half")
    assert run(folder, file, out, "--overwrite") == 0
    assert "another version of this program: starting again" in caplog.text
    np.testing.assert_allclose(np.load(out), alone(folder, TEXTS), rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_changes_meanwhile(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("One.")
    times = count()
    monkeypatch.setattr("m2_plugin.chunks.digest", lambda _: str(next(times)))
    assert run(folder, file, tmp_path / "v.npy") == 1
    assert f"{folder.name}' was changed meanwhile" in capsys.readouterr().err


def test_what_is_refused(folder, tmp_path, capsys):
    good, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    good.write_text("One.\nTwo.")
    (tmp_path / "texts.doc").write_text("One.")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "One."}\n{"text": ')
    (tmp_path / "null.jsonl").write_text('{"text": "One."}\n{"text": null}\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "other.jsonl").write_text('{"body": "One."}\n')
    M2BertForMaskedLM(small(vocab_size=30522)).save_pretrained(tmp_path / "masked")
    embedder().save_pretrained(tmp_path / "bare")
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(folder, tmp_path / "many")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "many")
    for file, model, message in [
        ("texts.txt", tmp_path / "many", r"has ids up to \d+, but the model's vocab_size is only"),
        ("none.txt", folder, "there is no file .*none.txt"),
        ("texts.doc", folder, "texts.doc: unknown kind of file; the endings known are .txt .text"),
        ("empty.jsonl", folder, "empty.jsonl' has no rows"),
        ("bad.jsonl", folder, "bad.jsonl:2: not JSON"),
        ("null.jsonl", folder, "null.jsonl:2: 'text' should be a text, got NoneType None"),
        ("numbers.jsonl", folder, "numbers.jsonl:1: 'text' should be a text, got int 1"),
        (
            "other.jsonl",
            folder,
            r"other.jsonl:1: no column 'text' \(--text-column\); the row has 'body'",
        ),
        ("texts.txt", tmp_path / "masked", "lacks pooler.dense.weight, .*retrieval"),
        (
            "texts.txt",
            tmp_path / "bare",
            r"bare' has no tokenizer .*\(the folder has no tokenizer.json",
        ),
        ("texts.txt", tmp_path / "cut", "cut/model.safetensors' cannot be read as a checkpoint"),
        ("texts.txt", tmp_path / "nowhere", "there is no file .*nowhere/config.json"),
    ]:
        assert run(model, tmp_path / file, out) == 1
        assert re.search(message, capsys.readouterr().err), message
    for device in ("nowhere", "cuda:99"):
        assert run(folder, good, out, "--device", device) == 1
        assert f"--device: torch has no device {device!r} here" in capsys.readouterr().err
    assert run(folder, good, good / "vectors.npy") == 1
    assert "texts.txt/vectors.npy' cannot be written" in capsys.readouterr().err
    assert run(folder, good, tmp_path / "vectors.txt") == 1
    assert "must end in .npy" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))
    out.write_bytes(b"mine")
    assert run(folder, good, out) == 1 and out.read_bytes() == b"mine"
    assert "exists already: give another name, or --overwrite" in capsys.readouterr().err
    assert run(folder, good, out, "--overwrite") == 0 and np.load(out).shape == (2, 16)
