"""`m2-plugin evaluate` says of other data what the evaluation of a training run says of its own."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from composer import Trainer
from llmfoundry.utils.builders import (
    add_metrics_to_eval_loaders,
    build_callback,
    build_composer_model,
    build_evaluators,
    build_optimizer,
)
from llmfoundry.utils.builders import build_dataloader as build
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from m2_plugin.cli import main
from m2_plugin.models import M2BertForTokenClassification
from tests.foundry.conftest import MAX_SEQ_LEN
from tests.models.test_modeling_m2_bert import small
from tests.utils import write_rows

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "hyena_filter_order": 4}
TINY |= {"max_position_embeddings": MAX_SEQ_LEN, "long_conv_l_max": MAX_SEQ_LEN}


def fit(tokenizer, tmp_path, name, model, train, evaluation):
    """Train a few batches; returns the metrics of the last evaluation by class name."""
    torch.manual_seed(0)
    composer = build_composer_model(name, model, tokenizer)
    evaluators, _, _ = build_evaluators(
        evaluation, None, None, tokenizer=tokenizer, device_eval_batch_size=5, icl_seq_len=16,
        icl_subset_num_batches=None,
    )  # fmt: skip
    trainer = Trainer(
        model=composer,
        train_dataloader=build(train, tokenizer, 8),
        eval_dataloader=add_metrics_to_eval_loaders(
            evaluators, list(composer.get_metrics(is_train=False))
        ),
        max_duration="4ba",
        eval_interval="4ba",
        optimizers=build_optimizer(composer, "torch_adamw", {"lr": 1e-2}),
        callbacks=[build_callback("eval_results", {"folder": str(tmp_path)})],
        device="cpu",
        precision="fp32",
        progress_bar=False,
        seed=3,
        save_folder=str(tmp_path / "checkpoints"),
        save_interval="4ba",
    )
    trainer.fit()
    folder = tmp_path / "final"
    composer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return json.loads((tmp_path / "metrics.json").read_text())["metrics"]


def loader(name, **dataset):
    dataset = {"max_seq_len": MAX_SEQ_LEN, **dataset}
    return {"name": name, "dataset": dataset, "drop_last": False, "num_workers": 0,
            "pin_memory": False}  # fmt: skip


def result(tmp_path, model, data, *flags):
    out = tmp_path / "result.json"
    assert main(["evaluate", str(model), "--data", str(data), "--json", str(out), *flags]) == 0
    return json.loads(out.read_text())


def lines(path):
    return Path(path).read_text().splitlines()


def texts_of(mds, tmp_path, sentences):
    return write_rows(tmp_path / "val.jsonl", [{"body": text} for text in sentences[192:]])


@pytest.mark.parametrize("mask_padding", [True, False])
def test_masked_lm_as_in_training(mask_padding, mds, sentences, tokenizer, tmp_path, capsys):
    """Over MDS and over a file of the same texts; with other masks it differs."""
    keys = {"local": str(mds), "mlm_probability": 0.15, "shuffle": False}
    ran = fit(
        tokenizer,
        tmp_path,
        "m2_bert_mlm",
        {"config_overrides": TINY | {"mask_padding": mask_padding}},
        loader("mlm_text", **keys | {"split": "train", "mlm_probability": 0.3}),
        loader("mlm_text", **keys, split="val"),
    )
    (ran,) = ran.values()
    found = result(tmp_path, tmp_path / "final", mds)
    assert found["rows"] == 64 and found["masks"]["mlm_probability"] == 0.15
    metrics = found["metrics"]
    assert metrics["cross_entropy"] == pytest.approx(ran["cross_entropy"], abs=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(ran["masked_accuracy"], abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["cross_entropy"]))
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"cross_entropy [\d.]+, masked_accuracy [\d.]+, perplexity \d+\.?\d* \(64 rows\)\n", line
    )
    # Other batches, the split itself, a checkpoint of the run, and the texts give the same.
    same = [
        result(tmp_path, tmp_path / "final", mds / "val", "--batch-size", "64"),
        result(tmp_path, tmp_path / "checkpoints" / "latest-rank0.pt", mds, "--split", "val"),
        result(tmp_path, tmp_path / "final", texts_of(mds, tmp_path, sentences), "--text-column",
               "body", "--batch-size", "7"),
    ]  # fmt: skip
    for other in same:
        assert other["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    masks = result(tmp_path, tmp_path / "final", mds, "--mask-seed", "1")
    assert masks["metrics"]["cross_entropy"] != metrics["cross_entropy"]
    train = result(tmp_path, tmp_path / "final", mds, "--split", "train")
    assert train["rows"] == 192


def test_masked_lm_of_transformers(mds, sentences, tokenizer, tmp_path):
    """Its loss on the collator's masks, computed by hand."""
    from m2_plugin.foundry.mlm_text import MLMCollator

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=MAX_SEQ_LEN,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    file = texts_of(mds, tmp_path, sentences)
    flags = ["--text-column", "body", "--mlm-probability", "0.3", "--mask-seed", "5"]
    found = result(tmp_path, tmp_path / "bert", file, *flags)["metrics"]
    collator = MLMCollator(tokenizer, 0.3, MAX_SEQ_LEN, seed=5)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    batch = collator([tokenizer(t, truncation=True) for t in sentences[192:]])
    chosen = batch["labels"] != -100
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits = model(**{name: batch[name] for name in names}).logits[chosen]
    labels = batch["labels"][chosen]
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    right = (logits.argmax(-1) == labels).double().mean().item()
    assert found["masked_accuracy"] == pytest.approx(right, abs=1e-6)


