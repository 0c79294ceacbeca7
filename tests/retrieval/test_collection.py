"""Test collections of each layout, and one line for each thing that can be wrong with them."""

import gzip
import re

import pytest
from datasets import Dataset

from m2_plugin.retrieval.collection import Document, Query, read_collection
from tests.retrieval.helpers import DOCUMENTS, QRELS, QUERIES, write_beir
from tests.utils import write_rows


def test_beir(tmp_path, caplog):
    folder = write_beir(tmp_path / "ships")
    found = read_collection([folder])
    assert found.ids == list(DOCUMENTS) and set(found.datasets) == {"ships"}
    texts = [f"{title} {text}".lstrip() if title else text for title, text in DOCUMENTS.values()]
    assert list(found.texts("ships")) == texts
    assert found.queries == [Query(i, QUERIES[i], "ships") for i in ("q1", "q2")]
    assert found.qrels == QRELS and not found.own_id
    assert "1 judgements name documents that are not there, such as 'gone'" in caplog.text
    assert read_collection([folder], keep_own_id=True).own_id


def test_beir_compressed_and_without_header(tmp_path):
    folder = write_beir(tmp_path / "ships")
    expected = read_collection([folder])
    corpus, qrels = folder / "corpus.jsonl", folder / "qrels" / "test.tsv"
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    qrels.rename(folder / "qrels" / "dev.tsv")
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t2\nq1\td3\t0\nq2\td2\t1\nq2\tgone\t1\n")
    found = read_collection([folder], "dev")
    assert (found.content, found.qrels) == (expected.content, expected.qrels)


def test_own_id_as_relevant_is_told(tmp_path, caplog):
    folder = write_beir(tmp_path)
    (folder / "qrels" / "test.tsv").write_text("q2\tq2\t1\n")
    read_collection([folder], keep_own_id=True)
    assert not caplog.text
    read_collection([folder])
    assert "1 queries have the document with their own id as relevant" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_locov1(kind, tmp_path):
    documents = [
        {"pid": "a_Passage_0", "passage": "one", "dataset": "a"},
        {"pid": "b_Passage_0", "passage": "two", "dataset": "b"},
        {"pid": "a_Passage_1", "passage": "three", "dataset": "a"},
    ]
    queries = [
        {"qid": "a_Query_0", "query": "first", "answer_pids": ["a_Passage_1"], "dataset": "a"},
        {"qid": "b_Query_0", "query": "second", "answer_pids": ["b_Passage_0"], "dataset": "b"},
    ]
    files = []
    for name, rows in (("documents", documents), ("queries", queries)):
        files.append(tmp_path / f"{name}.{kind}")
        data = Dataset.from_list(rows)
        if kind == "saved":
            data.save_to_disk(str(files[-1]))
        else:
            data.to_parquet(files[-1]) if kind == "parquet" else data.to_json(files[-1])
    found = read_collection(files)
    assert found.ids == [row["pid"] for row in documents] and found.datasets == ["a", "b", "a"]
    assert list(found.texts("a")) == ["one", "three"]
    assert found.queries == [Query("a_Query_0", "first", "a"), Query("b_Query_0", "second", "b")]
    assert found.qrels == {"a_Query_0": {"a_Passage_1": 1}, "b_Query_0": {"b_Passage_0": 1}}


def test_own_documents_and_queries(tmp_path, caplog):
    documents = write_rows(tmp_path / "d.jsonl", [{"id": 1, "text": "one"}, {"id": 2, "text": ""}])
    rows = [
        {"id": "q", "text": "?", "relevant": [2]},
        {"id": "r", "text": "!", "relevant": {"1": 2, "2": 0}},
        {"id": "s", "text": ".", "relevant": []},
    ]
    found = read_collection([documents, write_rows(tmp_path / "q.jsonl", rows)])
    assert list(found.documents()) == [Document("1", "one", "all"), Document("2", "", "all")]
    assert found.qrels == {"q": {"2": 1}, "r": {"1": 2, "2": 0}} and found.own_id
    assert "1 queries of 3 have no relevant document: they are left out" in caplog.text


def test_pairs(tmp_path):
    """Equal texts are one query or one document; negatives are documents."""
    rows = [
        {"query": "a", "passage": "x", "negatives": ["y"]},
        {"query": "b", "passage": "y", "negatives": ["x"]},
        {"query": "a", "passage": "z", "negatives": ["x"]},
    ]
    found = read_collection([write_rows(tmp_path / "pairs.test.jsonl", rows)])
    assert [d.text for d in found.documents()] == ["x", "y", "z"] and found.ids == ["0", "1", "2"]
    assert found.queries == [Query("0", "a", "pairs"), Query("1", "b", "pairs")]
    assert found.qrels == {"0": {"0": 1, "2": 1}, "1": {"1": 1}}


