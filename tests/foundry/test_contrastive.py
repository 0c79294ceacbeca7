"""The contrastive model: its losses against hand computation, its data, what it starts from."""

import math

import pytest
import torch
import torch.nn.functional as F
from llmfoundry.utils.builders import build_composer_model, build_dataloader

from m2_plugin.foundry.contrastive import orthogonal_projection_loss
from m2_plugin.foundry.conversion.pairs import main_pairs
from m2_plugin.models import M2BertForMaskedLM
from tests.utils import write_rows

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "hyena_filter_order": 8,
    "hidden_dropout_prob": 0.0,
    "max_position_embeddings": 32,
    "long_conv_l_max": 32,
    "mask_padding": True,
    "classifier_pooling": "mean",
}


def build(tokenizer, **keys):
    torch.manual_seed(0)
    overrides = TINY | keys.pop("config_overrides", {})
    return build_composer_model(
        "m2_bert_contrastive", {"config_overrides": overrides, **keys}, tokenizer
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory, sentences):
    """Splits `pairs` (no negatives) and `hard` (two)."""
    root = tmp_path_factory.mktemp("pairs")
    rows = [{"query": a, "passage": b} for a, b in zip(sentences, sentences[1:], strict=False)]
    write_rows(root / "pairs.jsonl", rows[:24])
    hard = [row | {"negatives": sentences[i : i + 2]} for i, row in enumerate(rows[24:48])]
    write_rows(root / "hard.jsonl", hard)
    files = [f"{split}={root / split}.jsonl" for split in ("pairs", "hard")]
    assert main_pairs(["--out_root", str(root / "mds"), "--local_files", *files]) == 0
    return root / "mds"


def load(shards, split, tokenizer, batch_size=4):
    dataset = {"local": str(shards), "split": split, "shuffle": False, "max_seq_len": 32}
    plain = {"prefetch_factor": None, "persistent_workers": False, "pin_memory": False}
    config = {"name": "contrastive_pairs", "dataset": dataset, "drop_last": True, "num_workers": 0}
    return build_dataloader(config | plain, tokenizer, batch_size).dataloader


@pytest.fixture
def batches(shards, tokenizer):
    return {split: next(iter(load(shards, split, tokenizer))) for split in ("pairs", "hard")}


def cosines(model, batch):
    """(Q, N) as a user would compute them, text by text, from the model inside."""
    rows, texts = batch["input_ids"].shape[:2]
    vectors = []
    for row in range(rows):
        for text in range(texts):
            length = int(batch["attention_mask"][row, text].sum())
            ids = batch["input_ids"][row, text, :length]
            vectors.append(model.model(ids[None]).sentence_embedding[0])
    vectors = F.normalize(torch.stack(vectors), dim=-1).view(rows, texts, -1)
    return vectors[:, 0] @ vectors[:, 1:].flatten(0, 1).T


@pytest.mark.parametrize("split", ["pairs", "hard"])
@pytest.mark.parametrize("normalize", [True, False])
def test_infonce_is_that_of_the_models_own_embeddings(tokenizer, batches, split, normalize):
    model = build(
        tokenizer,
        contrastive_config={"temperature": 0.1},
        config_overrides={"normalize_embeddings": normalize},
    )
    batch = batches[split]
    found = cosines(model, batch)
    each = found.shape[1] // 4  # passages of a query: its own first
    assert each == {"pairs": 1, "hard": 3}[split]
    expected = (
        sum(torch.logsumexp(found[q] / 0.1, 0) - found[q, q * each] / 0.1 for q in range(4)) / 4
    )
    loss = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_orthogonal_projection_by_hand(tokenizer, batches):
    found = torch.tensor([[0.9, 0.2, -0.4, 0.1], [0.3, 0.0, -0.5, -0.1]])
    loss = orthogonal_projection_loss(found, torch.tensor([0, 2]), 0.5)
    assert loss.item() == pytest.approx((0.1 + 1.5) / 2 + 0.5 * (0.2 + 0.4 + 0.1 + 0.3 + 0.1) / 6)
    alone = orthogonal_projection_loss(found[:1, :1], torch.tensor([0]), 1.0)
    assert alone.item() == pytest.approx(0.1)

    # The temperature is InfoNCE's: here the cosines themselves count.
    model = build(tokenizer, loss="orthogonal_projection", contrastive_config={"temperature": 0.1})
    expected = orthogonal_projection_loss(
        cosines(model, batches["hard"]), torch.tensor([0, 3, 6, 9]), 1.0
    )
    loss = model.loss(model(batches["hard"]), batches["hard"])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["infonce", "orthogonal_projection"])
def test_learns(tokenizer, batches, loss):
    """One query with its negatives is enough; every parameter takes part."""
    model = build(tokenizer, loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        one = {key: tensor[:1] for key, tensor in batches["hard"].items()}
        optimizer.zero_grad()
        value = model.loss(model(one), one)
        value.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        own, *others = cosines(model, {k: v[:1] for k, v in batches["hard"].items()})[0].tolist()
    assert own > max(others) + 0.2


def test_evaluation_may_have_other_negatives_than_training(tokenizer, batches):
    model = build(tokenizer)
    for split, per_query in (("hard", 3), ("pairs", 1), ("hard", 3)):
        batch = dict(batches[split])
        scores, labels = model._compute_scores(batch, model(batch))
        assert scores.shape == (4, 4 * per_query)
        assert labels.tolist() == [per_query * q for q in range(4)]


def test_one_pair_alone_is_refused_while_training_only(tokenizer, batches):
    for loss in ("infonce", "orthogonal_projection"):
        model = build(tokenizer, loss=loss)
        one = {key: tensor[:1] for key, tensor in batches["pairs"].items()}
        with pytest.raises(ValueError, match="device_train_microbatch_size"):
            model.loss(model(one), one)
        assert math.isfinite(model.eval().loss(model(one), one).item())


def test_starts_from_a_pretraining_with_a_new_pooler(tokenizer, tmp_path, caplog):
    model = build(tokenizer)
    start = M2BertForMaskedLM(model.model.config)
    start.save_pretrained(tmp_path)
    tuned = build_composer_model(
        "m2_bert_contrastive",
        {"pretrained_model_name_or_path": str(tmp_path), "config_overrides": {}},
        tokenizer,
    )
    state = tuned.model.state_dict()
    for name, tensor in start.model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], tensor), name
    assert "pooler.dense.weight" in caplog.text
    assert state["pooler.dense.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "triplet"}, "model.loss must be infonce or orthogonal_projection, got 'triplet'"),
        (
            {"contrastive_config": {"temprature": 1}},
            "Unknown key 'temprature' in .* Did you mean 'temperat",
        ),
        ({"contrastive_config": {"vector_representation": "eos"}}, "classifier_pooling"),
        (
            {"loss": "orthogonal_projection", "contrastive_config": {"normalize_output": False}},
            "normalize_output",
        ),
        ({"config_overrides": {"vocab_size": 100}}, "vocab_size 104 is smaller"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no folder './nowhere'"),
    ],
)
def test_refuses_by_name(tokenizer, keys, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, **keys)
