"""`m2-plugin train-report`: from the files that loggers write to curves, pictures and a page."""

import base64
import io
import itertools
import json
import logging
import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from m2_plugin.cli import main
from m2_plugin.pictures import DARK, LIGHT, drawing
from m2_plugin.train_report.command import write_report
from m2_plugin.train_report.draw import PANELS, _Panel, draw
from m2_plugin.train_report.runs import Run, load_runs, summarize, tokenizers_differ

PICTURES = ["loss.png", "learning_rate.png", "throughput.png", "memory.png"]
START = 1.7e9
_processes = itertools.count(100)


def metrics(batch: int, shift: float = 0.0) -> list[tuple[str, int, float]]:
    """Return what Composer logs for one batch, with Composer's batch numbers."""
    return [
        ("time/batch", batch, batch),
        ("time/token", batch, 1000 * batch),
        ("loss/train/total", batch, 5 - batch / 100 + shift),
        ("lr-DecoupledAdamW/group0", batch + 1, 1e-3 * batch),
        ("throughput/tokens_per_sec", batch + 1, 500.0 + batch),
        ("throughput/device/tokens_per_sec", batch + 1, 250.0),
        ("network_bytes_sent", batch, 1.0),
    ]


def log_events(
    folder: Path,
    batches: range,
    shift: float = 0.0,
    start: float = START,
    extra: tuple[tuple[str, float], ...] = (),
) -> None:
    """Write event files like Composer's logger: a new one every ten batches."""
    writer = SummaryWriter(str(folder))
    for batch in batches:
        wall = start + batch - batches.start
        for tag, step, value in metrics(batch, shift):
            writer.add_scalar(tag, value, step, walltime=wall)
        if (batch + 1) % 20 == 0:
            loss = 4 - batch / 100 + shift
            writer.add_scalar("metrics/eval/LanguageCrossEntropy", loss, batch + 1, walltime=wall)
        if batch % 10 == 0:
            writer.flush()
            writer.close()
    for tag, value in extra:
        writer.add_scalar(tag, value, batches.stop, walltime=start + len(batches))
    writer.close()
    rename(folder)


def rename(folder: Path) -> None:
    """Rename new files like those of a separate process."""
    process = next(_processes)
    for path in folder.glob("events*.*"):
        if ".host." not in path.name:
            count = path.name.rpartition(".")[2]
            path.rename(path.with_name(f"events.out.tfevents.{process}.host.{process}.{count}"))


def one(folder: Path) -> Run:
    (run,) = load_runs([folder])
    return run


def is_in_order(run: Run) -> bool:
    return all((np.diff(series.steps) > 0).all() for series in run.series.values())


def test_reads_what_tensorboard_holds(tmp_path):
    log_events(tmp_path / "run" / "small", range(40), extra=(("memory/peak_allocated_mem", 1.5),))
    run = one(tmp_path)
    assert (run.name, run.sources) == ("small", ["TensorBoard"])
    np.testing.assert_allclose(run.get("loss/train/total").values, 5 - np.arange(40) / 100)
    assert "network_bytes_sent" not in run.series
    row = summarize(run, "tokens")
    assert (row.batches, row.attempts) == (40, 1)
    assert row.train_loss == pytest.approx(4.62, abs=1e-3)  # the mean of the last three
    assert row.eval_loss == row.best_eval_loss == pytest.approx(3.61)
    assert (row.best_eval_batch, row.device_rate) == (40, 250)
    assert (row.memory, row.memory_kind) == (1.5, "GPU")
    assert row.hours == pytest.approx(40 / 3600)


