import copy
import csv
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from composer.core.data_spec import DataSpec
from llmfoundry.utils.builders import build_dataloader
from omegaconf import OmegaConf
from torch.utils.data import DistributedSampler

from m2_plugin.foundry.text_classification import TextClassificationCollator
from m2_plugin.glue.tasks import TASKS, task
from tests.utils import ROOT

GLUE = Path(__file__).parent / "data" / "glue"
L = 32
ROWS = {"train": 32, "validation": 12, "test": 6}
SPLITS = [(name, split) for name, t in TASKS.items() for split in t.splits]


def build(tokenizer, batch_size=4, name="glue", loader=None, **dataset):
    cfg = {"name": name, "dataset": {"max_seq_len": L, **dataset}, "pin_memory": False}
    return build_dataloader(copy.deepcopy(cfg | (loader or {})), tokenizer, batch_size)


def glue(tokenizer, name="cola", split="train", path=GLUE, **kwargs):
    return build(tokenizer, task=name, split=split, path=str(path), **kwargs)


def own(tokenizer, path, **kwargs):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    kwargs = {"text_column": "text"} | kwargs
    return build(tokenizer, name="text_classification", path=path, **kwargs)


def examples(spec) -> list[dict]:
    return list(spec.dataloader.dataset)


def write(path: Path, rows: list, header: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(([header] if header else []) + rows) + "\n")
    return path


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_reads_every_official_file(tokenizer, name, split):
    t = task(name)
    found = examples(glue(tokenizer, name, split, shuffle=False))
    expected = ROWS[split.split("_")[0]]
    assert len(found) == expected - (split == "validation_matched")  # one label there is `-`
    for row in found:
        assert ("text_pair" in row) == (len(t.text_columns) == 2)
        assert row["text"] and "\r" not in row.get("text_pair", row["text"])
        if split in t.test_splits:
            assert "label" not in row
        elif t.is_regression:
            assert 0 <= row["label"] <= 5
        else:
            assert row["label"] in range(t.num_labels)
    if "test" not in split and not t.is_regression:
        assert len({row["label"] for row in found}) == t.num_labels


def test_quirks_of_the_official_files(tokenizer):
    cola = examples(glue(tokenizer, "cola", shuffle=False))
    assert cola[1] == {"text": '"Nobody," she said, "came.', "label": 1}  # three literal quotes
    mrpc = examples(glue(tokenizer, "mrpc", "train", shuffle=False))
    assert mrpc[0]["text"] == '" Two letters came , he said .' and mrpc[0]["label"] == 1
    dev = examples(glue(tokenizer, "mrpc", "validation"))  # a byte order mark and \r\n
    with open(GLUE / "MRPC/dev.tsv", newline="", encoding="utf-8") as file:
        raw = [line.rstrip("\r\n").split("\t") for line in file][1:]
    assert [(r["label"], r["text"], r["text_pair"]) for r in dev] == [
        (int(r[0]), r[3], r[4]) for r in raw
    ]
    stsb = examples(glue(tokenizer, "stsb", "validation"))
    assert [row["label"] for row in stsb[:3]] == [0.0, 1.25, 2.6]
    rte = examples(glue(tokenizer, "rte", "validation"))
    assert [row["label"] for row in rte[:2]] == [0, 1]  # entailment is the hub's class 0
    wnli = examples(glue(tokenizer, "wnli", "validation"))
    assert [row["label"] for row in wnli[:2]] == [1, 0]  # and class 1 here
    mnli = examples(glue(tokenizer, "mnli", "validation_matched"))
    assert [row["label"] for row in mnli[:5]] == [0, 1, 2, 0, 2]  # the fifth row has no label


def test_rows_of_qqp_that_are_cut_short_are_counted(tokenizer, caplog):
    with caplog.at_level("WARNING"):
        assert len(examples(glue(tokenizer, "qqp"))) == 32
    assert f"Left out 1 broken rows; the first: {GLUE}/QQP/train.tsv:7: 2 columns" in caplog.text
    with pytest.raises(ValueError, match=r"QQP/train.tsv:7: 2 columns where there should be 6"):
        glue(tokenizer, "qqp", on_error="raise")


