import copy
import importlib.metadata
import math

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.optim import DecoupledAdamW
from llmfoundry.utils.builders import build_composer_model, build_dataloader
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from m2_plugin.foundry import models

TINY = {
    "m2_bert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "hyena_filter_order": 8, "monarch_mlp_nblocks": 2,
        "max_position_embeddings": 32, "long_conv_l_max": 32,
    },
    "bert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    },
}  # fmt: skip
LAYERS = {"m2_bert": "M2BertLayer", "bert": "BertLayer"}
PREFIX = {"m2_bert": "m2_bert", "bert": "hf_bert"}
families = pytest.mark.parametrize("family", list(TINY))
tasks = pytest.mark.parametrize("task", ["mlm", "classification"])


def build(family, task, tokenizer=None, overrides=None, **cfg):
    if "pretrained_model_name_or_path" not in cfg:
        overrides = TINY[family] | (overrides or {})
    cfg["config_overrides"] = overrides or {}
    return build_composer_model(f"{PREFIX[family]}_{task}", cfg, tokenizer)


def mlm_batch(seed=0, masked=0.3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30000, (4, 32), generator=generator)
    chosen = torch.rand(4, 32, generator=generator) < masked
    return {
        "input_ids": torch.where(chosen, 103, ids),
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.where(chosen, ids, -100),
        "total_tokens": [32] * 4,  # a key that no model knows
    }


def test_every_entry_point_resolves():
    points = importlib.metadata.distribution("m2-plugin").entry_points
    names = {point.name for point in points}
    assert {"m2_bert_mlm", "hf_bert_mlm", "mlm_text", "seed_each_batch", "loss_curve"} <= names
    assert {"m2_bert_classification", "hf_bert_classification"} <= names
    for point in points:
        assert callable(point.load()), point


@families
@tasks
def test_builds_and_learns(family, task, tokenizer):
    model = build(family, task, tokenizer)
    assert model.config.model_type == family
    assert model.config.vocab_size == 30528
    batch = mlm_batch()
    if task == "classification":
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    loss = model.loss(model(batch), batch)
    assert loss.shape == ()
    assert abs(loss.item() - math.log(30528 if task == "mlm" else 2)) < 0.6
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


@families
def test_mlm_loss_and_metrics_equal_a_manual_computation(family, tokenizer):
    model = build(family, "mlm", tokenizer).eval()
    metrics = model.get_metrics(is_train=False)
    assert set(metrics) == {"LanguageCrossEntropy", "MaskedAccuracy"}
    losses, hits, count = 0.0, 0, 0
    for seed, masked in ((0, 0.3), (1, 0.1), (2, 0.0)):  # the last predicts nothing at all
        batch = mlm_batch(seed, masked)
        with torch.no_grad():
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
            logits = model.model(**inputs).logits  # (B, L, V)
            outputs = model.eval_forward(batch)
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
        chosen = batch["labels"] != -100
        assert outputs.shape == (int(chosen.sum()), 30528)
        torch.testing.assert_close(outputs, logits[chosen], rtol=1e-5, atol=1e-5)
        target = batch["labels"][chosen]
        losses += F.cross_entropy(logits[chosen], target, reduction="sum").item()
        hits += int((logits[chosen].argmax(-1) == target).sum())
        count += len(target)
    assert metrics["LanguageCrossEntropy"].compute().item() == pytest.approx(losses / count, 1e-5)
    assert metrics["MaskedAccuracy"].compute().item() == pytest.approx(hits / count)


def test_training_step_decodes_masked_positions_only():
    model = build("m2_bert", "mlm", use_train_metrics=True)
    batch = mlm_batch()
    outputs = model(batch)
    masked = int((batch["labels"] != -100).sum())
    assert outputs["logits"].shape == (masked, 30528)
    # What the trainer does for training metrics: the cached outputs, not a second forward.
    cached = model.eval_forward(batch, outputs)
    assert torch.equal(cached, outputs["logits"])
    assert len(model.labels) == masked
    assert set(model.get_metrics(is_train=True)) == {"LanguageCrossEntropy", "MaskedAccuracy"}


