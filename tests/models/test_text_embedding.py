"""Embeddings of texts: pooling, normalisation, padding, and the same from sentence-transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.extend import extend_folder
from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.checkpoints.hub import export_hub_folder
from m2_plugin.models import M2BertForTextEmbedding
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER

TEXTS = ["A ship.", "He did not know what to say, and so he said nothing at all.", "Rain", "No!"]


def embedder(**kwargs) -> M2BertForTextEmbedding:
    torch.manual_seed(0)
    fields = {"vocab_size": 30522, "mask_padding": True, "initializer_range": 0.2} | kwargs
    return M2BertForTextEmbedding(small(**fields)).eval()


def batch_of(texts, **kwargs):
    return AutoTokenizer.from_pretrained(TOKENIZER)(
        texts, return_tensors="pt", padding=True, **kwargs
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_and_normalisation(pooling, tmp_path):
    model = embedder(classifier_pooling=pooling, normalize_embeddings=True)
    batch = batch_of(TEXTS)
    with torch.no_grad():
        output = model(**batch)
        rows = []
        for hidden, mask in zip(output.last_hidden_state, batch["attention_mask"], strict=True):
            read = hidden[0] if pooling == "cls" else hidden[mask.bool()].mean(0)
            rows.append(torch.tanh(model.pooler.dense(read)))
    expected = torch.stack(rows)
    torch.testing.assert_close(output.pooler_output, expected, rtol=0, atol=1e-6)
    lengths = expected.norm(dim=1, keepdim=True)
    assert (lengths - 1).abs().min() > 1e-3  # normalising them does something
    torch.testing.assert_close(output.sentence_embedding, expected / lengths, rtol=0, atol=1e-6)
    model.config.normalize_embeddings = False
    with torch.no_grad():
        assert torch.equal(model(**batch).sentence_embedding, output.pooler_output)
        assert torch.equal(model(**batch, return_dict=False)[-1], output.pooler_output)

    model.config.normalize_embeddings = True
    model.save_pretrained(tmp_path / "model")
    export_hub_folder(tmp_path / "model", tmp_path / "hub")
    for folder in ("model", "hub"):
        loaded = AutoModelForTextEncoding.from_pretrained(tmp_path / folder).eval()
        assert loaded.config.normalize_embeddings and loaded.config.classifier_pooling == pooling
        with torch.no_grad():
            found = loaded(**batch).sentence_embedding
            torch.testing.assert_close(found, output.sentence_embedding, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_embedding_does_not_depend_on_its_batch(pooling):
    model = embedder(classifier_pooling=pooling)
    assert model.config.backend == "auto"
    with torch.no_grad():
        together = model(**batch_of(TEXTS)).sentence_embedding
        for text, row in zip(TEXTS, together, strict=True):
            alone = model(**batch_of([text])).sentence_embedding[0]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
            longest = batch_of([text, TEXTS[1]], pad_to_multiple_of=24)
            with_another = model(**longest).sentence_embedding[0]
            torch.testing.assert_close(row, with_another, rtol=0, atol=1e-5)
        # It is the mask that does it.
        model.config.mask_padding = False
        other = model(**batch_of(TEXTS)).sentence_embedding
        assert (other[0] - together[0]).abs().max() > 1e-4


def test_a_wrong_value_is_named():
    with pytest.raises(ValueError, match="normalize_embeddings must be true or false, not 'l2'"):
        small(normalize_embeddings="l2")


@pytest.mark.parametrize("pooling, normalize", [("cls", True), ("mean", False)])
def test_sentence_transformers_gives_the_same(pooling, normalize, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = embedder(classifier_pooling=pooling, normalize_embeddings=normalize)
    folders = [tmp_path / "saved", tmp_path / "imported", tmp_path / "extended"]
    model.save_pretrained(folders[0])
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folders[0])
    import_checkpoint(folders[0], folders[1])
    limit = model.config.max_sequence_length
    extend_folder(folders[0], folders[2], 2 * limit)
    texts = [*TEXTS, "rain " * 2 * limit]  # one that is cut
    for folder, length in zip(folders, (limit, limit, 2 * limit), strict=True):
        loaded = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        assert loaded.max_seq_length == length
        found = torch.from_numpy(loaded.encode(texts))
        ours = M2BertForTextEmbedding.from_pretrained(folder).eval()
        batch = batch_of(texts, truncation=True, max_length=length)
        with torch.no_grad():
            expected = ours(**batch).sentence_embedding
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def saved_by_sentence_transformers(folder, **fields):
    """A folder whose pooler lies in 2_Dense, changed as by training, and what it computes."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder(initializer_range=0.3, **fields).save_pretrained(folder / "ours")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "ours")
    model = sentence_transformers.SentenceTransformer(str(folder / "ours"), device="cpu")
    with torch.no_grad():
        model[2].linear.weight.mul_(1.5)
    model.save(str(folder / "theirs"))
    return torch.from_numpy(model.encode(TEXTS))


