import socket

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

import m2_plugin.data.tokenizer as tokenizer_module
from m2_plugin.data.formats import DataError
from m2_plugin.data.tokenizer import (
    HubError,
    load_tokenizer,
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