def test_a_resumed_run_has_each_batch_once_as_trained_last(tmp_path):
    log_events(tmp_path, range(55))
    log_events(tmp_path, range(40, 50), shift=0.25, start=START + 1000)
    run = one(tmp_path)
    assert is_in_order(run)
    loss = run.get("loss/train/total")
    assert loss.steps.tolist() == list(range(50))  # 50 to 54 are lost work
    expected = 5 - np.arange(50) / 100 + 0.25 * (np.arange(50) >= 40)
    np.testing.assert_allclose(loss.values, expected, rtol=1e-6)
    # The evaluation at the batch of the checkpoint is not repeated, and stays.
    assert run.evals()["eval"].steps.tolist() == [20, 40]
    row = summarize(run, "tokens")
    assert (row.attempts, row.batches) == (2, 50)
    assert row.hours == pytest.approx((54 + 9) / 3600)  # without the pause
    hours = run.x(loss, "time")
    assert (np.diff(hours) > 0).all() and hours[-1] == pytest.approx(63 / 3600)
    np.testing.assert_allclose(run.x(loss, "tokens"), 1000 * np.arange(50))


def test_a_resume_that_repeats_nothing_is_an_attempt_too(tmp_path):
    log_events(tmp_path, range(20))
    log_events(tmp_path, range(22, 30), start=START + 100)  # two batches were never written
    assert len(one(tmp_path).starts) == 2


def test_a_file_cut_off_by_a_kill_gives_what_is_whole(tmp_path, caplog):
    log_events(tmp_path / "cut", range(30))
    last = max((tmp_path / "cut").iterdir(), key=lambda path: int(path.suffix[1:]))
    last.write_bytes(last.read_bytes()[:-20])
    (tmp_path / "cut" / "events.out.tfevents.1.other.9.0").write_bytes(b"not an event file at all")
    with caplog.at_level(logging.WARNING):
        run = one(tmp_path)
    assert len(run.get("loss/train/total")) == 30
    assert len(run.get("throughput/tokens_per_sec")) in (29, 30)
    assert f"{last} is whole only up to byte" in caplog.text
    assert "events.out.tfevents.1.other.9.0 is whole only up to byte 0 of" in caplog.text


def test_processes_that_write_at_once_are_not_mixed(tmp_path, caplog):
    log_events(tmp_path, range(30))
    log_events(tmp_path, range(30), shift=1.0, start=START + 0.5)
    with caplog.at_level(logging.WARNING):
        run = one(tmp_path)
    assert "several processes at once" in caplog.text
    assert len(run.starts) == 1 and run.get("loss/train/total").values[0] == 5


def lay_mlflow(root: Path, name: str, batches: range, start: float, shift: float = 0.0) -> None:
    """Write a file store in MLflow's layout."""
    folder = root / "mlruns" / "42" / f"{name}-{start:.0f}"
    for sub in ("metrics", "params", "tags"):
        (folder / sub).mkdir(parents=True)
    (folder / "meta.yaml").write_text(f"run_id: x\nrun_name: {name}\n")
    (folder / "params" / "optimizer").write_text("{'name': 'adamw', 'lr': 0.001}")
    for batch in batches:
        for tag, step, value in metrics(batch, shift):
            path = folder / "metrics" / tag
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{1000 * (start + batch):.0f} {value} {step}\n")


def test_reads_an_mlflow_store_with_a_run_for_each_attempt(tmp_path):
    lay_mlflow(tmp_path, "small", range(30), START)
    lay_mlflow(tmp_path, "small", range(20, 40), START + 500, shift=0.5)
    run = one(tmp_path)
    assert (run.name, run.sources, len(run.starts)) == ("small", ["MLflow"], 2)
    assert is_in_order(run)
    loss = run.get("loss/train/total")
    np.testing.assert_allclose(loss.values, 5 - np.arange(40) / 100 + 0.5 * (loss.steps >= 20))
    assert run.parameters == {"optimizer.name": "adamw", "optimizer.lr": "0.001"}


def test_reads_what_mlflow_itself_writes(tmp_path):
    from mlflow.entities import Metric, Param
    from mlflow.store.tracking.file_store import FileStore

    store = FileStore(str(tmp_path / "mlruns"))
    created = store.create_run("0", "me", 0, [], "of-mlflow")
    for batch in range(3):
        metric = Metric("loss/train/total", 3.0 - batch, 1700000000000 + batch, batch)
        store.log_metric(created.info.run_id, metric)
    store.log_param(created.info.run_id, Param("seed", "17"))
    run = one(tmp_path)
    assert (run.name, run.parameters) == ("of-mlflow", {"seed": "17"})
    assert run.get("loss/train/total").values.tolist() == [3, 2, 1]


