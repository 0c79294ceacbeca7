"""Questions with answers in a text: reading, encoding, answering, and the official scores."""

import collections
import itertools
import json
import random
import string
from pathlib import Path

import numpy as np
import pytest
from torchmetrics.functional.text import squad
from transformers import AutoTokenizer

from m2_plugin.data.squad import (
    answer_question,
    best_spans,
    encode_question,
    find_answer,
    read_questions,
    score_answer,
)
from tests.utils import TOKENIZER, write_rows

CONTEXT = "Zoë Smith's dog—an Old English Sheepdog—was born in 1976, near   the Thames. " * 6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


# Scores


def normal(text: str) -> str:
    """As the papers describe it, a step at a time: no articles, punctuation or extra space."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    words, word = [], ""
    for c in kept + " ":
        if c.isalnum() or c == "_":
            word += c
            continue
        words += [" " if word in ("a", "an", "the") else word, c]
        word = ""
    return " ".join("".join(words).split())


def oracle(text: str, answers: list[str], version_2: bool) -> tuple[float, float]:
    """The definition of SQuAD's scores, of version 1.1 or 2.0."""

    def f1(right: str) -> float:
        found, there = normal(text).split(), normal(right).split()
        if version_2 and (not found or not there):
            return float(found == there)
        same = 0
        left = collections.Counter(there)
        for word in found:
            if left[word]:
                left[word] -= 1
                same += 1
        if not same:
            return 0.0
        precision, recall = same / len(found), same / len(there)
        return 2 * precision * recall / (precision + recall)

    if version_2:
        answers = [answer for answer in answers if normal(answer)] or [""]
    return max(float(normal(text) == normal(a)) for a in answers), max(map(f1, answers))


PIECES = ["the", "The", "a", "An", "Thames", "thames", "1976", "Zoë", "zoe\u0308", "U.S.", "-", "—"]
PIECES += [
    "",
    " ",
    "\u00a0",
    "日本",
    "the-dog",
    "dog",
    "dog.",
    "'",
    "İ",
    "ß",
    "theory",
    "\n",
    "_the_",
]


@pytest.mark.parametrize("version_2", [False, True])
def test_scores_are_the_official_ones(version_2):
    rng = random.Random(version_2)

    def phrase() -> str:
        return rng.choice([" ", "", "  "]).join(rng.choices(PIECES, k=rng.randrange(5)))

    for _ in range(3000):
        text, answers = phrase(), [phrase() for _ in range(rng.randrange(1, 4))]
        expected = oracle(text, answers, version_2)
        assert score_answer(text, answers, version_2) == pytest.approx(expected), (text, answers)
        if all(map(normal, [text, *answers])):  # with empty ones, torchmetrics mixes the versions
            target = {"id": "x", "answers": {"text": answers, "answer_start": [0] * len(answers)}}
            theirs = squad([{"id": "x", "prediction_text": text}], [target])
            found = [100 * value for value in score_answer(text, answers, version_2)]
            assert found == pytest.approx([theirs["exact_match"].item(), theirs["f1"].item()])


def test_scores_of_degenerate_answers():
    assert score_answer("", [], True) == (1, 1)
    assert score_answer("dog", [], True) == (0, 0)
    assert score_answer("the", [], True) == (1, 1)  # empty after normalisation
    assert score_answer("", ["the", "dog"], True) == (0, 0)
    assert score_answer("", ["dog"], False) == (0, 0)
    assert score_answer("a", ["the"], False) == (1, 0)  # as the script of 1.1 has it
    assert score_answer("The dog!", ["dog", "cat"], False) == (1, 1)


# Reading


def nested(*questions: dict, version: str = "1.1", **paragraph) -> dict:
    paragraphs = [{"context": CONTEXT, "qas": list(questions)} | paragraph]
    return {"version": version, "data": [{"title": "Dogs", "paragraphs": paragraphs}]}


def read(path: Path, **how) -> list:
    return list(read_questions(str(path), **how))


YEAR = {"text": "1976", "answer_start": CONTEXT.index("1976")}


@pytest.mark.parametrize("indent", [None, 1])
def test_reads_squads_own_json(tmp_path, indent):
    first = {"id": "a1", "question": "When?", "answers": [YEAR, YEAR]}
    second = {"id": "b2", "question": "Why?", "answers": [], "is_impossible": True}
    plausible = {"id": "c", "question": "Who?", "is_impossible": True, "plausible_answers": [YEAR]}
    path = tmp_path / "train.json"
    content = nested(first, second, plausible | {"answers": []}, version="v2.0")
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False))
    found = read(path)
    assert [(q.id, q.problem) for q in found] == [("a1", ""), ("b2", ""), ("c", "")]
    assert found[0].answers == [("1976", YEAR["answer_start"])] * 2 and found[1].answers == []
    assert found[0].context == CONTEXT and found[0].place == f"{path}, question 'a1'"


