"""`m2-plugin search`: hits as by brute force, an index that is made once, and says if it is old."""

import json
import re
import shutil

import numpy as np
import pytest

from m2_plugin.cli import main
from m2_plugin.files import locked
from m2_plugin.retrieval import index
from tests.retrieval.helpers import save_model
from tests.utils import write_rows

TEXTS = [f"{place} {what}" for place in ("north", "south", "sea") for what in ("rain", "ship", "")]
LONG = "word " * 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path):
    rows = [{"name": f"n{i}", "body": text} for i, text in enumerate([*TEXTS, LONG])]
    return write_rows(tmp_path / "texts.jsonl", rows)


def search(source, model, *flags):
    arguments = ["search", source, "--model", model, *flags]
    return main([str(argument) for argument in arguments])


def test_as_sentence_transformers_finds(model, file, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    queries = ["a ship in the south", "rain", ""]
    out = tmp_path / "deep" / "hits.jsonl"
    asked = write_rows(tmp_path / "queries.jsonl", [{"q": query} for query in queries])
    flags = ["--queries", asked, "--query-column", "q", "--top-k", 4, "--out", out]
    assert search(file, model, "--text-column", "body", "--id-column", "name", *flags) == 0
    assert "3 queries\nA score is a cosine, from -1 to 1." in capsys.readouterr().out
    theirs = SentenceTransformer(str(model), device="cpu")
    expected = theirs.encode(queries) @ theirs.encode([*TEXTS, LONG]).T
    found = [json.loads(line) for line in out.open()]
    assert [row["query"] for row in found] == queries
    for row, scores in zip(found, expected, strict=True):
        rows = [hit["row"] for hit in row["hits"]]
        np.testing.assert_allclose(
            [hit["score"] for hit in row["hits"]], np.sort(scores)[::-1][:4], atol=1e-5
        )
        np.testing.assert_allclose(scores[rows], np.sort(scores)[::-1][:4], atol=1e-5)
        for hit in row["hits"]:
            assert hit["id"] == f"n{hit['row']}"
            assert hit["text"] == " ".join([*TEXTS, LONG][hit["row"]].split())[:200]


def test_printed(model, file, capsys):
    flags = ["--text-column", "body", "--query", "rain", "--query", "ship", "--top-k", 99]
    assert search(file, model, *flags) == 0
    printed = capsys.readouterr().out
    lines = printed.split("\n\n")[0].splitlines()
    assert lines[0] == "rain" and len(lines) == 1 + len(TEXTS) + 1
    scores = [float(re.match(r" +(-?\d\.\d{4})  row \d  ", line)[1]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)
    assert "they are no probabilities" in printed and printed.endswith("texts.jsonl.index\n")


def test_the_index_is_made_once_and_does_without_the_file(model, file, capsys, monkeypatch):
    column, asked = ["--text-column", "body"], ["--query", "rain"]
    assert search(file, model, *column, *asked) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(index, "embed_file", None)
    assert search(file, model, *column, *asked) == 0 and capsys.readouterr().out == first
    made = file.with_name("texts.jsonl.index")
    assert search(made, model, *asked) == 0 and capsys.readouterr().out == first
    moved = made.rename(made.with_name("moved"))
    file.unlink()
    assert search(moved, model, *asked) == 0
    assert capsys.readouterr().out == first.replace(str(made), str(moved))
    assert not list(file.parent.glob(".*"))


def test_an_old_index(model, file, tmp_path, capsys):
    column, asked = ["--text-column", "body"], ["--query", "rain"]
    made = tmp_path / "index"
    assert search(file, model, *column, *asked, "--index", made) == 0
    other = save_model(tmp_path / "other", classifier_pooling="mean")
    for source, more in ((file, column), (made, [])):
        assert search(source, other, *more, *asked, "--index", made) == 1
        assert "index' was made with another model: give --rebuild" in capsys.readouterr().err
    assert search(file, model, "--text-column", "name", *asked, "--index", made) == 1
    assert "with another --text-column: give --rebuild" in capsys.readouterr().err
    assert search(file, model, *column, *asked, "--index", made, "--dtype", "bfloat16") == 1
    assert "with another --dtype: give --rebuild" in capsys.readouterr().err
    file.write_text(file.read_text().replace("north", "moors"))
    for source, more in ((file, column), (made, [])):
        assert search(source, model, *more, *asked, "--index", made) == 1
        error = capsys.readouterr().err
        assert "index' was made with another content of its file: give --rebuild" in error
    assert f"search {str(file)!r} itself for that" in error
    assert search(file, model, *column, *asked, "--index", made, "--rebuild") == 0
    assert "moors rain" in capsys.readouterr().out
    assert search(made, model, *asked) == 0


def test_interrupted(model, file, tmp_path, capsys, monkeypatch):
    column, asked = ["--text-column", "body"], ["--query", "rain"]
    made = tmp_path / "index"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index, "embed_file", stop)
        assert search(file, model, *column, *asked, "--index", made) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert search(made, model, *asked) == 1
    assert f"is not complete: search {str(file)!r} with --index to go on" in capsys.readouterr().err
    assert search(file, model, *column, *asked, "--index", made) == 0
    assert "rain" in capsys.readouterr().out and not list(tmp_path.glob(".*"))


def test_prompts_are_not_shown(tmp_path, file, capsys):
    from sentence_transformers import SentenceTransformer

    folder = save_model(tmp_path / "model")
    prompts = {"query": "ask: ", "document": "read: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    out = tmp_path / "hits.jsonl"
    flags = ["--query", "rain", "--top-k", 99, "--out", out]
    assert search(file, folder, "--text-column", "body", *flags) == 0
    hits = json.loads(out.read_text())["hits"]
    assert {hit["text"] for hit in hits} >= {"north rain", "sea ship"}
    theirs = SentenceTransformer(str(folder), device="cpu")
    texts = [f"read: {text}" for text in [*TEXTS, LONG]]
    expected = theirs.encode(texts) @ theirs.encode("ask: rain")
    assert [hit["score"] for hit in hits] == pytest.approx(np.sort(expected)[::-1], abs=1e-5)


def test_what_is_refused(model, file, tmp_path, capsys):
    column, asked = ["--text-column", "body"], ["--query", "rain"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "hits.jsonl"
    for source, flags, message in [
        (tmp_path / "nowhere.txt", asked, "there is no file .*nowhere.txt"),
        (tmp_path / "folder", asked, "is a folder that `datasets` did not save: give a file"),
        (tmp_path / "empty.txt", asked, "texts.jsonl' has no rows"),
        ("s3://bucket/texts.txt", asked, "is not on this machine: download it first"),
        (file, asked, r"texts.jsonl:1: no column 'text' \(--text-column\)"),
        (file, [*column, "--id-column", "x", *asked], r"jsonl:1: no column 'x' \(--id-column\)"),
        (file, [*column, *asked, "--top-k", 0], "--top-k must be at least 1, not 0"),
        (file, [*column, *asked, "--out", "hits.csv"], "--out must end in .jsonl, not 'hits.csv'"),
        (file, [*column, "--queries", tmp_path / "empty.txt"], "empty.txt' has no rows"),
        (file, [*column, "--queries", file], r"jsonl:1: no column 'text' \(--query-column\)"),
    ]:
        assert search(source, model, *flags) == 1
        assert re.search(message, capsys.readouterr().err), message
    made = file.with_name("texts.jsonl.index")
    with locked(made):
        assert search(file, model, *column, *asked) == 1
        assert "texts.jsonl.index' is being written by another process" in capsys.readouterr().err
    out.write_text("mine")
    assert search(file, model, *column, *asked, "--out", out) == 1 and out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert search(file, model, *column, *asked, "--out", out, "--overwrite") == 0
    assert json.loads(out.read_text())["query"] == "rain"


def test_a_damaged_index(model, file, tmp_path, capsys):
    column, asked = ["--text-column", "body"], ["--query", "rain", "--top-k", 99]
    assert search(file, model, *column, *asked) == 0
    made = file.with_name("texts.jsonl.index")
    for name, message in [
        ("texts.jsonl", "texts.jsonl' has fewer texts than there are vectors"),
        ("vectors.npy", "vectors.npy' is no file of vectors"),
        ("index.json", "index.json' cannot be read as JSON"),
    ]:
        copy = shutil.copytree(made, tmp_path / f"copy-{name}")
        (copy / name).write_bytes((copy / name).read_bytes()[: 200 if name[0] == "v" else 100])
        assert search(copy, model, *asked) == 1
        assert message in capsys.readouterr().err
    (copy / "index.json").write_text("{}")
    assert search(copy, model, *asked) == 1
    assert "index.json' lacks 'file'" in capsys.readouterr().err