def test_logits_are_computed_only_if_somebody_reads_them():
    """Training metrics and evaluation do; the loss alone needs none, and is the same."""
    model, batch = build("m2_bert", "mlm", overrides={"hidden_dropout_prob": 0.0}), mlm_batch()
    training = model.train()(batch)
    assert "logits" not in training
    assert model.loss(training, batch) is training["loss"]
    assert model.eval()(batch)["logits"].ndim == 2
    torch.testing.assert_close(model(batch)["loss"], training["loss"])
    assert model({"input_ids": batch["input_ids"]})["logits"].ndim == 3


@families
@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_classification_metrics(family, num_labels, tokenizer):
    names = ["spearman", "pearson", "mse"] if num_labels == 1 else [
        "accuracy", "f1", "matthews", "cross_entropy"
    ]  # fmt: skip
    model = build(family, "classification", tokenizer, num_labels=num_labels, metrics=names).eval()
    batch = mlm_batch()
    labels = torch.tensor([0, 1, 1, 0] if num_labels > 1 else [0.0, 1.5, 4.0, 2.5])
    logits = model.eval_forward({**batch, "labels": labels})
    assert logits.shape == ((4,) if num_labels == 1 else (4, num_labels))
    got = {}
    for name, metric in model.get_metrics(is_train=False).items():
        model.update_metric(batch, logits, metric)
        got[name] = metric.compute().item()
    if num_labels == 1:
        assert got["MeanSquaredError"] == pytest.approx(F.mse_loss(logits, labels).item())
        expected = torch.corrcoef(torch.stack([logits, labels]))[0, 1].item()
        assert got["PearsonCorrCoef"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert "SpearmanCorrCoef" in got
        return
    assert got["MulticlassAccuracy"] == (logits.argmax(1) == labels).float().mean().item()
    expected = F.cross_entropy(logits, labels).item()
    assert got["LanguageCrossEntropy"] == pytest.approx(expected, rel=1e-5)
    assert "MulticlassMatthewsCorrCoef" in got
    if num_labels == 2:
        predicted = logits.argmax(1)
        true_positive = int(((predicted == 1) & (labels == 1)).sum())
        expected = 2 * true_positive / max(int((predicted == 1).sum()) + 2, 1)
        assert got["BinaryF1Score"] == pytest.approx(expected)


@families
def test_pretrained_folder(family, tokenizer, tmp_path, caplog):
    """Weights come back; a classifier takes the backbone, and a head of other size is replaced."""
    mlm = build(family, "mlm", tokenizer)
    mlm.model.save_pretrained(tmp_path / "mlm")
    again = build(family, "mlm", tokenizer, pretrained_model_name_or_path=str(tmp_path / "mlm"))
    for name, parameter in mlm.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert "Newly initialised" not in caplog.text

    path = str(tmp_path / "mlm")
    three = build(family, "classification", pretrained_model_name_or_path=path, num_labels=3)
    base = three.model.base_model_prefix
    shared = [n for n, _ in mlm.model.named_parameters() if n.startswith(f"{base}.")]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(mlm.model.get_parameter(name), three.model.get_parameter(name)), name

    three.model.save_pretrained(tmp_path / "mnli")
    path = str(tmp_path / "mnli")
    one = build(family, "classification", pretrained_model_name_or_path=path, num_labels=1)
    assert one.config.problem_type == "regression"
    assert one.model.classifier.out_features == 1
    pooler = [n for n, _ in one.model.named_parameters() if "pooler" in n]
    assert pooler
    for name in pooler:
        assert torch.equal(one.model.get_parameter(name), three.model.get_parameter(name))


@families
def test_weights_that_do_not_fit_are_refused(family, tokenizer, tmp_path):
    build(family, "mlm").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of the encoder: .* num_hidden_layers"):
        build(
            family, "mlm", tokenizer, pretrained_model_name_or_path=str(tmp_path),
            overrides={"num_hidden_layers": 3},
        )  # fmt: skip


@families
@tasks
@pytest.mark.parametrize("version", ["1", "2"])
def test_layers_and_filters_are_the_fsdp_units(family, task, version, monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", version)
    inner = build(family, task).model
    units = {}
    for module in inner.modules():
        if unit := inner.fsdp_wrap_fn(module):
            units.setdefault(type(module).__name__, []).append(unit)
    filters = {
        "1": {"mixed_precision": MixedPrecision()},  # casts nothing
        "2": {"reshard_after_forward": True},
    }
    assert units.pop("HyenaFilter", []) == [filters[version]] * (4 if family == "m2_bert" else 0)
    assert units == {LAYERS[family]: [True] * 2}
    checkpointed = [m for m in inner.modules() if inner.activation_checkpointing_fn(m)]
    assert [type(module).__name__ for module in checkpointed] == [LAYERS[family]] * 2


@families
@tasks
def test_meta_init_draws_what_the_cpu_draws(family, task):
    """What Composer does on the meta device: to_empty and param_init_fn, module by module."""
    torch.manual_seed(5)
    expected = build(family, task).model
    torch.manual_seed(5)
    inner = build(family, task, init_device="meta").model
    assert all(p.is_meta for p in inner.parameters())
    tied = inner.get_output_embeddings()
    if task == "mlm":
        assert tied.weight is inner.get_input_embeddings().weight
    torch.manual_seed(6)
    state = torch.get_rng_state()
    for module in inner.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            inner.param_init_fn(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert inner.param_init_fn.source is None  # the copy's memory is given back
    for (name, value), wanted in zip(
        inner.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), name


def test_meta_init_reports_what_it_does_not_know():
    inner = build("bert", "mlm", init_device="meta").model
    with pytest.raises(ValueError, match="Linear was added after the model was built"):
        inner.param_init_fn(torch.nn.Linear(2, 2))


@families
@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"overrides": {"vocab_size": 1000}}, "vocab_size 1000 is smaller than .* 30522 entries"),
        ({"overrides": {"num_hidden_layer": 2}}, "num_hidden_layer.*num_hidden_layers"),
        ({"pretrained": True}, "needs pretrained_model_name_or_path"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "there is no folder './nowhere'"),
        ({"init_device": "cuda"}, "init_device must be cpu, meta or mixed, got 'cuda'"),
    ],
    ids=["vocab", "field", "no-path", "no-folder", "device"],
)
def test_bad_configs(family, cfg, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        build(family, "mlm", tokenizer, **cfg)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"num_labels": 3, "problem_type": "regression"}, "does not fit num_labels 3"),
        ({"problem_type": "multi"}, "problem_type must be .* got 'multi'"),
    ],
)
def test_bad_problem_types(cfg, message):
    with pytest.raises(ValueError, match=message):
        build("bert", "classification", **cfg)


