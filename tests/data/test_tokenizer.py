import pytest
from transformers import AutoTokenizer

from m2_plugin.data.formats import DataError
from m2_plugin.data.tokenizer import load_tokenizer
from tests.utils import TOKENIZER


def test_tokenizer_json_alone(tmp_path):
    whole = AutoTokenizer.from_pretrained(TOKENIZER)
    whole.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox, naïve"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == whole(text)["input_ids"]
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
