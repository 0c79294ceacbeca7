"""Measures are those of trec_eval: values worked out by hand."""

import math

import pytest

from m2_plugin.retrieval.measures import DEFAULT, parse, score


def scored(qrels, run, *names):
    return score(parse(names), {"q": qrels}, {"q": run})["q"]


def test_grades_ties_and_missing_documents():
    """Equal scores are ordered by id, from the last: b, a, c. A document not found counts."""
    found = scored(
        {"a": 2, "b": 1, "missing": 1}, {"a": 1.0, "b": 1.0, "c": 0.5},
        "nDCG@10", "nDCG@1", "R@1", "R@10", "AP", "RR", "P@10",
    )  # fmt: skip
    gained = 1 + 2 / math.log2(3)
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    expected = {
        "nDCG@10": gained / ideal, "nDCG@1": 1 / 2, "R@1": 1 / 3, "R@10": 2 / 3,
        "AP": (1 + 1) / 3, "RR": 1.0, "P@10": 2 / 10,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-9) and list(found) == list(expected)


def test_a_tie_is_not_in_favour_of_the_relevant_document():
    run = {"relevant": 0.5, "zebra": 0.5, "yak": 0.4}
    assert scored({"relevant": 1}, run, "RR", "nDCG@10") == pytest.approx(
        {"RR": 1 / 2, "nDCG@10": 1 / math.log2(3)}
    )


def test_average_precision_of_a_longer_ranking():
    run = {name: -rank for rank, name in enumerate("abcdefgh")}
    relevant = {"b": 1, "d": 1, "h": 1, "not found": 1}
    found = scored(relevant, run, "AP", "RR", "R@4", "RR@1")
    expected = {"AP": (1 / 2 + 2 / 4 + 3 / 8) / 4, "RR": 1 / 2, "R@4": 2 / 4, "RR@1": 0.0}
    assert found == pytest.approx(expected)


def test_grades_below_one_are_not_relevant():
    run = {"a": 3.0, "b": 2.0, "c": 1.0}
    found = scored({"a": 0, "b": -1, "c": 1}, run, "nDCG@10", "AP", "R@3")
    assert found == pytest.approx({"nDCG@10": 1 / math.log2(4), "AP": 1 / 3, "R@3": 1.0})


def test_queries_without_hits_score_zero():
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "none relevant": {"a": 0}}
    run = {"found": {"a": 1.0}, "empty": {}, "none relevant": {"a": 1.0}}
    found = score(parse(DEFAULT), qrels, run)
    assert found["found"] == dict.fromkeys(DEFAULT, 1.0)
    assert found["empty"] == found["none relevant"] == dict.fromkeys(DEFAULT, 0.0)


@pytest.mark.parametrize("name", ["nDGC@10", "R", "R@0", "nDCG@", "P@-1", "x y", "AP;RR", "RBP"])
def test_unknown_measures(name):
    with pytest.raises(ValueError, match=r"^--measures: '.*' is not one of ir-measures.*: .+$"):
        parse([name])