def test_the_digest_is_that_of_the_documents(tmp_path):
    folder = write_beir(tmp_path)
    before = read_collection([folder]).content
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("dawn", "noon"))
    assert read_collection([folder]).content != before


CORPUS = '{"_id": "d1", "text": "one"}\n'
QUERY = '{"_id": "q1", "text": "?"}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus.jsonl": None}, "b' has no corpus.jsonl; give a folder as in BEIR"),
        ({"queries.jsonl": None}, "b' has no queries.jsonl"),
        ({"qrels/test.tsv": None}, r"no file '.*qrels/test.tsv'; --split can be: dev"),
        ({"corpus.jsonl": ""}, "b' has no rows"),
        ({"corpus.jsonl": CORPUS * 2}, "corpus.jsonl' has the document 'd1' twice"),
        ({"corpus.jsonl": CORPUS + "{"}, "corpus.jsonl:2: not JSON"),
        ({"corpus.jsonl": '{"_id": "d1"}'}, "corpus.jsonl:1: no column 'text'; the row has '_id'"),
        ({"corpus.jsonl": '{"text": "one"}'}, r"corpus.jsonl:1: a document needs an id \(id or"),
        ({"corpus.jsonl": '{"_id": "a b", "text": ""}'}, "jsonl:1: '_id' is 'a b': an id has no"),
        ({"corpus.jsonl": '{"_id": "", "text": ""}'}, "jsonl:1: '_id' is ''"),
        ({"corpus.jsonl": '{"_id": 1.5, "text": ""}'}, "jsonl:1: '_id' should be an id, got float"),
        ({"queries.jsonl": '{"_id": "other", "text": ""}'}, "lacks the query 'q1', which has judg"),
        ({"queries.jsonl": QUERY * 2}, "queries.jsonl' has the query 'q1' twice"),
        ({"qrels/test.tsv": "q1\td1\tyes\n"}, "test.tsv:1: 'score' should be an integer: .*'yes'"),
        ({"qrels/test.tsv": "q1\td1\n"}, "test.tsv:1: 2 columns where there should be 3"),
        ({"qrels/test.tsv": "q1\td1\t1\nq1\td1\t2\n"}, "test.tsv:2: query 'q1' and document 'd1'"),
        ({"qrels/test.tsv": ""}, "has no query with a judged document"),
    ],
)
def test_what_is_wrong_in_a_beir_folder(files, message, tmp_path):
    folder = tmp_path / "b"
    good = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERY, "qrels/test.tsv": "q1\td1\t1\n"}
    for name, content in (good | {"qrels/dev.tsv": ""} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_collection([folder])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("documents", "queries", "message"),
    [
        ({}, {"relevant": "d1"}, "q.jsonl:1: 'relevant' should be a list of ids.*got str 'd1'"),
        ({}, {"relevant": {"d1": "1"}}, r"q.jsonl:1: 'relevant' should be .*grade \(an integer\)"),
        ({}, {"relevant": [None]}, "q.jsonl:1: 'relevant' should be an id, got NoneType"),
        ({}, {"relevant": []}, "q.jsonl' has no query with a judged document"),
        ({}, {"text": 3}, "q.jsonl:1: 'text' should be a text, got int 3"),
        (
            {"dataset": "a"},
            {"dataset": "b"},
            "query 'q1' is of data set 'b', of which there are no",
        ),
        ({"dataset": 1}, {}, "d.jsonl:1: 'dataset' should be a text, got int 1"),
        ({"title": 1}, {}, "d.jsonl:1: 'title' should be a text, got int 1"),
    ],
)
def test_what_is_wrong_in_two_files(documents, queries, message, tmp_path):
    files = [
        write_rows(tmp_path / "d.jsonl", [{"id": "d1", "text": "one"} | documents]),
        write_rows(tmp_path / "q.jsonl", [{"id": "q1", "text": "?", "relevant": ["d1"]} | queries]),
    ]
    with pytest.raises(ValueError, match=message):
        read_collection(files)


def test_other_paths(tmp_path):
    with pytest.raises(ValueError, match=r"3 paths are too many; give a folder as in BEIR"):
        read_collection(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"there is no file 'nowhere.jsonl'"):
        read_collection(["nowhere.jsonl"])
    file = write_rows(tmp_path / "p.jsonl", [{"query": "a", "text": "b"}])
    line = re.escape(f"{file}:1: no column 'passage'; the row has 'query', 'text'")
    with pytest.raises(ValueError, match=line):
        read_collection([file])
