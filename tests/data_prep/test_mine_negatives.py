"""mine_negatives.py: BM25's order by another computation, and what can never be a negative."""

import json
import math
import random
import re
import sys
from collections import Counter

import pytest

from m2_plugin import cli
from m2_plugin.foundry.conversion.pairs import main_pairs
from m2_plugin.retrieval.negatives import main_mine
from tests.utils import write_rows

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture
def pairs():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 15))) for _ in range(80)]
    return [{"query": q, "passage": p} for q, p in zip(texts[:40], texts[40:], strict=True)]


def run(tmp_path, rows, *flags, name="out.jsonl"):
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / name
    assert main_mine(["--pairs", str(source), "--out", str(out), *map(str, flags)]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def by_hand(query, passages, k1=1.2, b=0.75):
    """BM25 as Lucene has it, one passage after another."""
    words = [re.findall(r"\w\w+", text.lower()) for text in passages]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for passage in words:
        counts, score = Counter(passage), 0.0
        for word in re.findall(r"\w\w+", query.lower()):
            holding = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            norm = k1 * (1 - b + b * len(passage) / mean)
            score += idf * counts[word] / (counts[word] + norm)
        scores.append(score)
    return scores


def test_takes_bm25s_order_without_the_answer(tmp_path, pairs):
    found = run(tmp_path, pairs, "--num_negatives", 5)
    passages = [pair["passage"] for pair in pairs]
    for row, pair in zip(found, pairs, strict=True):
        assert {key: row[key] for key in pair} == pair
        scores = dict(zip(passages, by_hand(row["query"], passages), strict=True))
        del scores[row["passage"]]
        best = sorted(scores.values(), reverse=True)[:5]
        assert [scores[text] for text in row["negatives"]] == pytest.approx(best, rel=1e-5)


def test_what_may_answer_is_no_negative(tmp_path, pairs):
    """No passage of the query in any row, not the query, nothing twice, in any spelling."""
    rows = [
        {"query": "red fox", "passage": "The red fox runs."},
        {"query": "Red  Fox", "passage": "A red fox sleeps."},
        {"query": "a red fox", "passage": "red fox"},  # another's query, and a passage
        {"query": "other", "passage": "the RED fox   runs."},
        {"query": "more", "passage": "A red foxglove."},
    ]
    found = run(tmp_path, rows, "--num_negatives", 1)
    assert [row["negatives"] for row in found[:2]] == [["A red foxglove."]] * 2
    own = rows[0] | {"negatives": ["a red FOXGLOVE."]}
    extra = write_rows(tmp_path / "more.jsonl", [{"body": "One red dog."}, {"body": " "}])
    flags = ["--corpus", extra, "--corpus_column", "body"]
    found = run(tmp_path, [own, *rows[1:]], *flags, name="b.jsonl")
    assert found[0]["negatives"] == ["a red FOXGLOVE.", "One red dog."]

    found = run(tmp_path, pairs * 2, "--num_negatives", 30, name="many.jsonl")
    for row in found:
        assert len({*row["negatives"], row["passage"], row["query"]}) == 32


def test_ranks_and_draws(tmp_path, pairs):
    best = run(tmp_path, pairs, "--num_negatives", 6)
    later = run(tmp_path, pairs, "--num_negatives", 4, "--range_min", 2, name="later.jsonl")
    assert [row["negatives"] for row in later] == [row["negatives"][2:] for row in best]

    flags = ["--num_negatives", 2, "--range_max", 6]
    drawn = run(tmp_path, pairs, *flags, name="drawn.jsonl")
    places = set()
    for row, full in zip(drawn, best, strict=True):
        found = [full["negatives"].index(text) for text in row["negatives"]]
        assert found == sorted(found)
        places |= set(found)
    assert places == set(range(6))
    assert run(tmp_path, pairs, *flags, name="again.jsonl") == drawn
    assert run(tmp_path, pairs, *flags, "--seed", 1, name="seed.jsonl") != drawn


def test_fills_up_with_passages_that_share_no_word(tmp_path):
    rows = [{"query": f"alone{i}", "passage": f"answer{i}"} for i in range(20)]
    found = run(tmp_path, rows, "--num_negatives", 3)
    chosen = Counter(text for row in found for text in row["negatives"])
    assert len(chosen) > 10  # not the first ones for each
    assert all(row["passage"] not in row["negatives"] for row in found)


def test_triplets_are_what_convert_pairs_reads(tmp_path, pairs):
    whole = run(tmp_path, pairs, "--num_negatives", 3)
    rows = run(tmp_path, pairs, "--num_negatives", 3, "--triplets", name="triplets.jsonl")
    assert [row["negatives"] for row in rows] == [[n] for row in whole for n in row["negatives"]]
    assert [row["query"] for row in rows[::3]] == [pair["query"] for pair in pairs]
    files = [f"{name}={tmp_path / name}.jsonl" for name in ("out", "triplets")]
    assert main_pairs(["--out_root", str(tmp_path / "mds"), "--local_files", *files]) == 0
    index = json.loads((tmp_path / "mds" / "triplets" / "index.json").read_text())
    assert index["shards"][0]["samples"] == 3 * len(pairs)


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"query": "q"}], [], "pairs.jsonl:1: no column 'passage' (--passage_column)"),
        ([], [], "hold no pairs"),
        (
            [{"query": "q", "passage": "p"}, {"query": "q", "passage": "p2"}] * 2,
            [],
            "pairs.jsonl:1: 0 passages can be negatives, 1 are needed",
        ),
        (None, ["--num_negatives", "0"], "--num_negatives must be 1 or more, got 0"),
        (None, ["--range_min", "-1"], "--range_min must be 0 or more, got -1"),
        (None, ["--range_min", "5", "--range_max", "5"], "--range_max must be 6"),
        (None, ["--corpus", "pairs.jsonl"], "no column 'text' (--corpus_column)"),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path, pairs, capsys, monkeypatch, rows, flags, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs if rows is None else rows)
    command = ["mine-negatives", "--pairs", "pairs.jsonl", "--out", "out.jsonl", *flags]
    assert cli.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_needs_bm25s_and_a_new_file(tmp_path, pairs, capsys, monkeypatch):
    source = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    command = ["mine-negatives", "--pairs", source, "--out", source]
    assert cli.main(command) == 1
    assert "pairs.jsonl' exists already" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert cli.main([*command[:-1], str(tmp_path / "out.jsonl")]) == 1
    assert "pip install 'm2-plugin[retrieval]'" in capsys.readouterr().err
