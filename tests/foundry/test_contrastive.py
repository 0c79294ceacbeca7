"""The contrastive model: its losses against hand computation, its data, what it starts from.

`test_fsdp.py` has it on several processes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from llmfoundry.utils.builders import build_composer_model, build_dataloader
from torch.distributed._tools.mem_tracker import MemTracker

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


def test_orthogonal_projection_is_the_error_of_cosines(tokenizer, batches):
    """The mean over pairs as they were published: each negative, and its passage once more."""
    found = torch.tensor([[0.9, 0.2, -0.4], [0.3, 0.0, -0.5]])
    pairs = [(row[0], 1) for row in found for _ in row[1:]]
    pairs += [(cosine, 0) for row in found for cosine in row[1:]]
    expected = sum((cosine - label) ** 2 for cosine, label in pairs) / len(pairs)
    assert orthogonal_projection_loss(found).item() == pytest.approx(expected.item())
    assert orthogonal_projection_loss(found[:1, :1]).item() == pytest.approx(0.01)

    # The temperature is InfoNCE's, and a query has its own negatives only.
    model = build(tokenizer, loss="orthogonal_projection", contrastive_config={"temperature": 0.1})
    each = cosines(model, batches["hard"]).view(4, 4, 3)
    expected = orthogonal_projection_loss(each[range(4), range(4)])
    loss = model.loss(model(batches["hard"]), batches["hard"])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# --- the gradient cache --------------------------------------------------------------------------


def step(model, batch):
    """The loss of a training step, and its gradients."""
    batch = dict(batch)
    loss = model.loss(model(batch), batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", ["infonce", "orthogonal_projection"])
@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_mini_batches_give_loss_and_gradient_of_the_batch(tokenizer, batches, loss, size):
    keys = {"loss": loss, "contrastive_config": {"temperature": 0.05}}
    expected, gradients = step(build(tokenizer, **keys), batches["hard"])
    found, others = step(build(tokenizer, mini_batch_size=size, **keys), batches["hard"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in others.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_both_passes_have_the_same_dropout(tokenizer, batches, monkeypatch, precision):
    """The gradient is that of the loss, as if all mini-batches had been kept."""
    keys = {"mini_batch_size": 5, "config_overrides": {"hidden_dropout_prob": 0.2}}
    results = []
    for kept in (False, True):
        model = build(tokenizer, **keys)
        if kept:
            monkeypatch.setattr(
                "m2_plugin.foundry.contrastive.checkpoint", lambda f, *a, use_reentrant: f(*a)
            )
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            results.append(step(model, batches["hard"]))
        after = torch.rand(1)
        results[-1][1]["the next number"] = after
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def most_memory(model, batch):
    """The most bytes that live at a time in a step, without weights, gradients and the batch."""
    outside = sum(tensor.nbytes for tensor in batch.values())
    outside += sum(parameter.nbytes for parameter in model.parameters())
    tracker = MemTracker()
    tracker.track_external(model, *batch.values())
    with tracker:
        step(model, batch)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - outside


def test_memory_is_that_of_a_mini_batch(tokenizer):
    """16 times as many queries add their embeddings and scores, but no activations."""

    def growth(**keys):
        found = []
        for queries in (32, 512):
            ids = torch.randint(1000, 2000, (queries, 2, 32))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append(most_memory(build(tokenizer, **keys), batch))
        return found[1] - found[0], found[1] / found[0]

    whole, cached = growth(), growth(mini_batch_size=64)
    assert whole[1] > 8 and cached[1] < 2
    assert cached[0] < whole[0] / 10


def test_in_training_negatives_are_those_of_the_microbatch(tokenizer, shards):
    """The trainer's step: a whole batch in mini-batches; microbatches have fewer negatives."""
    weights = {}
    for micro, mini, loss in (
        (8, None, "infonce"), (8, 3, "infonce"), (2, None, "infonce"),
        (8, 5, "orthogonal_projection"), (2, None, "orthogonal_projection"),
    ):  # fmt: skip
        model = build(tokenizer, loss=loss, mini_batch_size=mini)
        run = Trainer(
            model=model,
            train_dataloader=load(shards, "hard", tokenizer, batch_size=8),
            optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
            max_duration="1ba",
            device="cpu",
            precision="fp32",
            device_train_microbatch_size=micro,
            progress_bar=False,
            seed=0,
        )
        run.fit()
        run.close()
        weights[micro, mini, loss] = model.state_dict()

    def difference(a, b):
        return max((weights[a][n] - w).abs().max().item() for n, w in weights[b].items())

    assert difference((8, 3, "infonce"), (8, None, "infonce")) < 2e-5
    assert difference((2, None, "infonce"), (8, None, "infonce")) > 1e-3
    orthogonal = [key for key in weights if key[2] == "orthogonal_projection"]
    assert difference(*orthogonal) < 2e-6


def test_evaluates_in_mini_batches(tokenizer, batches):
    model = build(tokenizer, mini_batch_size=5).eval()
    with torch.no_grad():
        found = model.eval_forward(dict(batches["hard"]))["loss"]
        model.mini_batch_size = None
        torch.testing.assert_close(found, model.eval_forward(dict(batches["hard"]))["loss"])


# --- training ------------------------------------------------------------------------------------


def test_streams_are_mixed_by_their_proportions(tokenizer, shards):
    """Several data sets, by llm-foundry's own `streams`."""
    streams = {
        "a": {"local": str(shards), "split": "pairs", "proportion": 0.25},
        "b": {"local": str(shards), "split": "hard", "proportion": 0.75},
    }
    dataset = {"streams": streams, "epoch_size": 400, "shuffle": True, "max_seq_len": 32}
    config = {
        "name": "contrastive_pairs", "dataset": dataset, "drop_last": True, "num_workers": 0,
        "prefetch_factor": None, "persistent_workers": False, "pin_memory": False,
        "max_hard_negatives": 0,
    }  # fmt: skip
    loader = build_dataloader(config, tokenizer, 4).dataloader
    queries = [tuple(ids) for batch in loader for ids in batch["input_ids"][:, 0].tolist()]
    own = next(iter(load(shards, "pairs", tokenizer, 24)))["input_ids"][:, 0].tolist()
    assert len(queries) == 400
    assert sum(query in set(map(tuple, own)) for query in queries) == 100
    batch = next(iter(loader))
    model = build(tokenizer, mini_batch_size=3)
    assert math.isfinite(model.loss(model(batch), batch).item())


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


def test_training_without_negatives_is_refused(tokenizer, batches):
    wanted = {"infonce": "device_train_microbatch_size", "orthogonal_projection": "mine-negatives"}
    for loss, message in wanted.items():
        model = build(tokenizer, loss=loss)
        one = {key: tensor[:1] for key, tensor in batches["pairs"].items()}
        with pytest.raises(ValueError, match=message):
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
        ({"mini_batch_size": 0}, "model.mini_batch_size must be .* 1 or more, got 0"),
        ({"mini_batch_size": "4"}, "a whole number of texts, .* got '4'"),
        ({"config_overrides": {"vocab_size": 100}}, "vocab_size 104 is smaller"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no folder './nowhere'"),
    ],
)
def test_refuses_by_name(tokenizer, keys, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, **keys)
