"""The names of classes: read from data of every kind, the same each time, or refused."""

import json
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf

from m2_plugin.data.labels import answers, label_names, names_of_config
from tests.utils import write_rows


def read(path, column="label", **more):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return label_names([{"path": path, "column": column, **more}], "model.label_names")


def labels_of(tmp_path, labels, ending="jsonl"):
    rows = [{"text": "x", "label": label} for label in labels]
    if ending == "csv":
        path = tmp_path / "a.csv"
        path.write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
        return path
    return write_rows(tmp_path / "a.jsonl", rows)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["so so", "good", "bad"], ["bad", "good", "so so"]),
        (["yes", "no"], ["no", "yes"]),  # which a YAML would read as booleans
        (["on", "off"], ["off", "on"]),
        ([0, 2, 1], ["0", "1", "2"]),
        ([5, 1, 10, 2], ["1", "2", "5", "10"]),  # stars
        ([-1, 1], ["-1", "1"]),
        (["1", "a"], ["1", "a"]),
    ],
)
def test_the_labels_that_occur(tmp_path, labels, names, ending):
    for _ in range(3):
        random.shuffle(labels)
        assert read(labels_of(tmp_path, labels * 2, ending)) == names


def test_rows_without_a_label_and_booleans(tmp_path):
    assert read(labels_of(tmp_path, [True, False, None, ""])) == ["false", "true"]
    assert read(labels_of(tmp_path, [["B-PER", "O"], ["O"], []])) == ["B-PER", "O"]


def test_several_files_and_another_reader(tmp_path):
    first = write_rows(tmp_path / "1.jsonl", [{"y": "b"}, {"y": "a"}])
    second = write_rows(tmp_path / "2.jsonl", [{"y": "c"}, {"y": "a"}])
    assert read([first, second], "y") == ["a", "b", "c"]
    names = label_names(
        {"path": "x.conll", "column": "tag"}, "k", lambda *_: [("x:1", ["O", "B-LOC"])]
    )
    assert names == ["B-LOC", "O"]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_stored_classes_keep_their_order(tmp_path, kind):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    data = datasets.Dataset.from_dict(
        {"text": ["x", "y"], "label": [0, 0]}, features=datasets.Features(features)
    )
    path = tmp_path / f"a.{kind}"
    data.save_to_disk(str(path)) if kind == "saved" else data.to_parquet(path)
    assert read(path) == ["b", "a"]
    if kind == "saved":
        datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "all"))
        assert read(tmp_path / "all", split="train") == ["b", "a"]
    with pytest.raises(ValueError, match="do not have the same classes in 'label': list them"):
        read([path, labels_of(tmp_path, ["a", "b"])])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (list(range(1001)), "more than 1000 different labels. For numbers .* regression to true"),
        ([f"text {i}" for i in range(30)], "30 different labels in 30 rows. For numbers"),
        ([0.5, 1.0, 0.5], r"numbers such as 0.5. For numbers to predict set regression to true"),
        (["a", "a"], "only the label 'a': a classifier needs two or more"),
        ([None, ""], "no labels: a classifier needs two or more"),
        (["good", "Good ", "bad"], "both 'Good ' and 'good': make them one"),
        (["1", "1.0", "2"], "both '1' and '1.0': make them one"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
    path = labels_of(tmp_path, labels)
    with pytest.raises(ValueError, match=rf"^model.label_names: column 'label' of .*{message}"):
        read(path)


def test_what_else_is_refused(tmp_path):
    path = labels_of(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"no column 'y'. Its columns: 'text', 'label'"):
        read(path, "y")
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="Unknown key 'colunm' in d.label_names"):
        label_names({"path": "a", "colunm": "label"}, "d.label_names")
    with pytest.raises(ValueError, match="name the path of the data and the column"):
        label_names({"path": "a"}, "d.label_names")
    for names in ("a", []):
        with pytest.raises(ValueError, match="must be a list of names"):
            label_names(names, "d.label_names")
    with pytest.raises(ValueError, match="False is not a text: YAML reads yes, no.* in quotes"):
        label_names(OmegaConf.create("[no, yes]"), "d.label_names")
    with pytest.raises(ValueError, match="each name once"):
        label_names(["a", "a"], "d.label_names")
    assert label_names(None, "d") is None and label_names([3, "a"], "d") == ["3", "a"]


def test_a_list_on_the_command_line_replaces_the_names_in_the_data():
    """A mapping outside of a list would be an error of OmegaConf there."""
    config = OmegaConf.create("label_names: [{path: a.csv, column: label}]")
    merged = OmegaConf.merge(config, OmegaConf.from_cli(["label_names=[a,b]"]))
    assert label_names(OmegaConf.to_container(merged)["label_names"], "k") == ["a", "b"]
    assert OmegaConf.merge(config, OmegaConf.from_cli(["label_names=null"])).label_names is None


def test_answers():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 30
    names = ["a", "b", "c"]
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    for row, share in zip(answers(logits, names, False), powers, strict=True):
        assert list(row) == ["prediction", "probability_a", "probability_b", "probability_c"]
        assert row["prediction"] == names[share.argmax()]
        found = [row[f"probability_{name}"] for name in names]
        np.testing.assert_allclose(found, share / share.sum(), rtol=1e-6, atol=1e-38)
    # The shortest numbers that are still the float32, also after JSON.
    scores = np.float32([[0.1], [-1e30], [1 / 3]])
    found = [json.loads(json.dumps(row))["score"] for row in answers(scores, ["x"], True)]
    assert found[0] == 0.1 and np.array_equal(np.float32(found), scores[:, 0])


def test_names_of_a_config():
    def config(*names):
        return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))

    assert names_of_config(config("b", "a")) == ["b", "a"]
    assert names_of_config(config("LABEL_0", "LABEL_1")) is None