def test_reads_an_offline_file_of_wandb(tmp_path, caplog):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    wandb._set_internal_process(disable=True)
    store = DataStore()
    store.open_for_write(str(tmp_path / "run-1.wandb"))
    record = Record()
    record.run.run_id, record.run.display_name = "1", "of-wandb"
    item = record.run.config.update.add()
    item.key, item.value_json = "optimizer", json.dumps({"lr": 1e-3})
    records = [record]
    for batch in range(5):
        record = Record()
        for tag, value in [("_step", batch), ("_timestamp", START), ("loss/train/total", 1.5)]:
            item = record.history.item.add()
            item.nested_key.append(tag)
            item.value_json = json.dumps(value)
        records.append(record)
    for record in records:
        store._write_data(record.SerializeToString())
    store.close()
    file = tmp_path / "run-1.wandb"
    run = one(tmp_path)
    assert (run.name, run.parameters) == ("of-wandb", {"optimizer.lr": "0.001"})
    assert run.get("loss/train/total").steps.tolist() == [0, 1, 2, 3, 4]
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert len(one(tmp_path).get("loss/train/total")) == 4
    assert "run-1.wandb is not whole" in caplog.text


def write_csv(folder: Path, batches: int = 30) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["batch,curve,loss", "0,unigram_entropy,3.5"]
    rows += [f"{batch},train,{5 - batch / 100}" for batch in range(1, batches + 1)]
    rows += [f"{batches},eval,4.5"]
    (folder / "loss_curve.csv").write_text("\n".join(rows) + "\n")


def test_the_loss_curve_alone_is_enough(tmp_path):
    write_csv(tmp_path / "small")
    rows, files = write_report([tmp_path / "small"])
    assert rows[1][:5] == ["small", "30", "4.710", "4.500", "4.500 at 30"]
    assert rows[1][5:] == ["–"] * 6
    assert files[-1] == tmp_path / "small" / "report" / "report.html"
    with pytest.raises(ValueError, match="--x time needs times.*: small has none"):
        write_report([tmp_path / "small"], axis="time")


def test_a_logger_is_believed_before_the_loss_curve(tmp_path):
    log_events(tmp_path / "run" / "small", range(40))
    write_csv(tmp_path / "run", batches=99)
    run = one(tmp_path)
    assert run.sources == ["TensorBoard"] and len(run.get("loss/train/total")) == 40
    assert not any(tag.startswith("baseline/") for tag in run.series)