def test_pretrained_weights_on_meta(tmp_path):
    config = BertConfig(**TINY["bert"])
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="need init_device cpu or mixed"):
        build("bert", "mlm", pretrained_model_name_or_path=str(tmp_path), init_device="meta")


def test_unknown_metric_and_key():
    with pytest.raises(Exception, match="bleu"):
        build("bert", "classification", metrics=["bleu"])
    with pytest.raises(TypeError, match="num_layers"):
        build("bert", "mlm", num_layers=3)


def test_vocabulary_is_padded_only_when_fresh(tmp_path):
    BertForMaskedLM(BertConfig(**TINY["bert"], vocab_size=30522)).save_pretrained(tmp_path)
    loaded = build("bert", "mlm", pretrained_model_name_or_path=str(tmp_path))
    assert loaded.config.vocab_size == 30522
    fresh = build("bert", "mlm", pretrained_model_name_or_path=str(tmp_path), pretrained=False)
    assert fresh.config.vocab_size == 30528


@families
def test_trainer_on_cpu(family, mds, tokenizer):
    """A short run: the loss falls, and the metric is the loss by hand over all of `val`."""
    loader = {"drop_last": False, "num_workers": 0, "pin_memory": False, "name": "mlm_text"}
    dataset = {"local": str(mds), "max_seq_len": 32}
    train, val = (
        build_dataloader(
            {**copy.deepcopy(loader), "dataset": {**dataset, **extra}}, tokenizer, size
        )
        for extra, size in (
            ({"split": "train", "shuffle": True, "mlm_probability": 0.3}, 16),
            ({"split": "val", "shuffle": False, "mlm_probability": 0.15}, 24),  # 24 + 24 + 16
        )
    )
    torch.manual_seed(0)
    model = build(family, "mlm", tokenizer)
    optimizer = DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=1e-5)
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=val,
        optimizers=optimizer,
        max_duration="24ba",
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=12,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=0,
    )
    trainer.eval()
    before = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute().item()
    trainer.fit()
    after = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute().item()
    assert before > 9.5
    assert after < before - 3

    model.eval()
    total, count = 0.0, 0
    for batch in val.dataloader:
        with torch.no_grad():
            loss = model(batch)["loss"].item()
        masked = sum(batch["loss_generating_tokens"])
        total, count = total + loss * masked, count + masked
    trainer.close()
    assert after == pytest.approx(total / count, rel=1e-4)


