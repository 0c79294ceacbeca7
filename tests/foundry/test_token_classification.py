"""The dataloader, the metrics and the models of token classification."""

import random

import pytest
import torch
from llmfoundry.utils.builders import build_composer_model, build_dataloader

from m2_plugin.foundry.token_classification import TOKEN_METRICS, EntityF1
from tests.utils import write_rows

L = 16
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TINY = {
    "vocab_size": 30528, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "hyena_filter_order": 4, "long_conv_l_max": 32, "max_position_embeddings": 32,
    "mask_padding": True,
}  # fmt: skip


@pytest.fixture
def sentences(sentences):
    """Sentences of 0 to 24 words with tags, some longer than L, some with odd words."""
    rng = random.Random(1)
    rows = [{"tokens": [], "tags": []}]
    for text in sentences[:40]:
        words = [rng.choice([word, word, "\u200b", "Obergefreiter"]) for word in text.split()]
        rows.append({"tokens": words, "tags": [rng.choice(NAMES) for _ in words]})
    return rows


def build(tokenizer, path, batch_size=4, loader=None, **dataset):
    dataset = {"path": str(path), "max_seq_len": L, "label_names": NAMES} | dataset
    config = {"name": "token_classification", "dataset": dataset, "pin_memory": False}
    return build_dataloader(config | {"drop_last": False, **(loader or {})}, tokenizer, batch_size)


def model(name="m2_bert_token_classification", **keys):
    if "pretrained_model_name_or_path" not in keys:
        fields = TINY if name.startswith("m2") else {"num_hidden_layers": 1, "hidden_size": 12}
        keys["config_overrides"] = fields | keys.pop("config_overrides", {})
    torch.manual_seed(0)
    return build_composer_model(name, keys, None).eval()


def evaluate(composer_model, spec):
    """What Composer's evaluation does."""
    metrics = composer_model.get_metrics(is_train=False)
    rows = []
    for batch in spec.dataloader:
        for micro in spec.split_batch(batch, 3):
            with torch.no_grad():
                outputs = composer_model.eval_forward(micro)
            rows.append(outputs["rows"])
            for metric in metrics.values():
                composer_model.update_metric(micro, outputs, metric)
    return {name: metric.compute().item() for name, metric in metrics.items()}, torch.cat(rows)


# Data