def test_reads_rows_of_both_forms(tmp_path):
    common = {"question": "When?", "context": CONTEXT}
    lists = {"text": ["1976"], "answer_start": [YEAR["answer_start"]]}
    rows = [common | {"answers": [YEAR], "id": 7}, common | {"answers": lists}]
    rows += [common | {"answers": {"text": [], "answer_start": []}}, common]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert [q.answers for q in found[:3]] == [[("1976", YEAR["answer_start"])]] * 2 + [[]]
    assert [q.id for q in found] == ["7", "2", "3", "4"]
    assert "no column 'answers'" in found[3].problem
    assert not read(tmp_path / "a.jsonl", answered=False)[3].problem


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([{"text": "1976", "answer_start": 0}], r"question 'q': the answer '1976' does not stand"),
        ([{"text": "1976", "answer_start": 10**6}], "does not stand at answer_start 1000000"),
        ([{"text": "1976", "answer_start": -4}], "does not stand"),
        ([{"text": " ", "answer_start": 3}], "should be a text and an integer"),
        ([{"text": "1976"}], "objects with text and answer_start"),
        ("1976", "objects with text and answer_start"),
    ],
)
def test_a_wrong_answer_is_named(tmp_path, answers, problem):
    row = {"id": "q", "question": "When?", "context": CONTEXT, "answers": answers}
    (found,) = read(write_rows(tmp_path / "a.jsonl", [row]))
    assert problem in found.problem and found.place.endswith("a.jsonl:1")
    if "10" not in str(answers):
        (tmp_path / "a.json").write_text(json.dumps(nested(row)))
        assert "question 'q'" in read(tmp_path / "a.json")[0].place


# Encoding and answering


@pytest.mark.parametrize(("length", "stride"), [(20, 5), (48, 16), (48, 300), (512, 128)])
def test_features_cover_the_context(tokenizer, length, stride):
    features = encode_question(tokenizer, "  Who was born?", CONTEXT, length, stride)
    whole = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)
    covered = set()
    room = length - len(tokenizer("Who was born?")["input_ids"]) - 1
    for i, feature in enumerate(features):
        assert len(feature.input_ids) == len(feature.offsets) <= length
        assert feature.input_ids[0] == tokenizer.cls_token_id and feature.offsets[0] == (-1, -1)
        inside = [(a, b) for a, b in feature.offsets if a >= 0]
        assert inside[0] == whole["offset_mapping"][i * min(stride, room)]
        covered |= set(inside)
        kinds = [int(a >= 0) for a, _ in feature.offsets]
        assert feature.token_type_ids[:-1] == kinds[:-1]  # the last is [SEP]
    assert covered == set(whole["offset_mapping"])


def test_long_questions_and_empty_texts(tokenizer):
    (feature,) = encode_question(tokenizer, "Who? " * 300, "He.", 32, 16)
    assert len(feature.input_ids) <= 32 and (0, 2) in feature.offsets
    (feature,) = encode_question(tokenizer, "", "", 32, 16)
    logits = np.zeros(len(feature.input_ids))
    answer = answer_question("", [feature], [logits], [logits])
    assert answer.text == "" and answer.start == -1 and answer.score == -np.inf
    with pytest.raises(ValueError, match="no room"):
        encode_question(tokenizer, "Who?", "He.", 3, 16)


def test_every_answer_is_found_where_it_is_whole(tokenizer):
    features = encode_question(tokenizer, "What?", CONTEXT, 40, 16)
    for text in ("1976", "Zoë", "Old English Sheepdog", " near   the ", "an Old", "eep", "Thames."):
        start = CONTEXT.index(text, 150)
        clean, at = text.strip(), start + len(text) - len(text.lstrip())
        whole = 0
        for feature in features:
            first, last = find_answer(feature, text, start)
            pairs = [pair for pair in feature.offsets if pair[0] >= 0]
            inside = pairs[0][0] <= at and at + len(clean) <= pairs[-1][1]
            assert inside == (last > 0)
            if inside:
                whole += 1
                found = CONTEXT[feature.offsets[first][0] : feature.offsets[last][1]]
                assert clean in found and len(found) <= len(clean) + 8
        assert whole


def test_best_span_is_that_of_all_spans():
    rng = np.random.default_rng(0)
    for most in (1, 3, 50):
        starts, ends = rng.standard_normal((2, 6, 12))
        offsets = np.full((6, 12, 2), -1)
        for i in range(5):  # the last feature has no context
            offsets[i, 4 : 6 + i] = [[7, 9]] * (2 + i)
        scores, first, last = best_spans(starts, ends, offsets, most)
        for i in range(6):
            spans = [
                (starts[i, a] + ends[i, b], a, b)
                for a, b in itertools.product(range(12), repeat=2)
                if a <= b < a + most and offsets[i, a, 0] >= 0 and offsets[i, b, 0] >= 0
            ]
            assert (scores[i], first[i], last[i]) == max(spans, default=(-np.inf, 0, 0))


def test_the_answer_is_the_best_of_all_features(tokenizer):
    features = encode_question(tokenizer, "When?", CONTEXT, 40, 16)
    rng = np.random.default_rng(1)
    starts, ends = ([rng.standard_normal(40) for _ in features] for _ in range(2))
    at = next(i for i, (a, b) in enumerate(features[2].offsets) if CONTEXT[a:b] == "1976")
    starts[2][at] = ends[2][at] = 9.0
    answer = answer_question(CONTEXT, features, starts, ends)
    assert answer.text == "1976" == CONTEXT[answer.start : answer.end] and answer.score == 18
    assert answer.null_score == min(s[0] + e[0] for s, e in zip(starts, ends, strict=True))
    apart = answer.null_score - answer.score
    none = answer_question(CONTEXT, features, starts, ends, null_threshold=apart - 0.1)
    assert none.text == "" and none.start == none.end == -1
    same = answer_question(CONTEXT, features, starts, ends, null_threshold=apart + 0.1)
    assert same == answer
