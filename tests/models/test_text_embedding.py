"""Embeddings of texts: pooling, normalisation, padding, and the same from sentence-transformers."""

import pytest
import torch
from transformers import AutoModelForTextEncoding, AutoTokenizer

from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.extend import extend_folder
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