def test_gradient_is_that_of_the_whole_batch(mds, tokenizer):
    """Microbatches of unequal numbers of masked tokens sum to the mean over all of them."""
    cfg = {
        "name": "mlm_text", "drop_last": False, "num_workers": 0, "pin_memory": False,
        "dataset": {"local": str(mds), "split": "train", "shuffle": False, "max_seq_len": 32,
                    "mlm_probability": 0.3},
    }  # fmt: skip
    results = []
    for size in (16, 3):
        torch.manual_seed(0)
        model = build("bert", "mlm", overrides={"hidden_dropout_prob": 0.0,
                                                "attention_probs_dropout_prob": 0.0})  # fmt: skip
        trainer = Trainer(
            model=model,
            train_dataloader=build_dataloader(copy.deepcopy(cfg), tokenizer, 16),
            optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
            max_duration="1ba",
            device="cpu",
            precision="fp32",
            device_train_microbatch_size=size,
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            seed=0,
        )
        trainer.fit()
        trainer.close()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, whole in results[0].items():
        torch.testing.assert_close(whole, results[1][name], rtol=1e-4, atol=2e-6, msg=name)


def test_registered_classes_differ_in_attributes_only():
    for cls in (models.M2BertMLM, models.HFBertMLM):
        assert "forward" not in vars(cls) and "__init__" not in vars(cls)


@families
def test_label_names_are_saved(family, tmp_path):
    names = ["no", "so so", "yes"]
    model = build(family, "classification", label_names=names)
    assert model.config.num_labels == 3
    model.model.save_pretrained(tmp_path / "first")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first").config
    assert again.id2label == dict(enumerate(names))
    # Other names for as many classes replace those of the starting point.
    start = {"pretrained_model_name_or_path": str(tmp_path / "first")}
    other = build(family, "classification", label_names=["a", "b", "c"], num_labels=3, **start)
    assert other.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert build(family, "classification", regression=True).config.num_labels == 1
    missing = [{"path": "none.csv", "column": "label"}]
    one = build(family, "classification", regression=True, label_names=missing)
    assert one.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"label_names": ["a", "b"], "num_labels": 3},
            "num_labels is 3, but label_names are 2: a, b",
        ),
        ({"label_names": ["a", "b"], "regression": True}, "remove one of them"),
        ({"num_labels": 2, "regression": True}, "remove one of them"),
        ({"label_names": [True, False]}, "model.label_names: True is not a text: YAML reads yes"),
    ],
)
def test_label_names_that_contradict(keys, message):
    with pytest.raises(ValueError, match=message):
        build("m2_bert", "classification", **keys)