@pytest.fixture(scope="module")
def classes(sentences, tmp_path_factory):
    """Files whose labels depend on the text, in three classes or as numbers."""
    folder = tmp_path_factory.mktemp("classes")
    names = ["so so", "good", "bad"]
    rows = [
        {"text": t, "label": names[min(len(t) // 60, 2)], "size": len(t) / 100} for t in sentences
    ]
    return write_rows(folder / "train.jsonl", rows[:128]), write_rows(
        folder / "dev.jsonl", rows[128:]
    )


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_classification_as_in_training(
    regression, mask_padding, classes, tokenizer, tmp_path, capsys
):
    train, dev = map(str, classes)
    if regression:
        metrics, column = ["pearson", "spearman", "mse"], "size"
        own = {"regression": True}
    else:
        metrics, column = ["accuracy", "f1", "matthews", "cross_entropy"], "label"
        own = {"label_names": [{"path": train, "column": "label"}]}
    keys = {"text_column": "text", "label_column": column, "shuffle": False, **own}
    keys["padding"] = "longest" if mask_padding else "max_length"
    ran = fit(
        tokenizer,
        tmp_path,
        "m2_bert_classification",
        {"config_overrides": TINY | {"mask_padding": mask_padding}, "metrics": metrics, **own},
        loader("text_classification", path=train, **keys),
        loader("text_classification", path=dev, **keys),
    )
    (expected,) = ran.values()
    # The same batches: rounding changes the order of predictions that hardly differ.
    flags = ["--label-column", column, "--batch-size", "5"]
    found = result(tmp_path, tmp_path / "final", dev, *flags)
    assert found["rows"] == 128
    assert found["metrics"] == pytest.approx(expected, abs=1e-5)
    line = capsys.readouterr().out
    if regression:
        assert "commonest" not in found and line.endswith("(128 rows)\n")
    else:
        labels = [json.loads(row)["label"] for row in lines(dev)]
        most = max(set(labels), key=labels.count)
        assert found["commonest"] == {"label": most, "accuracy": labels.count(most) / 128}
        assert f"always {most!r}: accuracy 0." in line


@pytest.mark.parametrize("mask_padding", [True, False])
def test_words_as_in_training(mask_padding, tokenizer, tmp_path, capsys):
    """Over sentences that are longer than the model, too; rows and CoNLL give the same."""
    rng = random.Random(0)
    rows = []
    for n in range(1, 41):
        tokens = rng.choices(["Anna", "went", "home", "Obergefreiter", "Paris"], k=n)
        rows.append({"tokens": tokens, "tags": ["B-X" if w.istitle() else "O" for w in tokens]})
    path = tmp_path / "rows.conll"
    path.write_text("\n".join("".join(
        f"{word} x {tag}\n" for word, tag in zip(*row.values(), strict=True)
    ) for row in rows))  # fmt: skip
    keys = {"path": str(path), "label_names": ["O", "B-X", "I-X"], "shuffle": False}
    keys["padding"] = "longest" if mask_padding else "max_length"
    model = {
        "config_overrides": TINY | {"mask_padding": mask_padding},
        "label_names": keys["label_names"],
    }
    data = [loader("token_classification", **keys) for _ in range(2)]
    ran = fit(tokenizer, tmp_path, "m2_bert_token_classification", model, *data)
    found = result(tmp_path, tmp_path / "final", path, "--batch-size", "5")
    assert found["metrics"] == pytest.approx(ran["eval"], abs=1e-5)
    assert set(found["metrics"]) == {
        "accuracy", "entity_f1", "entity_precision", "entity_recall", "cross_entropy",
    }  # fmt: skip
    tags = [tag for row in rows for tag in row["tags"]]
    share = max(tags.count("O"), tags.count("B-X")) / len(tags)
    assert found["rows"] == 40 and found["commonest"]["accuracy"] == share
    assert f"always {found['commonest']['label']!r}: accuracy" in capsys.readouterr().out

    renamed = [{"w": row["tokens"], "t": row["tags"]} for row in rows]
    flags = ["--text-column", "w", "--label-column", "t"]
    file = write_rows(tmp_path / "rows.jsonl", renamed)
    again = result(tmp_path, tmp_path / "final", file, *flags)
    assert again["metrics"] == pytest.approx(found["metrics"], abs=1e-5)
    assert main(["evaluate", str(tmp_path / "final"), "--data", str(path), "--label-column", "1"])
    assert "rows.conll:1: the tag 'x' of" in capsys.readouterr().err


@pytest.mark.parametrize("version_2", [True, False])
def test_questions_as_in_training(version_2, tokenizer, tmp_path):
    rng = random.Random(0)
    rows = []
    for n in range(1, 41):
        words = rng.choices(["he", "went", "home", "to", "Paris"], k=2 * n)
        answer = {"text": words[n], "answer_start": len(" ".join(words[:n])) + 1}
        answers = [] if version_2 and n % 3 == 0 else [answer]
        rows.append({"question": "Where?", "context": " ".join(words), "answers": answers})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"path": str(path), "doc_stride": MAX_SEQ_LEN // 2, "padding": "longest"}
    data = [loader("question_answering", **keys, shuffle=False) for _ in range(2)]
    rules = {"max_answer_length": 1, "null_threshold": 100.0}  # the right answers are one word
    model = {"config_overrides": TINY | {"mask_padding": True}} | rules
    ran = fit(tokenizer, tmp_path, "m2_bert_question_answering", model, *data)
    found = result(tmp_path, tmp_path / "final", path, "--batch-size", "5")
    assert found["rows"] == 40 and found["metrics"].keys() == ran["eval"].keys()
    assert found["metrics"] == pytest.approx(ran["eval"], abs=1e-4)

    config = tmp_path / "final" / "config.json"
    fields = json.loads(config.read_text())
    assert fields.pop("task_specific_params") == {"question_answering": rules}
    predicted = tmp_path / "out.jsonl"
    predict = ["predict", str(path), "--model", str(tmp_path / "final"), "--out", str(predicted)]
    assert main(predict) == 0
    answers = [json.loads(line)["prediction"] for line in predicted.read_text().splitlines()]
    assert len(answers) == 40 and all(len(answer.split()) == 1 for answer in answers)
    config.write_text(json.dumps(fields))
    longer = result(tmp_path, tmp_path / "final", path, "--batch-size", "5")
    assert longer["metrics"]["f1"] != found["metrics"]["f1"]  # BERT's rules


def test_predictions_and_evaluation_agree(classes, tokenizer, tmp_path):
    train, dev = map(str, classes)
    own = {"label_names": [{"path": train, "column": "label"}]}
    keys = {"text_column": "text", "shuffle": False, **own}
    fit(
        tokenizer, tmp_path, "m2_bert_classification", {"config_overrides": TINY, **own},
        loader("text_classification", path=train, **keys),
        loader("text_classification", path=dev, **keys),
    )  # fmt: skip
    found = result(tmp_path, tmp_path / "final", dev)["metrics"]
    out = tmp_path / "p.jsonl"
    assert main(["predict", dev, "--model", str(tmp_path / "final"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in lines(out)]
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    entropy = -sum(math.log(row[f"probability_{row['label']}"]) for row in rows) / len(rows)
    assert found["accuracy"] == pytest.approx(right, abs=1e-6)
    assert found["cross_entropy"] == pytest.approx(entropy, abs=1e-5)


def test_what_is_refused(mds, classes, tokenizer, tmp_path, capsys):
    train, dev = map(str, classes)
    torch.manual_seed(0)
    names = ["bad", "good"]
    model = build_composer_model(
        "m2_bert_classification", {"config_overrides": TINY, "label_names": names}, tokenizer
    ).model
    model.save_pretrained(tmp_path / "two")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.save_pretrained(tmp_path / "unnamed")
    M2BertForTokenClassification(small(vocab_size=30522)).save_pretrained(tmp_path / "tokens")
    mlm = build_composer_model("m2_bert_mlm", {"config_overrides": TINY}, tokenizer).model
    mlm.save_pretrained(tmp_path / "mlm")
    for name in ("two", "unnamed", "tokens", "mlm"):
        tokenizer.save_pretrained(tmp_path / name)
    ids = write_rows(tmp_path / "ids.jsonl", [{"text": "a", "label": i} for i in range(3)])
    (tmp_path / "empty.txt").write_text("")
    for folder, data, flags, message in [
        ("two", dev, [], r"dev.jsonl:\d+: label 'so so' is out of range: .*\(bad, good\)"),
        ("two", "none.csv", [], "there is no file 'none.csv'"),
        ("two", dev, ["--label-column", "y"], r"has no column 'y' \(label_column\)"),
        ("two", dev, ["--label-names", "a"], "--label-names has 1 names, the model 2 classes"),
        ("unnamed", dev, [], "labels are words"),
        ("unnamed", ids, [], "the data have 3 classes, the model 2"),
        ("tokens", dev, [], "the model has no names for its tags: list them with --label-names"),
        ("tokens", dev, ["--label-names", "a", "b"], r"dev.jsonl:1: no column 'tokens'"),
        ("tokens", dev, ["--pair-column", "b"], "--pair-column has no effect on .*TokenClass"),
        ("mlm", dev, ["--label-column", "y"], "--label-column has no effect on .*ForMaskedLM"),
        ("two", dev, ["--mask-seed", "0"], "--mask-seed has no effect on .*SequenceClass"),
        (
            "mlm",
            mds,
            ["--split", "test"],
            "index.json: missing. Splits in .* are tokens, train, val",
        ),
        ("mlm", dev, ["--text-column", "b"], r"dev.jsonl:1: no column 'b' \(--text-column\)"),
        ("mlm", tmp_path / "empty.txt", [], "the data have no rows"),
        ("mlm", dev, ["--mlm-probability", "0"], "mlm_probability must be .* between 0 and 1"),
        ("mlm", dev, ["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        ("nowhere", dev, [], "there is no file .*nowhere/config.json"),
    ]:
        capsys.readouterr()
        out = tmp_path / "r.json"
        arguments = [str(tmp_path / folder), "--data", str(data), "--json", str(out), *flags]
        assert main(["evaluate", *arguments]) == 1
        said = capsys.readouterr().err
        assert re.search(message, said) and len(said.splitlines()) == 1, said
        assert not out.exists()
    # Names in the order of the ids make the unnamed model the named one.
    keep = tmp_path / "keep.jsonl"
    keep.write_text("".join(f"{line}\n" for line in lines(dev) if '"so so"' not in line))
    found = result(tmp_path, tmp_path / "unnamed", keep, "--label-names", *names)
    assert found["metrics"] == result(tmp_path, tmp_path / "two", keep)["metrics"]


def test_interrupted(classes, tmp_path, monkeypatch, capsys):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2_plugin.foundry.evaluation.evaluate", stop)
    assert main(["evaluate", str(tmp_path), "--data", str(classes[0])]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_checkpoint_without_a_tokenizer(tmp_path, capsys):
    model = build_composer_model("m2_bert_mlm", {"config_overrides": TINY}, None)
    torch.save({"state": {"model": model.state_dict()}}, tmp_path / "bare.pt")
    assert main(["evaluate", str(tmp_path / "bare.pt"), "--data", "x.txt"]) == 1
    assert "bare.pt' has no tokenizer: make a folder of it with m2-plugin import" in (
        capsys.readouterr().err
    )