@pytest.mark.parametrize(("name", "split"), [("cola", "train"), ("stsb", "validation")])
def test_all_sources_give_the_same_examples(tokenizer, tmp_path, name, split):
    """Official TSV, its folder, jsonl of the same name, saved by `datasets`, cached by it."""
    expected = examples(glue(tokenizer, name, split))
    t = task(name)
    tsv = GLUE / t.official_files(split)[0]
    assert examples(glue(tokenizer, name, split, path=tsv.parent)) == expected
    assert examples(glue(tokenizer, name, split, path=tsv)) == expected

    names = ["text", "text_pair"]
    rows = [
        {c: row[n] for c, n in zip(t.text_columns, names, strict=False)}
        | {"label": row["label"] if t.is_regression else t.label_names[row["label"]]}
        for row in expected
    ]
    jsonl = tmp_path / "jsonl" / Path(t.official_files(split)[0]).with_suffix(".jsonl")
    write(jsonl, [json.dumps(row) for row in rows])
    assert examples(glue(tokenizer, name, split, path=tmp_path / "jsonl")) == expected

    label = (
        datasets.Value("float32")
        if t.is_regression
        else datasets.ClassLabel(names=list(t.label_names))
    )
    features = {c: datasets.Value("string") for c in t.text_columns} | {"label": label}
    saved = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict({split: saved}).save_to_disk(str(tmp_path / "all" / name))
    for folder in (tmp_path / "all", tmp_path / "all" / name):
        found = examples(glue(tokenizer, name, split, path=folder))
        for a, b in zip(found, expected, strict=True):
            assert a | {"label": pytest.approx(a["label"])} == b
    with pytest.raises(ValueError, match=rf"has no split 'test'.*\['{split}'\]"):
        glue(tokenizer, name, "test", path=tmp_path / "all")


