"""Reading of sentences with tags, the entities in tags, and windows of long sentences."""

import gzip
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from m2_plugin.data.formats import DataError
from m2_plugin.data.token_labels import (
    Entity,
    are_entity_tags,
    encode_words,
    entities,
    read_sentences,
    tag_names,
    word_predictions,
)
from tests.utils import TOKENIZER, write_rows

CONLL = """-DOCSTART- -X- O O

EU NNP B-ORG
rejects VBZ O

# 12
Zoë NNP B-PER
 van  IN   I-PER\r

# NN O

"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def read(path, **how) -> list:
    return list(read_sentences(str(path), **how))


# Entities


def tags(prefixes: str, types: list[str], rng: random.Random, length: int) -> list[str]:
    drawn = [rng.choice(prefixes) for _ in range(length)]
    return [p if p == "O" else f"{p}-{rng.choice(types)}" for p in drawn]


@pytest.mark.parametrize("prefixes", ["OBI", "OI", "OBIES", "OBBBS", "OEIS", "IE"])
def test_entities_are_seqevals(prefixes):
    """In any sequence of tags, right or wrong; seqeval's ends are those of the last word."""
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    rng = random.Random(prefixes)
    for _ in range(500):
        drawn = tags(prefixes, ["PER", "LOC", "x-y"], rng, rng.randrange(12))
        expected = [(kind, start, end + 1) for kind, start, end in labeling.get_entities(drawn)]
        assert entities(drawn) == expected, drawn


def test_entities_of_each_scheme():
    per, loc = Entity("PER", 0, 2), Entity("LOC", 2, 3)
    assert entities(["B-PER", "I-PER", "B-LOC", "O"]) == [per, loc]  # IOB2
    assert entities(["I-PER", "I-PER", "I-LOC", "O"]) == [per, loc]  # IOB1
    assert entities(["I-PER", "B-PER"]) == [Entity("PER", 0, 1), Entity("PER", 1, 2)]
    assert entities(["B-PER", "E-PER", "S-LOC", "O"]) == [per, loc]  # BIOES
    assert entities(["B-PER", "L-PER", "U-LOC", "U-LOC"]) == [per, loc, Entity("LOC", 3, 4)]
    assert entities(["B", "I", "O"]) == [Entity("_", 0, 2)]
    assert entities([]) == entities(["O", "O"]) == []


# Reading


def test_reads_conll(tmp_path):
    found = read(write(tmp_path / "a.conll", CONLL))
    assert [s.words for s in found] == [["EU", "rejects"], ["Zoë", "van"], ["#"]]
    assert [s.tags for s in found] == [["B-ORG", "O"], ["B-PER", "I-PER"], ["O"]]
    assert not any(s.problem for s in found)
    assert found[1].place == f"{tmp_path}/a.conll:7" and found[1].place_of(1).endswith(":8")


def test_reads_compressed_crlf_and_tabs(tmp_path):
    text = "\ufeffNew York\tB-LOC\r\n\u00a0\tO\r\n\r\n\r\n#\tO\r\n\u200b\tO"
    path = tmp_path / "a.bio.gz"
    path.write_bytes(gzip.compress(text.encode()))
    found = read(path)
    assert [s.words for s in found] == [["New York", "\u00a0"], ["#", "\u200b"]]
    assert [s.tags for s in found] == [["B-LOC", "O"], ["O", "O"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a O\nb\n", ":2: 'b' has no tag"),
        ("a X O\nb O\n", ":2: 2 columns where there should be 3"),
        ("a\tO\n\tO\n", ":2: column 0 is empty"),
        ("a\tO\nb\t\n", ":2: column -1 is empty"),
    ],
)
def test_a_broken_line_is_named_and_only_its_sentence_is_lost(tmp_path, text, problem):
    path = write(tmp_path / "a.conll", text + "c O\n\nd" + " X" * text.count(" X") + " O\n")
    first, second = read(path)
    assert f"{first.place}: {first.problem}".startswith(f"{path}{problem}")
    assert second.problem == "" and second.words == ["d"]


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.iob"
    path.write_bytes(b"a O\n\xff O\n\nb O\n")
    first, second = read(path)
    assert first.place == f"{path}:2" and "UTF-8" in first.problem and second.words == ["b"]


def test_columns_of_conll_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.conll", "1 EU NNP B-ORG\n2 .  . O\n")
    (chosen,) = read(path, tokens_column=1, tags_column=2)
    assert (chosen.words, chosen.tags) == (["EU", "."], ["NNP", "."])
    (unlabelled,) = read(write(tmp_path / "b.conll", "EU\nrejects\n"), tags_column=None)
    assert (unlabelled.words, unlabelled.tags) == (["EU", "rejects"], [])
    assert "no column 5" in read(path, tags_column=5)[0].problem