@pytest.mark.parametrize("pooling, normalize", [("cls", True), ("mean", False)])
def test_the_pooler_of_sentence_transformers_is_read(pooling, normalize, tmp_path, caplog):
    """By every model with a pooler; `load_folder`, and so `embed`, read it before."""
    fields = {"classifier_pooling": pooling, "normalize_embeddings": normalize}
    expected = saved_by_sentence_transformers(tmp_path, **fields)
    folder = tmp_path / "theirs"
    # A config that does not say it: the modules do, as for sentence-transformers.
    config = json.loads((folder / "config.json").read_text())
    config |= {"classifier_pooling": "cls", "normalize_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))

    loaded, info = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert "the pooler was read from sentence-transformers' modules" in caplog.text
    with torch.no_grad():
        found = loaded.eval()(**batch_of(TEXTS)).sentence_embedding
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForTextEncoding.from_pretrained(tmp_path / "again")
    assert all(getattr(again.config, key) == value for key, value in fields.items())

    config, weights = load_folder(folder)
    with torch.no_grad():
        found = build_model(M2BertForTextEmbedding, config, weights)(**batch_of(TEXTS))
    torch.testing.assert_close(found.sentence_embedding, expected, rtol=0, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(classifier.pooler.dense.weight, loaded.pooler.dense.weight)
    if pooling == "cls":
        other = AutoModelForTextEncoding.from_pretrained(folder, classifier_pooling="mean")
        assert other.pooler.pooling == other.config.classifier_pooling == "mean"


@pytest.mark.parametrize("change", ["activation", "width", "modules"])
def test_other_modules_are_no_pooler(change, tmp_path):
    """Then the pooler is new, as transformers says, and load_folder finds none."""
    saved_by_sentence_transformers(tmp_path)
    folder = tmp_path / "theirs"
    if change == "modules":
        modules = json.loads((folder / "modules.json").read_text())[:1]
        (folder / "modules.json").write_text(json.dumps(modules))
    elif change == "activation":
        path = folder / "2_Dense" / "config.json"
        config = json.loads(path.read_text()) | {"activation_function": "torch.nn.GELU"}
        path.write_text(json.dumps(config))
    else:
        narrow = {"linear.weight": torch.zeros(8, 16), "linear.bias": torch.zeros(8)}
        save_file(narrow, folder / "2_Dense" / "model.safetensors")
    _, info = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(name.startswith("pooler.") for name in load_folder(folder)[1])


def test_modules_without_a_dense_are_embeddings_without_a_pooler(tmp_path):
    """The config does not say it; classifiers still get a new pooler."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    saved_by_sentence_transformers(tmp_path)
    folder = tmp_path / "theirs"
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))
    loaded, info = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not loaded.config.embedding_pooler
    served = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    expected = torch.from_numpy(served.encode(TEXTS))
    with torch.no_grad():
        found = loaded.eval()(**batch_of(TEXTS)).sentence_embedding
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForTextEncoding.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch_of(TEXTS)).sentence_embedding, found)
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert "pooler.dense.weight" in info["missing_keys"]


@pytest.mark.parametrize("path", ["../elsewhere", "/elsewhere"])
def test_modules_outside_of_the_folder_are_not_read(path, tmp_path):
    saved_by_sentence_transformers(tmp_path)
    file = tmp_path / "theirs" / "modules.json"
    modules = json.loads(file.read_text())
    modules[2]["path"] = path
    file.write_text(json.dumps(modules))
    for load in (AutoModelForTextEncoding.from_pretrained, load_folder):
        with pytest.raises(ValueError, match=f"names '{path}', which is not in its folder"):
            load(tmp_path / "theirs")


def test_a_module_that_is_not_whole_is_named(tmp_path):
    saved_by_sentence_transformers(tmp_path)
    (tmp_path / "theirs" / "2_Dense" / "model.safetensors").unlink()
    for load in (AutoModelForTextEncoding.from_pretrained, load_folder):
        with pytest.raises(ValueError, match="names a Dense, and there is no 2_Dense/model.safe"):
            load(tmp_path / "theirs")
    (tmp_path / "theirs" / "1_Pooling" / "config.json").write_text("{")
    for load in (AutoModelForTextEncoding.from_pretrained, load_folder):
        with pytest.raises(ValueError, match="1_Pooling/config.json' cannot be read as JSON"):
            load(tmp_path / "theirs")