def test_batches_have_a_label_for_each_word(tokenizer, sentences, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", sentences)
    spec = build(tokenizer, path, padding="longest")
    found = {}
    for batch in spec.dataloader:
        shape = batch["input_ids"].shape
        assert shape[1] <= L and shape[1] % 8 == 0
        assert {batch[key].shape for key in ("attention_mask", "labels", "words")} == {shape}
        assert torch.equal(batch["labels"] != -100, batch["words"] >= 0)
        assert not (batch["labels"] != -100)[batch["attention_mask"] == 0].any()
        tokens = spec.get_num_tokens_in_batch(batch, "loss_generating")
        assert tokens == (batch["labels"] != -100).sum()
        for i, j in (batch["words"] >= 0).nonzero().tolist():
            key = int(batch["sentence"][i]), int(batch["words"][i, j])
            assert key not in found
            found[key] = NAMES[batch["labels"][i, j]]
    assert found == {
        (s, w): t for s, row in enumerate(sentences) for w, t in enumerate(row["tags"])
    }


def test_conll_and_rows_give_the_same_batches(tokenizer, sentences, tmp_path):
    rows = [row for row in sentences if row["tokens"]]
    text = "".join(
        "".join(f"{w}\tX\t{t}\n" for w, t in zip(row["tokens"], row["tags"], strict=True)) + "\n"
        for row in rows
    )
    (tmp_path / "a.conll").write_text(text)
    of_rows = build(tokenizer, write_rows(tmp_path / "a.jsonl", rows))
    names = [{"path": str(tmp_path / "a.conll"), "column": "tags"}]
    of_conll = build(tokenizer, tmp_path / "a.conll", label_names=sorted(NAMES))
    named = build(tokenizer, tmp_path / "a.conll", label_names=names)
    same = ("input_ids", "words", "sentence")
    for a, b, c in zip(of_rows.dataloader, of_conll.dataloader, named.dataloader, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in same)
        assert torch.equal(b["labels"], c["labels"]) and b["label_names"] == c["label_names"]


def test_max_samples_counts_sentences(tokenizer, sentences, tmp_path):
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", sentences), max_samples=7)
    assert len(set(spec.dataloader.dataset["sentence"])) in (6, 7)  # one has no words


@pytest.mark.parametrize(
    ("dataset", "error"),
    [
        ({"label_names": ["O", "B-X"]}, r"a.conll:2: the tag 'B-PER' of 'Anna' is not one of"),
        ({"label_names": None}, "needs the key 'label_names'"),
        ({"label_names": [False, "B-PER"]}, "is not a text"),
        ({"label_names": ["O", "B-PER", "PER"]}, "'PER' is not one of an entity"),
        ({"max_seq_len": 2}, "no room for a word"),
        ({"path": "none.conll"}, "dataset.path: there is no file"),
        ({"tag_column": "x"}, "Did you mean 'tags_column'"),
        ({"on_error": "ignore"}, "dataset.on_error must be one of"),
        ({"padding": "left"}, "dataset.padding must be one of"),
    ],
)
def test_errors_name_the_key_or_the_line(tokenizer, tmp_path, dataset, error):
    (tmp_path / "a.conll").write_text("I O\nAnna B-PER\n\n")
    with pytest.raises(ValueError, match=error):
        build(tokenizer, dataset.pop("path", tmp_path / "a.conll"), **dataset)


def test_broken_sentences_can_be_left_out(tokenizer, tmp_path, caplog):
    (tmp_path / "a.conll").write_text("I O\n\nAnna B-XXX\n\nx\n\nyou O\n")
    with pytest.raises(ValueError, match=r"a.conll:3: the tag 'B-XXX'.*\(2 such rows\)"):
        build(tokenizer, tmp_path / "a.conll")
    spec = build(tokenizer, tmp_path / "a.conll", on_error="skip")
    assert len(spec.dataloader.dataset) == 2 and "Left out 2 broken rows" in caplog.text


# Models and metrics


@pytest.mark.parametrize("name", ["m2_bert_token_classification", "hf_bert_token_classification"])
def test_evaluation_equals_seqevals(name, tokenizer, sentences, tmp_path):
    """Although sentences lie in several windows, batches and microbatches."""
    seqeval = pytest.importorskip("seqeval.metrics")
    built = model(name, label_names=NAMES)
    assert built.config.id2label == dict(enumerate(NAMES)) and built.config.num_labels == 5
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", sentences), shuffle=True)
    values, rows = evaluate(built, spec)
    found = [["O"] * len(row["tags"]) for row in sentences]
    for sentence, word, predicted, right in rows.tolist():
        assert sentences[sentence]["tags"][word] == NAMES[right]
        found[sentence][word] = NAMES[predicted]
    right = [row["tags"] for row in sentences]
    assert values["EntityF1"] == pytest.approx(seqeval.f1_score(right, found))
    assert values["EntityPrecision"] == pytest.approx(seqeval.precision_score(right, found))
    assert values["EntityRecall"] == pytest.approx(seqeval.recall_score(right, found))
    assert values["WordAccuracy"] == pytest.approx(seqeval.accuracy_score(right, found))
    assert 0 < values["LanguageCrossEntropy"] < 5


@pytest.mark.parametrize("prefixes", ["OBI", "OI", "OBIES"])
@pytest.mark.parametrize("kind", ["random", "right", "all O", "no entity is there"])
def test_metrics_equal_seqevals(prefixes, kind):
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = random.Random(0)
    names = ["O", *(f"{p}-{t}" for p in prefixes if p != "O" for t in ("PER", "LOC"))]
    right = [[rng.randrange(len(names)) for _ in range(rng.randrange(1, 9))] for _ in range(50)]
    if kind == "no entity is there":
        right = [[0] * len(tags) for tags in right]
    found = right if kind == "right" else [[rng.randrange(len(names)) for _ in s] for s in right]
    found = [[0] * len(tags) for tags in found] if kind == "all O" else found
    rows = torch.tensor(
        [(s, w, found[s][w], right[s][w]) for s in range(50) for w in range(len(right[s]))]
    )
    rows = torch.cat([rows, rows[:20]])[torch.randperm(len(rows) + 20)]  # in any order, some twice
    there, predicted = ([[names[i] for i in tags] for tags in all_] for all_ in (right, found))
    for metric, theirs in {
        "entity_f1": seqeval.f1_score,
        "entity_precision": seqeval.precision_score,
        "entity_recall": seqeval.recall_score,
        "accuracy": seqeval.accuracy_score,
    }.items():
        own = TOKEN_METRICS[metric](names)
        for part in rows.split(37):
            own.update(part)
        assert own.compute().item() == pytest.approx(theirs(there, predicted)), metric


def test_a_metric_without_words_is_0():
    assert EntityF1(NAMES).compute() == 0


def test_names_of_a_trained_model_are_kept(tokenizer, sentences, tmp_path):
    first = model(label_names=NAMES)
    first.model.save_pretrained(tmp_path / "start")
    start = {"pretrained_model_name_or_path": str(tmp_path / "start")}
    again = model(**start)
    assert again.config.label2id == {name: i for i, name in enumerate(NAMES)}
    weight = first.model.classifier.weight
    assert torch.equal(model(**start, label_names=NAMES).model.classifier.weight, weight)
    with pytest.raises(ValueError, match=r"another order: give them as \[O, B-PER"):
        model(**start, label_names=NAMES[::-1])
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", sentences), label_names=NAMES[::-1])
    with pytest.raises(ValueError, match="different label_names"):
        again(next(iter(spec.dataloader)))


def test_tags_of_words_have_no_entities():
    tagger = model(label_names=["DET", "NOUN"])
    assert list(tagger.val_metrics) == ["WordAccuracy", "LanguageCrossEntropy"]
    with pytest.raises(ValueError, match="entity_f1 needs tags of entities"):
        model(label_names=["DET", "NOUN"], metrics=["entity_f1"])
    with pytest.raises(ValueError, match="'f1' is not one of accuracy, entity_f1"):
        model(label_names=NAMES, metrics=["f1"])
    with pytest.raises(ValueError, match=r"model.label_names is missing"):
        model()


def test_a_model_learns_the_tags(tokenizer, tmp_path):
    rows = [{"tokens": ["he", "saw", "london"], "tags": ["B-PER", "O", "B-LOC"]}] * 8
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", rows), batch_size=8)
    trained = model(label_names=NAMES).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    batch = next(iter(spec.dataloader))
    for _ in range(30):
        loss = trained.loss(trained(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, _ = evaluate(trained.eval(), spec)
    assert values["EntityF1"] == values["WordAccuracy"] == 1