def test_the_loss_curve_fills_in_for_a_logger_without_losses(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run" / "small"))
    writer.add_scalar("lr-Adam/group0", 1e-3, 1)
    writer.close()
    write_csv(tmp_path / "run")
    run = one(tmp_path / "run")
    assert run.sources == ["TensorBoard", "loss_curve.csv"]
    assert run.evals()["eval"].values.tolist() == [4.5]


class Page(HTMLParser):
    VOID = {"meta", "img", "source", "link", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_pictures_and_a_page_that_needs_nothing_else(tmp_path, capsys):
    name = "<b>&\"small\" 'x' $\\frac$"
    log_events(tmp_path / "runs" / name, range(40))
    out = tmp_path / "out"
    assert main(["train-report", str(tmp_path / "runs"), "--out", str(out), "--x", "tokens"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == sorted([*PICTURES, "report.html"])
    for picture in PICTURES:
        image = Image.open(out / picture)
        image.load()
        assert image.size == (1200, 800)
        assert len(set(image.convert("L").getdata())) > 10
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.references) == 8  # light and dark
    for reference in page.references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert name in page.text


def test_hyperparameters_are_those_of_the_folder_below(tmp_path):
    log_events(tmp_path / "small", range(20))
    values = {"seed": "17", "optimizer": '{ "name": "adamw", "lr": 0.0010, }', "max": 3.0}
    writer = SummaryWriter(str(tmp_path / "small" / "small"))
    for summary in hparams(values, {"hparams/loss/train/total": None}):
        writer._get_file_writer().add_summary(summary)
    writer.add_scalar("hparams/loss/train/total", 99.0)
    writer.close()
    run = one(tmp_path)
    assert run.parameters == {
        "seed": "17", "optimizer.name": "adamw", "optimizer.lr": "0.0010", "max": "3",
    }  # fmt: skip
    _, files = write_report([tmp_path])
    text = Page(files[-1].read_text()).text
    assert "optimizer.lr" in text and "99" not in text.split("Hyperparameters")[1]


def write_config(folder: Path, **keys: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"run_name": "named", "model": {"name": "m2_bert_mlm"}, "train_loader": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | keys))


def test_settings_stand_beside_the_logs_or_above_them(tmp_path):
    log_events(tmp_path / "a", range(20))
    write_config(tmp_path / "a", optimizer={"lr": 1.25e-6, "betas": [0.9, 0.98]})
    log_events(tmp_path / "b" / "below", range(20))  # where Composer's logger writes
    write_config(tmp_path / "b", run_name="second", seed=3)
    write_csv(tmp_path / "c")
    write_config(tmp_path / "c", run_name="third")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("hydra: true\n")
    runs = {run.name: run for run in load_runs([tmp_path])}
    assert set(runs) == {"named", "second", "third"}
    assert runs["named"].parameters["optimizer.lr"] == "1.25e-06"
    assert runs["named"].parameters["optimizer.betas"] == "[0.9, 0.98]"
    assert runs["second"].parameters["seed"] == "3"
    assert runs["third"].sources == ["loss_curve.csv"]


def test_other_tokenizers_are_noted(tmp_path, capsys):
    for name, tokenizer in (("a", "one"), ("b", "two"), ("c", "one")):
        log_events(tmp_path / name, range(20))
        write_config(tmp_path / name, run_name=name, tokenizer={"name": tokenizer})
    note = "different tokenizers"
    folders = [str(tmp_path / name) for name in "abc"]
    out = str(tmp_path / "out")
    assert main(["train-report", folders[0], folders[2], "--out", out]) == 0
    assert note not in capsys.readouterr().err
    assert note not in (tmp_path / "out" / "report.html").read_text()
    assert main(["train-report", *folders, "--out", out]) == 0
    assert note in (tmp_path / "out" / "report.html").read_text()
    runs = load_runs([Path(folder) for folder in folders])
    assert tokenizers_differ(runs) and not tokenizers_differ(runs[::2])


def test_a_baseline_belongs_to_its_run(tmp_path):
    values = {"a": 6.5, "b": 7.25}
    for name, value in values.items():
        extra = (("baseline/unigram_entropy", value), ("baseline/shared", 1.0))
        log_events(tmp_path / name, range(20), extra=extra)
    runs = load_runs([tmp_path])
    with drawing() as figure:
        panel = _Panel(figure, runs, "batch", LIGHT)
        PANELS["loss"][1](panel)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for run, color in zip(runs, panel.colors, strict=True):
        line = lines[f"unigram entropy of {run.name}: {values[run.name]:.3f}"]
        assert line.get_color() == color and set(line.get_ydata()) == {values[run.name]}
    assert lines["shared: 1.000"].get_color() == LIGHT.faint


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_legend_has_the_colours_of_its_picture(theme, tmp_path):
    log_events(tmp_path / "small", range(20))
    with drawing(theme) as figure:
        PANELS["loss"][1](_Panel(figure, [one(tmp_path)], "batch", theme))
    legend = figure.axes[0].get_legend()
    assert to_hex(legend.get_frame().get_facecolor()) == theme.paper
    assert {text.get_color() for text in legend.get_texts()} == {theme.ink}


def test_the_loss_of_a_regression_is_a_squared_error(tmp_path):
    folder = tmp_path / "numbers"
    folder.mkdir()
    (folder / "loss_curve.csv").write_text("batch,curve,mse\n1,train,2.0\n1,eval,1.5\n")
    run = one(folder)
    assert run.evals()["eval"].values.tolist() == [1.5]
    with drawing() as figure:
        PANELS["loss"][1](_Panel(figure, [run], "batch", LIGHT))
    assert figure.axes[0].get_ylabel() == "loss (mean squared error)"
    write_report([folder])
    assert "Losses in mean squared error" in (folder / "report" / "report.html").read_text()


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        log_events(tmp_path / folder / "run" / "small", range(30), shift=float(folder == "b"))
    write_csv(tmp_path / "c" / "other")
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    names = [run.name for run in load_runs(folders)]
    assert names == ["small (a)", "small (b)", "other"]
    rows, files = write_report(folders, out=tmp_path / "all")
    assert [row[0] for row in rows] == ["run", *names]
    assert "small (b)" in Page(files[-1].read_text()).text
    # One folder with several runs, and the same folder twice.
    assert sorted(run.name for run in load_runs([tmp_path, tmp_path])) == [
        "other", "small (a/run/small)", "small (b/run/small)",
    ]  # fmt: skip


def test_what_was_not_logged_is_said(tmp_path):
    write_csv(tmp_path / "small")
    texts = {}
    for name, (_, function) in PANELS.items():
        with drawing() as figure:
            function(_Panel(figure, [one(tmp_path)], "batch", LIGHT))
        texts[name] = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "not logged" not in texts["loss"]
    for name, callback in (
        ("learning_rate", "lr_monitor"), ("throughput", "speed_monitor"),
        ("memory", "memory_monitor"),
    ):  # fmt: skip
        assert "not logged" in texts[name] and callback in texts[name]


def test_a_diverged_run_is_drawn_and_named(tmp_path):
    log_events(tmp_path, range(30))
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss/train/total", float("nan"), 30, walltime=START + 60)
    writer.close()
    run = one(tmp_path)
    assert np.isnan(summarize(run, "tokens").train_loss)
    assert Image.open(io.BytesIO(draw("loss", [run]))).size == (1200, 800)


def test_a_long_run_is_thinned_without_losing_its_peaks(tmp_path):
    from m2_plugin.train_report.draw import DRAWN, _thin

    values = np.ones(70_000)
    values[[12_345, 54_321]] = 9, -9
    x, y = _thin(np.arange(70_000.0), values)
    assert len(x) <= DRAWN + 2 and (np.diff(x) > 0).all()
    assert (y.max(), y.min(), x[0], x[-1]) == (9, -9, 0, 69_999)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_with_nothing_to_read_is_an_error(there, tmp_path, capsys):
    folder = tmp_path / "empty"
    if there:
        folder.mkdir()
    assert main(["train-report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert repr(str(folder)) in error
    if there:
        assert all(word in error for word in ("TensorBoard", "MLflow", "loss_curve.csv"))
        assert not list(folder.iterdir())


BOMB = "{a: &a [x,x,x,x,x,x,x,x,x]" + "".join(
    f", {new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefghi")
)


@pytest.mark.timeout(60)
def test_hostile_logs_are_drawn(tmp_path, capsys):
    """They neither hang the command nor end it; what is whole in them is drawn."""
    lay_mlflow(tmp_path, "odd", range(30), START)
    (run,) = (path.parent for path in tmp_path.rglob("metrics"))
    (run / "meta.yaml").write_text(json.dumps({"run_name": "odd \udcff\x1b[31m"}))
    losses = run / "metrics" / "loss" / "train" / "total"
    with losses.open("a") as file:
        file.write(f"1 1 {2**63}\n{10**400} 1 31\n")
        file.write("1700000060000 1e308 32\n1700000061000 -1e308 33\n")
    (run / "params" / "bomb").write_text(BOMB + "}")
    (run / "params" / "deep").write_text("{a:" * 3000 + "1" + "}" * 3000)
    (run / "params" / "seed").write_text("17")
    os.mkfifo(run / "params" / "pipe")
    for name in ("loss_curve.csv", "events.out.tfevents.1.host.2.0", "run-1.wandb"):
        os.mkfifo(tmp_path / name)
    (found,) = load_runs([tmp_path])
    assert found.name == "odd ??[31m" and found.parameters["seed"] == "17"
    assert found.parameters["bomb"] == BOMB + "}"
    assert main(["train-report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert Image.open(tmp_path / "report" / "loss.png").size[0] > 0