def test_cache_of_datasets_is_read_offline(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    expected = examples(glue(tokenizer, "rte", "train"))
    source = tmp_path / "glue" / "rte"  # what a download leaves, made from a folder
    source.mkdir(parents=True)
    rows = [
        {"sentence1": r["text"], "sentence2": r["text_pair"], "label": r["label"]} for r in expected
    ]
    write(source / "train.jsonl", [json.dumps(row) for row in rows])
    made = tmp_path / "made"
    datasets.load_dataset("json", data_files=str(source / "train.jsonl"), cache_dir=str(made))
    arrow = next(made.rglob("json-train.arrow"))
    home = tmp_path / "cache" / "nyu-mll___glue" / "rte" / "0.0.0" / ("a" * 40)
    shutil.copytree(arrow.parent, home)
    (home / "json-train.arrow").rename(home / "glue-train.arrow")
    info = json.loads((home / "dataset_info.json").read_text())
    info |= {"builder_name": "glue", "dataset_name": "glue", "config_name": "rte"}
    (home / "dataset_info.json").write_text(json.dumps(info))
    assert examples(glue(tokenizer, "rte", "train", path=tmp_path / "cache")) == expected


@pytest.mark.parametrize("padding", ["max_length", "longest"])
@pytest.mark.parametrize("length", [L, 12, 13])
def test_batches_are_the_tokenizers(tokenizer, padding, length):
    spec = glue(tokenizer, "rte", "validation", padding=padding, max_seq_len=length, batch_size=5)
    assert isinstance(spec, DataSpec)
    rows, seen = examples(spec), 0
    for batch in spec.dataloader:
        count = len(batch["labels"])
        width = batch["input_ids"].shape[1]
        chosen = rows[seen : seen + count]
        seen += count
        lengths = []
        for i, row in enumerate(chosen):
            one = tokenizer(
                row["text"], row["text_pair"], truncation="longest_first", max_length=length
            )
            n = len(one["input_ids"])
            lengths.append(n)
            assert batch["input_ids"][i, :n].tolist() == one["input_ids"]
            assert batch["token_type_ids"][i, :n].tolist() == one["token_type_ids"]
            assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
            assert (batch["input_ids"][i, n:] == tokenizer.pad_token_id).all()
            assert 1 in one["token_type_ids"]
        assert batch["labels"].tolist() == [row["label"] for row in chosen]
        assert batch["labels"].dtype == torch.int64
        if padding == "max_length":
            assert width == length
        else:
            # A multiple of 8, for the tensor cores, where it cannot exceed the maximum.
            assert width == (-(-max(lengths) // 8) * 8 if length % 8 == 0 else max(lengths))
        assert width <= length
        assert spec.get_num_samples_in_batch(batch) == count
        assert spec.get_num_tokens_in_batch(batch) == sum(lengths)
        # One loss per example: microbatches weigh by them.
        assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == count
        parts = spec.split_batch(batch, 2)
        assert sum(len(part["labels"]) for part in parts) == count
        assert all(part["num_labels"] == 2 for part in parts)
    assert seen == 12


def test_regression_and_unlabelled_batches(tokenizer):
    batch = next(iter(glue(tokenizer, "stsb").dataloader))
    assert batch["labels"].dtype == torch.float32 and batch["num_labels"] == 1
    batch = next(iter(glue(tokenizer, "stsb", "test").dataloader))
    assert "labels" not in batch and batch["input_ids"].shape == (4, L)


def order(spec, epoch):
    spec.dataloader.sampler.set_epoch(epoch)
    return [tuple(map(tuple, b["input_ids"].tolist())) for b in spec.dataloader]


def test_order_depends_on_seed_and_epoch_only(tokenizer):
    """A resumed run needs this: Composer sets the epoch and skips the batches before."""
    first = glue(tokenizer, "sst2")
    assert isinstance(first.dataloader.sampler, DistributedSampler)
    epochs = [order(first, epoch) for epoch in (0, 1)]
    torch.manual_seed(99)
    workers = glue(tokenizer, "sst2", loader={"num_workers": 2})
    again = [order(workers, epoch) for epoch in (1, 0)]
    assert epochs == again[::-1]
    assert epochs[0] != epochs[1]
    assert sorted(r for b in epochs[0] for r in b) == sorted(r for b in epochs[1] for r in b)
    other = glue(tokenizer, "sst2", shuffle_seed=20)
    assert order(other, 0) != epochs[0]
    # By default only train is shuffled; max_samples takes the same rows each time, in order.
    assert order(glue(tokenizer, "sst2", "validation"), 0) == order(
        glue(tokenizer, "sst2", "validation", shuffle=False), 3
    )
    few = examples(glue(tokenizer, "mrpc", max_samples=10))
    assert few == examples(glue(tokenizer, "mrpc", max_samples=10))
    everything = examples(glue(tokenizer, "mrpc"))
    where = [everything.index(row) for row in few]
    assert len(few) == 10 and where == sorted(where) and where != list(range(10))
    assert len(examples(glue(tokenizer, "mrpc", max_samples=1000))) == 32


def test_ranks_share_the_examples(tokenizer, monkeypatch):
    from composer.utils import dist

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        loader = glue(tokenizer, "sst2", "validation").dataloader
        seen.append(list(loader.sampler))
    assert sorted(seen[0] + seen[1]) == list(range(12))


# A user's own texts


def test_own_files(tokenizer, tmp_path):
    """jsonl, csv and tsv of the same content, one after the other; words and numbers as labels."""
    texts = ['He said "no", twice', "ünïcode  line", ""]
    labels = ["maybe", "no", "yes"]
    rows = [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    jsonl = write(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    tsv = write(tmp_path / "a.tsv", [f"{t}\t{y}" for t, y in zip(texts, labels, strict=True)],
                "text\tlabel")  # fmt: skip
    names = ["no", "maybe", "yes"]
    expected = [{"text": t, "label": y} for t, y in zip(texts, [1, 0, 2], strict=True)]
    for path in (jsonl, tmp_path / "a.csv", tsv):
        assert examples(own(tokenizer, path, label_names=names)) == expected
    both = own(tokenizer, [jsonl, tsv], label_names=names)
    assert examples(both) == expected * 2
    assert next(iter(both.dataloader))["num_labels"] == 3

    integers = write(tmp_path / "b.csv", ["x,2", "y,0"], "text,label")
    batch = next(iter(own(tokenizer, integers).dataloader))
    assert batch["labels"].tolist() == [2, 0] and batch["min_num_labels"] == 3
    numbers = write(tmp_path / "c.csv", ["x,y,2.5", "y,z,-1e3"], "a,b,score")
    keys = {"text_column": "a", "text_pair_column": "b", "label_column": "score"}
    batch = next(iter(own(tokenizer, numbers, regression=True, **keys).dataloader))
    assert batch["labels"].tolist() == [2.5, -1000.0] and batch["num_labels"] == 1
    assert "labels" not in next(
        iter(own(tokenizer, numbers, text_column="a", label_column=None).dataloader)
    )


def test_own_saved_dataset_brings_its_names(tokenizer, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    rows = {"text": ["x", "y"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    batch = next(iter(own(tokenizer, tmp_path / "saved").dataloader))
    assert batch["labels"].tolist() == [1, 0] and batch["num_labels"] == 2
    # Names in another order count by name.
    other = own(tokenizer, tmp_path / "saved", label_names=["a", "b"])
    assert next(iter(other.dataloader))["labels"].tolist() == [0, 1]


def test_names_that_are_numbers(tokenizer, tmp_path):
    rows = [json.dumps({"text": "x", "label": stars}) for stars in (1, 3, "2")]
    empty = write(tmp_path / "empty.csv", [], "text,label")
    stars = own(tokenizer, [empty, write(tmp_path / "a.jsonl", rows)], label_names=[1, 2, 3])
    assert [row["label"] for row in examples(stars)] == [0, 2, 1]


@pytest.mark.parametrize(
    ("labels", "more", "names"),
    [
        (["so so", "good", "bad"], {}, ["bad", "good", "so so"]),
        (["no", "yes", "no"], {}, ["no", "yes"]),  # which a YAML would read as booleans
        ([0, 2, 1], {}, ["0", "1", "2"]),
        ([5, 3, 1], {}, ["1", "3", "5"]),
        (["b", "a", "b"], {"variables.label_names": ["b", "a"]}, ["b", "a"]),
        ([0, 1, 2], {"variables.label_names": None, "model.num_labels": 3}, None),
        ([0.5, -1.5, 2], {"variables.regression": True}, None),
    ],
)
def test_yaml_for_own_texts(tokenizer, tmp_path, labels, more, names):
    """Only the files are given; model and loaders agree on the classes, and the model trains."""
    from llmfoundry.command_utils.train import TRAIN_CONFIG_KEYS, TrainConfig, validate_config
    from llmfoundry.utils.builders import build_composer_model, build_optimizer
    from llmfoundry.utils.config_utils import make_dataclass_and_log_config

    from tests.foundry.test_models import build as build_model

    build_model("m2_bert", "mlm").model.save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    train = write(tmp_path / "a.csv", [f"x,{y}" for y in labels] * 2, "text,label")
    dev = write(tmp_path / "b.csv", [f"x,{y}" for y in labels[:2]], "text,label")
    config = OmegaConf.load(ROOT / "yamls/finetune/text-classification.yaml")
    keys = {"train": str(train), "eval": str(dev), "start": str(tmp_path / "mlm")}
    config.variables.update(keys | {"max_seq_len": L})
    for key, value in more.items():
        OmegaConf.update(config, key, value)
    OmegaConf.resolve(config)
    _, train_config = make_dataclass_and_log_config(
        copy.deepcopy(config), TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
    )
    validate_config(train_config)
    config = OmegaConf.to_container(config)
    model = build_composer_model(config["model"].pop("name"), config["model"], tokenizer)
    build_optimizer(model, config["optimizer"].pop("name"), config["optimizer"])
    metrics = {"MulticlassAccuracy", "LanguageCrossEntropy"}
    if "variables.regression" in more:
        metrics = {"SpearmanCorrCoef", "PearsonCorrCoef", "MeanSquaredError"}
    assert metrics <= set(model.get_metrics(is_train=False))
    for name in ("train_loader", "eval_loader"):
        loader = config[name] | {"num_workers": 0, "pin_memory": False, "drop_last": False}
        spec = build_dataloader(loader, tokenizer, 4)
        batch = next(iter(spec.dataloader))
        assert model.loss(model(batch), batch).item() > 0
        if names:
            ids = {str(y): names.index(str(y)) for y in labels}
            found = [row["label"] for row in examples(spec)]
            assert found == [ids[str(y)] for y in labels * 2][: len(found)]
    model.model.save_pretrained(tmp_path / "tuned")
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    if names:
        assert saved["id2label"] == {str(i): name for i, name in enumerate(names)}
        assert saved["label2id"] == {name: i for i, name in enumerate(names)}


def test_a_label_that_the_training_data_lacks(tokenizer, tmp_path):
    """Also one that would be an id."""
    train = write(tmp_path / "train.csv", ["x,no", "y,yes"], "text,label")
    dev = write(tmp_path / "dev.csv", ["x,no", "y,maybe"], "text,label")
    names = [{"path": str(train), "column": "label"}]
    for word in ("maybe", "1"):
        dev.write_text(f"text,label\nx,no\ny,{word}\n")
        with pytest.raises(
            ValueError, match=rf"dev.csv:3: label '{word}' .* must be one of no, yes"
        ):
            own(tokenizer, dev, label_names=names)
    both = own(tokenizer, [dev, train], label_names=names, on_error="skip")
    assert [row["label"] for row in examples(both)] == [0, 0, 1]
    # An empty label is an error at its line, and no class.
    train.write_text("text,label\nx,no\ny,\nz,yes\n")
    with pytest.raises(ValueError, match=r"train.csv:3: label '' .* must be one of no, yes"):
        own(tokenizer, train, label_names=names)


@pytest.mark.parametrize("ending", ["saved", "parquet"])
def test_data_saved_in_the_format_of_torch(tokenizer, tmp_path, ending):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    data = datasets.Dataset.from_dict(
        {"text": ["x", "y"], "label": [0, 1]}, features=datasets.Features(features)
    ).with_format("torch")
    path = tmp_path / f"a.{ending}"
    data.save_to_disk(str(path)) if ending == "saved" else data.to_parquet(path)
    assert [row["label"] for row in examples(own(tokenizer, path, label_names=["a", "b"]))] == [
        1,
        0,
    ]
    names = {"path": str(path), "column": "label"}
    assert [row["label"] for row in examples(own(tokenizer, path, label_names=names))] == [0, 1]


# Bad input


def changed(tmp_path, name, line, new, encoding="utf-8"):
    """A copy of a GLUE file with one line (from 1) replaced."""
    lines = (GLUE / name).read_text(encoding="utf-8").split("\n")
    lines[line - 1] = new
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode(encoding))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "split", "line", "new", "message"),
    [
        ("cola", "train", 3, "gj\t1\t", r"CoLA/train.tsv:3: 3 columns where there should be 4"),
        ("sst2", "validation", 4, "a\tb\t1", r"SST-2/dev.tsv:4: 3 columns .* be 2"),
        ("sst2", "train", 9, "good\t2", r"SST-2/train.tsv:9: label '2' is out of range: .*0 to 1"),
        ("rte", "train", 2, "0\ta\tb\tentails", r"RTE/train.tsv:2: label 'entails' .*not_entailm"),
        ("rte", "train", 2, "0\ta\tb\t-1", r"RTE/train.tsv:2: label '-1' is out of range"),
        ("stsb", "train", 5, "\t" * 9 + "5.1", r"train.tsv:5: label '5.1' .*number from 0.0 to 5"),
        ("stsb", "train", 5, "\t" * 9 + "nan", r"train.tsv:5: label 'nan' is out of range"),
        ("mrpc", "train", 1, "Quality\ta\tb\t#1 String\tc",
         r"MRPC/train.tsv has no column '#2 String' \(text_pair_column\).*'#1 String', 'c'"),
        ("sst2", "train", 1, "sentence\tlable",
         r"has no column 'label' \(label_column\). Its columns: 'sentence', 'lable'"),
    ],
)  # fmt: skip
def test_broken_official_files(tokenizer, tmp_path, name, split, line, new, message):
    folder = changed(tmp_path, task(name).official_files(split)[0], line, new)
    with pytest.raises(ValueError, match=message):
        glue(tokenizer, name, split, path=folder)
    if line > 1:
        left = examples(glue(tokenizer, name, split, path=folder, on_error="skip"))
        assert len(left) == ROWS[split] - 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "stsbb"}, r"no GLUE task 'stsbb'. Did you mean 'stsb'\? Tasks: cola, sst2"),
        ({"name": "SST-2"}, r"no GLUE task 'SST-2'. Did you mean 'sst2'"),
        ({"name": "mnli", "split": "validation"}, "mnli has no split 'validation'.*_matched"),
        ({"name": "ax", "split": "train"}, "ax has no split 'train'. It has test"),
        ({"path": "./nowhere"}, r"no file or folder './nowhere'"),
        ({"name": "rte", "path": GLUE / "CoLA"}, "has no column 'sentence1'"),
        ({"padding": "left"}, r"padding must be one of .*, got 'left'"),
        ({"on_error": "ignore"}, "on_error must be one of .*, got 'ignore'"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"max_seq_length": 128}, "'max_seq_length' in dataset. Did you mean 'max_seq_len'"),
        ({"max_seq_len": None}, "glue needs the key 'max_seq_len'"),
        ({"loader": {"drop_last": True}, "batch_size": 64}, "leaves no batch: .* 32 samples .* 64"),
    ],
)
def test_bad_glue_keys(tokenizer, keys, message):
    with pytest.raises(ValueError, match=message):
        glue(tokenizer, **keys)


