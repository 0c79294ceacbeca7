"""`m2-plugin retrieval`: the numbers of others, whatever the layout; resumed after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from m2_plugin.files import locked
from m2_plugin.retrieval import evaluate, index
from tests.retrieval.helpers import (
    DOCUMENTS,
    QRELS,
    QUERIES,
    read_run,
    results,
    retrieval,
    save_model,
    write_beir,
)
from tests.utils import write_rows

WORDS = ["ship", "bread", "rain", "crew", "dough", "north", "captain", "cook", "dawn", "wind"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def sentences(count, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, 6)) for _ in range(count)]


def write_many(folder):
    """Documents and queries, with several relevant documents of each."""
    generator = np.random.default_rng(3)
    documents = [{"id": f"d{i}", "text": text} for i, text in enumerate(sentences(300, 1))]
    queries = [
        {
            "id": f"q{i}",
            "text": text,
            "relevant": [f"d{j}" for j in generator.choice(300, 20, replace=False)],
        }
        for i, text in enumerate(sentences(30, 2))
    ]
    folder.mkdir(exist_ok=True)
    return [
        write_rows(folder / "documents.jsonl", documents),
        write_rows(folder / "queries.jsonl", queries),
    ]


def test_a_beir_folder(model, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert retrieval(write_beir(tmp_path / "ships"), model, out) == 0
    printed = capsys.readouterr().out
    found = results(out)
    assert list(found["results"]) == ["ships"]
    for system, values in found["results"]["ships"].items():
        assert list(values) == ["nDCG@10", "R@10", "R@100", "AP", "RR"]
        cells = "  ".join(f"{value:7.4f}" for value in values.values())
        assert re.search(rf"^ships, {system} +{cells.split()[0]} ", printed, re.M)
    assert "2 queries, 5 documents" in printed and "the first 24 tokens of a text" in printed
    assert "A document with the query's own id is no hit" in printed
    run = read_run(out / "model.run")
    assert set(run["q1"]) == set(DOCUMENTS) and set(run["q2"]) == set(DOCUMENTS) - {"q2"}
    words = read_run(out / "BM25.run")
    assert set(words["q2"]) == {"d2", "d3"}  # without the document of its own id
    assert next(iter(words["q1"])) == "d1"
    assert sorted((out / "qrels.txt").read_text().splitlines()) == [
        f"{q} 0 {d} {grade}" for q, judged in sorted(QRELS.items()) for d, grade in judged.items()
    ]
    rows = [json.loads(line) for line in (out / "per_query.jsonl").open()]
    assert [(row["system"], row["query"]) for row in rows] == [
        ("model", "q1"), ("model", "q2"), ("BM25", "q1"), ("BM25", "q2"),
    ]  # fmt: skip
    mean = np.mean([row["AP"] for row in rows if row["system"] == "BM25"])
    assert found["results"]["ships"]["BM25"]["AP"] == pytest.approx(mean)
    assert not list(out.rglob(".*"))


def test_titles_go_before_texts_and_own_ids_can_stay(model, tmp_path):
    flags = ["--keep-own-id", "--no-bm25", "--measures", "RR@10", "P@1", "--top-k", 2]
    assert retrieval(write_beir(tmp_path / "b"), model, tmp_path / "out", *flags) == 0
    assert list(results(tmp_path / "out")["results"]["b"]) == ["model"]
    assert list(results(tmp_path / "out")["results"]["b"]["model"]) == ["RR@10", "P@1"]
    assert all(len(hits) == 2 for hits in read_run(tmp_path / "out" / "model.run").values())
    assert not (tmp_path / "out" / "BM25.run").exists()
    texts = (tmp_path / "out" / "documents" / "texts.jsonl").read_text().splitlines()
    assert json.loads(texts[0])["text"].startswith("Bread Knead")


def test_as_sentence_transformers_measures(model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    files = write_many(tmp_path / "data")
    flags = ["--measures", "nDCG@10", "R@10", "AP@100", "RR@10", "P@5"]
    assert retrieval(files, model, tmp_path / "out", *flags) == 0
    rows = [[json.loads(line) for line in file.open()] for file in files]
    evaluator = InformationRetrievalEvaluator(
        {row["id"]: row["text"] for row in rows[1]},
        {row["id"]: row["text"] for row in rows[0]},
        {row["id"]: set(row["relevant"]) for row in rows[1]},
        accuracy_at_k=[1], precision_recall_at_k=[5, 10],
    )  # fmt: skip
    theirs = evaluator(SentenceTransformer(str(model), device="cpu"))
    names = {
        "nDCG@10": "cosine_ndcg@10", "R@10": "cosine_recall@10", "RR@10": "cosine_mrr@10",
        "P@5": "cosine_precision@5",
    }  # fmt: skip
    ours = results(tmp_path / "out")["results"]["all"]["model"]
    expected = {name: theirs[other] for name, other in names.items()}
    assert {name: ours[name] for name in names} == pytest.approx(expected, abs=1e-6)
    assert min(ours.values()) > 0


def test_prompts_and_dot_products(tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = save_model(tmp_path / "model", normalize_embeddings=False)
    file = folder / "config_sentence_transformers.json"
    prompts = {"query": "ask: ", "passage": "read: ", "other": "x"}
    saved = {"prompts": prompts, "default_prompt_name": "other", "similarity_fn_name": "dot"}
    file.write_text(json.dumps(saved))
    assert retrieval(write_beir(tmp_path / "b"), folder, tmp_path / "out", "--no-bm25") == 0
    theirs = SentenceTransformer(str(folder), device="cpu")
    texts = [f"{title} {text}" if title else text for title, text in DOCUMENTS.values()]
    queries = theirs.encode([QUERIES["q1"]], prompt_name="query")
    documents = theirs.encode(texts, prompt_name="passage")
    expected = theirs.similarity(queries, documents)[0].tolist()
    run = read_run(tmp_path / "out" / "model.run")["q1"]
    assert run == pytest.approx(dict(zip(DOCUMENTS, expected, strict=True)), abs=1e-4)
    assert results(tmp_path / "out")["similarity"] == "dot"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"similarity_fn_name": "euclidean"}, "similarity_fn_name is 'euclidean', .*cosine, dot"),
        ({"prompts": {"query": 3}}, "prompts is .*which should map names to texts"),
        ({"default_prompt_name": "q"}, "default_prompt_name is 'q', which prompts does not have"),
        ({"prompts": {"query": "ask: "}}, "1_Pooling/config.json': include_prompt is false"),
    ],
)
def test_settings_that_do_not_fit(saved, message, tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    (folder / "config_sentence_transformers.json").write_text(json.dumps(saved))
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": False}))
    assert retrieval(write_beir(tmp_path / "b"), folder, tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_locov1_searches_each_data_set_by_itself(model, tmp_path, capsys):
    documents, queries = [], []
    for name, seed in (("qasper_title", 1), ("gov_report", 2), ("stackoverflow", 3)):
        for i, text in enumerate(sentences(8, seed)):
            own = {"dataset": name}
            documents.append({"pid": f"{name}_Passage_{i}", "passage": text} | own)
            answers = {"qid": f"{name}_Query_{i}", "answer_pids": [f"{name}_Passage_{i}"]}
            queries.append(answers | {"query": text} | own)
    documents = documents[::2] + documents[1::2]  # the data sets are mixed
    files = [
        write_rows(tmp_path / "documents.jsonl", documents),
        write_rows(tmp_path / "queries.jsonl", queries),
    ]
    out = tmp_path / "out"
    assert retrieval(files, model, out, "--measures", "nDCG@10", "RR") == 0
    found = results(out)["results"]
    mean = found.pop("mean of the data sets")
    assert sorted(found) == ["gov_report", "qasper_title", "stackoverflow"]
    for system in ("model", "BM25"):
        for query, hits in read_run(out / f"{system}.run").items():
            name = query.partition("_Query")[0]
            assert hits and all(document.startswith(name) for document in hits)
        each = [values[system]["RR"] for values in found.values()]
        assert mean[system]["RR"] == pytest.approx(np.mean(each))
        assert found["gov_report"][system]["RR"] == 1  # a query is its own answer
    assert re.search(r"^mean of the data sets, model +1\.0000 ", capsys.readouterr().out, re.M)


def test_bm25_ranks_by_its_formula(model, tmp_path):
    files = write_many(tmp_path / "data")
    assert retrieval(files, model, tmp_path / "out") == 0
    rows = [[json.loads(line)["text"].split() for line in file.open()] for file in files]
    documents, query = rows[0], rows[1][0]
    average = np.mean([len(words) for words in documents])
    expected = {}
    for i, words in enumerate(documents):
        score = 0.0
        for word in query:
            having = sum(word in other for other in documents)
            count = words.count(word)
            norm = 1.2 * (1 - 0.75 + 0.75 * len(words) / average)
            score += np.log(1 + (300 - having + 0.5) / (having + 0.5)) * count / (count + norm)
        if score > 0:
            expected[f"d{i}"] = score
    assert read_run(tmp_path / "out" / "BM25.run")["q0"] == pytest.approx(expected, rel=1e-4)


def test_texts_without_words_are_no_hits(model, tmp_path):
    files = [
        write_rows(tmp_path / "d.jsonl", [{"id": "d", "text": "?"}, {"id": "e", "text": ""}]),
        write_rows(tmp_path / "q.jsonl", [{"id": "q", "text": "!", "relevant": ["d"]}]),
    ]
    assert retrieval(files, model, tmp_path / "out") == 0
    assert results(tmp_path / "out")["results"]["all"]["BM25"]["RR"] == 0
    assert set(read_run(tmp_path / "out" / "model.run")["q"]) == {"d", "e"}


def test_the_picture_is_drawn(model, tmp_path):
    assert retrieval(write_beir(tmp_path / "b"), model, tmp_path / "out") == 0
    picture = imread(BytesIO((tmp_path / "out" / "results.png").read_bytes()))
    assert picture.shape[1] == 1200 and picture.std() > 0.05


def test_queries_are_scored_in_parts(model, tmp_path, monkeypatch):
    files = write_many(tmp_path / "data")
    assert retrieval(files, model, tmp_path / "whole") == 0
    monkeypatch.setattr(evaluate, "SCORED", 7)
    assert retrieval(files, model, tmp_path / "parts") == 0
    for name in ("results.json", "per_query.jsonl", "model.run", "BM25.run", "qrels.txt"):
        whole, parts = ((tmp_path / out / name).read_text() for out in ("whole", "parts"))
        assert whole == parts


def test_the_files_in_trec_format_give_the_same_numbers(model, tmp_path):
    import ir_measures

    out = tmp_path / "out"
    assert retrieval(write_many(tmp_path / "data"), model, out) == 0
    for system, values in results(out)["results"]["all"].items():
        found = ir_measures.pytrec_eval.calc_aggregate(
            [ir_measures.parse_measure(name) for name in values],
            list(ir_measures.read_trec_qrels(str(out / "qrels.txt"))),
            list(ir_measures.read_trec_run(str(out / f"{system}.run"))),
        )
        assert {str(name): value for name, value in found.items()} == pytest.approx(values)


# Going on


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_second_run_embeds_nothing(model, tmp_path, monkeypatch):
    folder, out = write_beir(tmp_path / "b"), tmp_path / "out"
    assert retrieval(folder, model, out) == 0
    first = content(out)
    monkeypatch.setattr(index, "embed_file", None)
    assert retrieval(folder, model, out) == 0 and content(out) == first


def test_interrupted_between_documents_and_queries(model, tmp_path, monkeypatch, capsys):
    folder, out, calls = write_beir(tmp_path / "b"), tmp_path / "out", []
    embed = index.embed_file
    with monkeypatch.context() as patched:

        def once(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return embed(*args, **kwargs)

        patched.setattr(index, "embed_file", once)
        assert retrieval(folder, model, out) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    monkeypatch.setattr(index, "embed_file", lambda *a, **k: calls.append(a) or embed(*a, **k))
    assert retrieval(folder, model, out) == 0
    assert len(calls) == 3 and "queries" in str(calls[2][0])


def test_killed_and_run_again(model, tmp_path):
    files = write_many(tmp_path / "data")
    assert retrieval(files, model, tmp_path / "unbroken") == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m2_plugin.cli", "retrieval", *map(str, files)]
    command += ["--model", str(model), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "documents" / "index.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()
    assert retrieval(files, model, out) == 0
    assert content(out) == content(tmp_path / "unbroken")


def test_other_data_or_another_model(model, tmp_path, capsys):
    folder, out = write_beir(tmp_path / "b"), tmp_path / "out"
    other = save_model(tmp_path / "other", classifier_pooling="mean")
    assert retrieval(folder, model, out) == 0
    first = content(out)
    assert retrieval(folder, other, out) == 1
    error = capsys.readouterr().err
    assert "documents' was made with another model: give --rebuild to make it anew" in error
    assert content(out) == first
    assert retrieval(folder, other, out, "--rebuild") == 0
    assert content(out)["model.run"] != first["model.run"]
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("dawn", "noon"))
    assert retrieval(folder, other, out) == 1
    error = capsys.readouterr().err
    assert "documents' was made with another content of its file: give --rebuild" in error


def test_what_is_refused(model, tmp_path, capsys):
    folder, out = write_beir(tmp_path / "b"), tmp_path / "out"
    for flags, message in [
        (["--top-k", 0], "--top-k must be at least 1, not 0"),
        (["--measures", "nDGC@10"], "--measures: 'nDGC@10' is not one of ir-measures"),
        (["--split", "dev"], "dev.tsv'; --split can be: test"),
        (["--batch-tokens", 0], "--batch-tokens must be at least 1, not 0"),
        (["--device", "nowhere"], "--device: torch has no device 'nowhere' here"),
    ]:
        assert retrieval(folder, model, tmp_path / f"out{flags[0]}", *flags) == 1
        error = capsys.readouterr().err
        assert message in error and "\n" not in error.strip().rpartition("it/s]")[2]
    assert retrieval(folder, tmp_path / "nowhere", out) == 1
    assert "nowhere/config.json" in capsys.readouterr().err
    with locked(out):
        assert retrieval(folder, model, out) == 1
        assert "out' is being written by another process" in capsys.readouterr().err
    (out / "documents").mkdir(parents=True)
    (out / "documents" / "mine.txt").write_text("mine")
    assert retrieval(folder, model, out) == 1
    assert "mine.txt' is no part of an index: give another folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ir_measures", "bm25s"])
def test_a_missing_package(name, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert retrieval(write_beir(tmp_path / "b"), model, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "pip install 'm2-plugin[retrieval]'" in error
    assert ("--no-bm25" in error) == (name == "bm25s")
