import random
import socket

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import m2_plugin.data.tokenizer as tokenizer_module
from m2_plugin.data.formats import DataError
from m2_plugin.data.tokenizer import (
    HubError,
    load_tokenizer,
    shorten,
    vocabulary_digest,
    vocabulary_size,
)
from tests.utils import TOKENIZER


def test_tokenizer_json_alone(tmp_path):
    whole = AutoTokenizer.from_pretrained(TOKENIZER)
    whole.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox, naïve"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == whole(text)["input_ids"]
    assert load_tokenizer(tmp_path).mask_token_id == whole.mask_token_id
    assert load_tokenizer(TOKENIZER)(text)["input_ids"] == whole(text)["input_ids"]


@pytest.mark.parametrize("name", ["tmpt3x9k2", "gpt2-like", "bert", "t5"])
def test_a_folders_name_does_not_choose_the_class(tmp_path, name):
    """transformers alone guesses: in `tmpt3x9k2` it finds `mpt`, and takes MPT's tokenizer."""
    folder = tmp_path / name
    folder.mkdir()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "he": 1, "[PAD]": 2}, unk_token="[UNK]"))
    words.save(str(folder / "tokenizer.json"))
    found = load_tokenizer(folder)
    assert type(found) is PreTrainedTokenizerFast and len(found) == 3
    assert (found.pad_token, found.cls_token) == ("[PAD]", None)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 7, "pad_token": "he"}')
    found = load_tokenizer(folder)
    assert type(found) is PreTrainedTokenizerFast and len(found) == 3
    assert (found.pad_token, found.model_max_length) == ("he", 7)


def test_a_model_that_transformers_does_not_know(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "he": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "of_another_time"}')
    found = load_tokenizer(tmp_path)
    assert type(found) is PreTrainedTokenizerFast and found.get_vocab() == {"[UNK]": 0, "he": 1}


def test_what_is_missing_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"\(the folder has no tokenizer.json and no tok") as found:
        load_tokenizer(tmp_path)
    assert len(str(found.value)) < 300
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json' is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"'/no/such' has no tokenizer that can be loaded") as found:
        load_tokenizer("/no/such")
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    """transformers alone asks for each file, and waits for each."""
    server = socket.create_server(("127.0.0.1", 0))  # takes connections, and says nothing
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    url = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tokenizer_module, "HUB_TIMEOUT_S", 0.1)
    with pytest.raises(HubError, match=r"'an-owner/a-name' cannot be reached") as found:
        load_tokenizer("an-owner/a-name", cache_dir=tmp_path)
    assert "\n" not in str(found.value)
    server.close()


def test_a_vocabulary_with_gaps():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert vocabulary_size(tokenizer) == len(tokenizer) == 30522
    digest = vocabulary_digest(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ONE]"]})
    assert vocabulary_digest(tokenizer) == digest
    tokenizer.get_vocab = lambda: {"a": 0, "b": 9}
    assert vocabulary_size(tokenizer) == 10
    assert vocabulary_digest(tokenizer) != digest


# --- giant texts ---------------------------------------------------------------------------------

ALPHABETS = [
    ["the", "film", "was", "good", ".", "!", "[MASK]", "[SEP]", "don't", "3.14"],
    ["naïve", "Ünïcode", "e\u0301\u0301\u0301", "a\u0300", "\u0301"],
    ["👩‍👩‍👧", "🏳️‍🌈", "😀", "\u200d", "\ufe0f"],
    ["海", "空", "日本語", "の", "。"],
    ["x" * 150, "Donaudampfschifffahrt", "a", "\u00a0", "\x00", "\n", "\t"],
]


def giant_text(rng, limit):
    """Words of one kind, with single spaces, runs of spaces, or none between them."""
    words = rng.choice(ALPHABETS)
    gaps = rng.choice([[" "], [""], [" ", " " * 90], ["", "", " "], ["\n", "  \n \n "]])
    text, size = " " * rng.choice([0, 0, 30 * limit]), limit * rng.choice([9, 35, 60])
    while len(text) < size:
        text += rng.choice(words) + rng.choice(gaps)
    return text


def trained(model, trainer, pre_tokenizer):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    texts = [" ".join(words) for words in ALPHABETS] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture(scope="module", params=["quickstart", "wordpiece", "bytes", "unigram", "no words"])
def fast(request):
    special = ["[UNK]", "[MASK]", "[SEP]"]
    if request.param == "quickstart":
        return load_tokenizer(TOKENIZER)
    if request.param == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
        return trained(
            models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.WhitespaceSplit()
        )
    if request.param == "bytes":
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
        return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    if request.param == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="[UNK]")
        return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    return trained(models.BPE(unk_token="[UNK]"), trainer, None)


@pytest.mark.parametrize(("sides", "limit"), [(1, 3), (1, 16), (2, 15), (2, 16)])
def test_a_giant_text_is_cut_and_its_tokens_stay(fast, sides, limit, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LAST_WORDS", 8)  # so that shorter texts are cut
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 200)
    rng, cut = random.Random(0), 0
    limit += fast.num_special_tokens_to_add(pair=sides == 2)
    for _ in range(60 if sides == 1 else 20):
        texts = tuple(giant_text(rng, limit) for _ in range(sides))
        how = {"truncation": "longest_first", "max_length": limit, "return_token_type_ids": True}
        shorter = shorten(fast, texts, limit)
        cut += shorter != texts
        assert all(text.startswith(short) for text, short in zip(texts, shorter, strict=True))
        expected, found = fast(*texts, **how), fast(*shorter, **how)
        assert dict(found) == dict(expected), texts
        longer = [bool(encoded.encodings[0].overflowing) for encoded in (expected, found)]
        assert longer[0] == longer[1]
    assert cut > 5 or fast.backend_tokenizer.pre_tokenizer is None


def test_texts_that_stay_whole():
    tokenizer, text = load_tokenizer(TOKENIZER), "a long text " * 10_000
    assert shorten(tokenizer, [text], 16) != (text,)
    assert shorten(tokenizer, [text], None) == (text,)
    assert shorten(tokenizer, [text], len(text)) == (text,)
    assert shorten(load_tokenizer(TOKENIZER, use_fast=False), [text], 16) == (text,)
    assert shorten(load_tokenizer(TOKENIZER, truncation_side="left"), [text], 16) == (text,)