def test_missing_split_file(tokenizer, tmp_path):
    shutil.copytree(GLUE / "CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"No validation split of cola .*CoLA/dev.tsv"):
        glue(tokenizer, "cola", "validation", path=tmp_path)


OWN = {"text": "x", "label": 0}


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, r"There are no examples in .*a.jsonl"),
        ([OWN], {"text_column": "txt"}, r"has no column 'txt' \(text_column\).*'text', 'label'"),
        ([OWN], {"text_pair_column": "b"}, r"has no column 'b' \(text_pair_column\)"),
        ([OWN], {"label_column": "y"}, r"has no column 'y' \(label_column\)"),
        ([OWN, {"label": 1}], {}, r"a.jsonl:2: 'text' should be a text, got NoneType None"),
        ([OWN, {"text": 3, "label": 1}], {}, r"a.jsonl:2: 'text' should be a text, got int 3"),
        ([OWN, {"text": "y", "label": 2}], {"label_names": ["a", "b"]},
         r"a.jsonl:2: label 2 is out of range: it must be one of 0 to 1 \(a, b\)"),
        ([OWN, {"text": "y", "label": -1}], {}, r"a.jsonl:2: label -1 is out of range: .*0, 1, 2"),
        ([OWN, {"text": "y", "label": 0.5}], {}, r"label 0.5 is out of range.*0, 1, 2"),
        ([OWN, {"text": "y"}], {}, r"a.jsonl:2: label None is out of range"),
        ([OWN | {"label": "pos"}, OWN | {"label": "neg"}], {},
         r'labels are words. .*label_names: \["neg", "pos"\]'),
        ([OWN], {"label_names": ["a"], "regression": True}, "both label_names.*: remove one"),
        ([OWN], {"hf_name": "imdb"}, "either path or hf_name"),
        ([OWN], {"colunm": 1}, "Unknown key 'colunm' in dataset"),
    ],
)  # fmt: skip
def test_bad_own_data(tokenizer, tmp_path, rows, keys, message):
    path = write(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    with pytest.raises(ValueError, match=message):
        own(tokenizer, path, **keys)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": ', r"a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: not a JSON object, but int 1"),
        ("a.csv", "text,label\nx,1,2\n", r"a.csv:2: 3 columns where there should be 2"),
        ("a.csv", 'text,label\n"x,1\n', r"a.csv:2: not CSV: unexpected end of data"),
        ("a.csv", "text,label\n", "There are no examples in .*a.csv"),
        ("a.doc", "x", r"a.doc: unknown kind of file; the endings known are .txt .text .raw .csv"),
    ],
)
def test_bad_own_files(tokenizer, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        own(tokenizer, tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        own(tokenizer, tmp_path / "missing.csv")


def test_not_utf8(tokenizer, tmp_path):
    folder = changed(tmp_path, "SST-2/train.tsv", 3, "caf\xe9\t1", encoding="latin-1")
    with pytest.raises(ValueError, match=r"SST-2/train.tsv:3: not UTF-8"):
        glue(tokenizer, "sst2", path=folder)


def test_tokenizer_without_padding(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        TextClassificationCollator(bare, L)
    with pytest.raises(ValueError, match="glue needs a tokenizer"):
        glue(None)


# What a file may hold, and must not be read as something else


def labels(spec) -> list:
    return [row["label"] for row in examples(spec)]


@pytest.mark.parametrize("pair", [("no", "yes"), ("off", "on"), ("1.0", "2.50")])
def test_the_proposal_of_names_survives_yaml(tokenizer, tmp_path, pair):
    path = write(tmp_path / "a.csv", [f"good,{pair[1]}", f"bad,{pair[0]}"], "text,label")
    with pytest.raises(ValueError, match="labels are words") as found:
        own(tokenizer, path)
    line = re.search(r"label_names: \[.*?\]", str(found.value))[0]
    names = OmegaConf.to_container(OmegaConf.create(line))["label_names"]
    assert names == list(pair)
    assert labels(own(tokenizer, path, label_names=names)) == [1, 0]
    bare = OmegaConf.to_container(OmegaConf.create(line.replace('"', "")))["label_names"]
    with pytest.raises(ValueError, match=r"label_names: .* is not a text: YAML reads yes, no"):
        own(tokenizer, path, label_names=bare)


def test_a_label_that_is_no_name_is_no_id_where_names_are_numbers(tokenizer, tmp_path):
    rows = [json.dumps({"text": "x", "label": stars}) for stars in (5, 0, 1)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a.jsonl:2: label 0 .* one of 1, 2, 3, 4, 5"):
        own(tokenizer, path, label_names=[1, 2, 3, 4, 5])
    spec = own(tokenizer, path, label_names=[1, 2, 3, 4, 5], on_error="skip")
    assert labels(spec) == [4, 0]
    truths = write(tmp_path / "b.jsonl", ['{"text": "x", "label": true}'] * 2)
    assert labels(own(tokenizer, truths, label_names=["true", "false"])) == [0, 0]
    assert labels(own(tokenizer, truths)) == [1, 1]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_class_ids_count_by_name(tokenizer, tmp_path, kind):
    """The class names of a saved dataset may have another order than GLUE's or the user's."""
    features = {"label": datasets.ClassLabel(names=["not_entailment", "entailment"])}
    features |= {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    path = tmp_path / f"rte.{kind}"
    data.save_to_disk(str(path)) if kind == "saved" else data.to_parquet(path)
    assert labels(glue(tokenizer, "rte", "train", path=path, shuffle=False)) == [1, 0]
    keys = {"text_column": "sentence1"}
    assert labels(own(tokenizer, path, **keys)) == [0, 1]
    names = ["entailment", "not_entailment"]
    assert labels(own(tokenizer, path, label_names=names, **keys)) == [1, 0]
    with pytest.raises(ValueError, match=r"rte.*, row 0: label 'not_entailment' is out of range"):
        own(tokenizer, path, label_names=["entailment", "other"], **keys)
    plain = write(tmp_path / "a.csv", ["x,0"], "sentence1,label")
    with pytest.raises(ValueError, match="do not have the same classes in 'label'"):
        own(tokenizer, [path, plain], **keys)


def test_other_kinds_of_file(tokenizer, tmp_path):
    rows = [{"text": "half \ud83d of one", "label": 0}, {"text": "x" * 200_000, "label": 1}]
    path = tmp_path / "a [1].json"
    path.write_text(json.dumps(rows, indent=2))
    with pytest.raises(ValueError, match=r"a \[1\].json:2: 'text' holds half of a surrogate"):
        own(tokenizer, path)
    assert labels(own(tokenizer, path, on_error="skip")) == [1]
    (tmp_path / "a.csv").write_text("text;label\ngood;1\n")
    assert labels(own(tokenizer, tmp_path / "a.csv")) == [1]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = examples(own(tokenizer, tmp_path / "a.txt", label_column=None))
    assert [row["text"] for row in found] == ["one", "", "two"]


def test_a_folder_is_not_read_in_place_of_the_hub(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "imdb" / "train.csv", ["x,1"], "text,label")
    with pytest.raises(ValueError, match=r"There is a folder 'imdb' here. Give dataset.path"):
        build(tokenizer, name="text_classification", hf_name="imdb", split="train",
              text_column="text")  # fmt: skip