def test_reads_rows(tmp_path):
    rows = [
        {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a"], "tags": ["O", "O"]},
        {"tokens": "a b", "tags": ["O"]},
        {"tokens": ["a"]},
        {"tokens": ["a", 3], "tags": [0, 1]},
        {"tokens": ["a"], "tags": [None]},
    ]
    found = read(write_rows(tmp_path / "a.jsonl", rows))
    assert found[0].tags == ["O", "B-X"] and found[0].place_of(1).endswith("a.jsonl:1, word 1")
    assert found[1].words == [] and not found[1].problem
    for sentence, problem in zip(
        found[2:],
        [
            "1 words but 2 tags",
            "should be a list",
            "no column 'tags'",
            "should be a text",
            "no tag",
        ],
        strict=True,
    ):
        assert problem in sentence.problem
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "none.conll")


def test_classes_of_saved_datasets_become_names(tmp_path):
    names = ["O", "B-X", "I-X"]
    features = datasets.Features(
        {
            "words": datasets.Sequence(datasets.Value("string")),
            "ner": datasets.Sequence(datasets.ClassLabel(names=names)),
        }
    )
    saved = datasets.Dataset.from_dict({"words": [["a", "b"]], "ner": [[1, 0]]}, features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        (sentence,) = read(path, tokens_column="words", tags_column="ner")
        assert sentence.tags == ["B-X", "O"]
        source = [{"path": str(path), "column": "ner"}]
        assert tag_names(source, "label_names", "words") == sorted(names)  # I-X does not occur


# Names


def test_names_come_from_the_data(tmp_path):
    path = str(write(tmp_path / "a.conll", CONLL))
    source = {"path": path, "column": "tags"}
    assert tag_names([source], "label_names") == ["B-ORG", "B-PER", "I-PER", "O"]
    assert tag_names(["O", "B-X"], "label_names") == ["O", "B-X"]
    assert tag_names(None, "label_names") is None
    assert are_entity_tags(["O", "B-X", "B"]) and not are_entity_tags(["O", "NN"])


def test_a_misspelt_tag_is_named_with_its_line(tmp_path):
    path = str(write(tmp_path / "a.conll", "a B-PER\nb IPER\nc O\n"))
    with pytest.raises(ValueError, match=r"a\.conll:2: the tag 'IPER' is not one of an entity"):
        tag_names([{"path": path, "column": "tags"}], "label_names")


# Windows


@pytest.mark.parametrize("length", [4, 7, 16, 50])
def test_windows_decide_each_word_once(tokenizer, length):
    rng = random.Random(length)
    vocabulary = ["he", "Obergefreiter", "\u200b", "", "x" * 90, "…", "naïve", "日本", "\u00ad"]
    for n in (0, 1, 2, 5, 40):
        words = [rng.choice(vocabulary) for _ in range(n)]
        windows = encode_words(tokenizer, words, length)
        decided = [w for window in windows for w in window.words if w >= 0]
        assert decided == list(range(n))
        for window in windows:
            assert len(window.input_ids) == len(window.words) <= length
            assert window.input_ids[0] == tokenizer.cls_token_id
            for token, word in enumerate(window.words):
                if word >= 0:  # the token is the first piece of its word
                    pieces = tokenizer(words[word], add_special_tokens=False)["input_ids"]
                    first = pieces[0] if pieces else tokenizer.unk_token_id
                    assert window.input_ids[token] == first


def test_neighbours_share_context(tokenizer):
    words = [str(i % 10) for i in range(40)]
    windows = encode_words(tokenizer, words, 18)  # 16 words
    sizes = [sum(w >= 0 for w in window.words) for window in windows]
    assert len(windows) == 3 and sum(len(w.words) - 2 for w in windows) == 40 + 2 * 4
    assert sizes == [14, 12, 14]  # the first and the last decide their outer words too


def test_predictions_are_put_together(tokenizer):
    words = ["he", "Obergefreiter", "\u200b"] * 9
    windows = encode_words(tokenizer, words, 12)
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((len(w.words) + 3, 5)) for w in windows]  # with padding
    found, shares = word_predictions(windows, logits)
    assert found.shape == shares.shape == (27,)
    for window, scores in zip(windows, logits, strict=True):
        for token, word in enumerate(window.words):
            if word >= 0:
                assert found[word] == scores[token].argmax()
                powers = np.exp(scores[token])
                assert np.isclose(shares[word], powers.max() / powers.sum())
    assert [part.shape for part in word_predictions([], [])] == [(0,), (0,)]
