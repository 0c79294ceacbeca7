"""Model cards: the hub's format, code that runs, and what a source's card keeps."""

import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertConfig

import m2_plugin.models
from m2_plugin.checkpoints.card import metadata_of, new_card, shown_name, table
from m2_plugin.cli import main
from m2_plugin.models import M2BertForMaskedLM, M2BertForTextEmbedding
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER

TASKS = {
    "M2BertForMaskedLM": "fill-mask",
    "M2BertForSequenceClassification": "text-classification",
    "M2BertForTokenClassification": "token-classification",
    "M2BertForQuestionAnswering": "question-answering",
    "M2BertForMultipleChoice": None,
    "M2BertForTextEmbedding": "feature-extraction",
    "M2BertModel": "feature-extraction",
}


def source(tmp_path, cls=M2BertForMaskedLM, card=None):
    folder = tmp_path / "secret-place" / "mine"
    cls(small(vocab_size=30522)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run(codes, folder):
    done = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
        )
        for code in codes
    ]
    assert all(run.returncode == 0 for run in done), [run.stderr[-2000:] for run in done]


@pytest.mark.parametrize("architecture", TASKS)
def test_the_metadata_are_what_is_known(architecture):
    config = small(mask_padding=True, architectures=[architecture])
    card = ModelCard(new_card("mine", config, 12345, license=None, language="en"))
    assert card.data.to_dict() == {
        key: value
        for key, value in {
            "library_name": "transformers",
            "language": "en",
            "pipeline_tag": TASKS[architecture],
            "tags": ["m2_bert"],
        }.items()
        if value
    }
    for row in ("| Parameters | 12,345 |", "| Longest input | 24 tokens |", "| Layers | 2 |"):
        assert row in card.text
    assert "must be cut" in card.text and "see padding" not in card.text
    assert "arxiv.org/abs/2310.12109" in card.text
    auto = re.search(r"model = (\w+)\.from_pretrained", card.text)[1]
    assert auto.startswith("AutoModel") and ("For" in auto) == ("For" in architecture)


def test_a_card_of_another_model_says_nothing_of_ours():
    config = BertConfig(architectures=["BertForMaskedLM"])
    card = new_card("b", config, 1)
    assert "m2_plugin" not in card and "Monarch" not in card and "A model of type `bert`" in card


def test_an_import_an_extension_and_an_export_tell_their_story(tmp_path):
    folder = source(tmp_path)
    names = ["imported", "longer", "hub"]
    imported, longer, hub = (tmp_path / name for name in names)
    assert main(["import", str(folder), "--out", str(imported)]) == 0
    assert main(["extend", str(imported), "--max-seq-len", "48", "--out", str(longer)]) == 0
    assert main(["export", str(longer), "--hub", str(hub)]) == 0
    card = (hub / "README.md").read_text()
    titles = re.findall(r"^#+ (.*)$", card, re.MULTILINE)
    assert titles == [
        *("imported", "Use", "Import", "Limits", "Citation", "Extension", "Use without m2_plugin")
    ]
    assert "from `mine`" in card and "secret-place" not in card and str(tmp_path) not in card
    assert "to 48 tokens from `imported` (method `continue`)" in card
    assert "license" not in card.lower()
    assert len(snippets(card)) == 2
    run(snippets(card), hub)


def test_a_card_that_is_there_stays(tmp_path):
    text = "---\nlicense: mit\ntags:\n- mine\n---\n\n# A model\n\nWords of mine.\n"
    folder = source(tmp_path, M2BertForTextEmbedding, text)
    for command in (
        ["import", "--out"],
        ["export", "--hub"],
        ["extend", "--max-seq-len=48", "--out"],
    ):
        out = tmp_path / command[0]
        assert main([command[0], str(folder), *command[1:], str(out)]) == 0
        card = (out / "README.md").read_text()
        assert card.startswith(text) and card.count("\n## ") == 1
        assert metadata_of(out) == {"license": "mit"}


def test_no_card_is_no_metadata(tmp_path):
    assert metadata_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert metadata_of(tmp_path) == {}


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert shown_name("someone/model") == "someone/model"
    assert shown_name("runs/mine/") == shown_name(tmp_path / "runs" / "mine") == "mine"
    assert shown_name("s3://key:secret@bucket/runs/data?token=1") == "data"


def test_tables_have_no_unknown_values_and_no_broken_rows():
    text = table({"a": 1000, "b": None, "c": "x|y\nz", "d": True, "e": []})
    assert text.splitlines()[2:] == ["| a | 1,000 |", "| c | x\\|y z |", "| d | True |"]


def test_every_head_has_a_class_of_transformers():
    for name in TASKS:
        assert hasattr(m2_plugin.models, name)
