"""The table of made-up results, against numpy; the files for the GLUE server."""

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2_plugin import cli
from m2_plugin.glue.recipes import load_sweep
from m2_plugin.glue.report import load_report, to_csv, to_markdown, to_text, write_report
from m2_plugin.glue.submission import TEST_ROWS, format_predictions, write_submission
from m2_plugin.glue.sweep import plan, write_plan
from m2_plugin.glue.tasks import TASKS, task
from tests.utils import ROOT

CONFIG = ROOT / "yamls" / "finetune" / "glue" / "sweep-m2-bert-base.yaml"
ROWS = 5


def values_of(name: str, seed: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng([seed, *name.encode()])
    about = task(name)
    return {
        about.eval_label(split): {metric: float(rng.uniform(0.4, 0.9)) for metric in about.metrics}
        for split in about.eval_splits
    }


def commonest_of(name: str) -> dict[str, dict[str, float]]:
    about = task(name)
    splits = [about.eval_label(split) for split in about.eval_splits]
    return {label: dict.fromkeys(about.metrics, 0.25 + 0.1 * i) for i, label in enumerate(splits)}


def write_result(job, **changes) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "finished", "hash": job.hash, "metrics": values_of(job.task, job.seed)}
    result |= {"commonest_answer": commonest_of(job.task), "constant_predictions": []}
    result["model"] = {"type": "m2_bert", "parameters": 80_267_328}
    (job.folder / "result.json").write_text(json.dumps(result | changes))


@pytest.fixture
def finished(tmp_path):
    """A sweep whose jobs are all finished; the folder and its jobs by name."""
    sweep = load_sweep(CONFIG, ["start=some/checkpoint"])
    jobs = plan(sweep, tmp_path)
    write_plan(sweep, jobs, tmp_path)
    for job in jobs:
        write_result(job)
    return tmp_path, {job.name: job for job in jobs}


def expected_score(jobs, name: str) -> float:
    """As the paper counts: all seeds, splits and counting metrics of a task averaged."""
    counting = task(name).score_metrics
    seeds = [job.seed for job in jobs.values() if job.task == name]
    found = [values_of(name, seed) for seed in seeds]
    return 100 * np.mean([v[s][m] for v in found for s in v for m in counting])


def test_scores_and_average_are_numpys(finished):
    out, jobs = finished
    report = load_report(out)
    scores = {t.task: t.score for t in report.tasks}
    assert len(scores) == 8
    for name, score in scores.items():
        assert score == pytest.approx(expected_score(jobs, name), rel=1e-12), name
    assert report.average == pytest.approx(np.mean(list(scores.values())), rel=1e-12)
    text = to_text(report)
    assert f"{report.average:.1f}" in next(r for r in text.splitlines() if r.startswith("average"))
    assert "79.9" in next(r for r in text.splitlines() if r.startswith("paper"))
    assert "BERT-base 79.6" in text and "M2-BERT-large (341M) 82.8" in text


def test_spread_is_the_sample_standard_deviation(finished):
    out, jobs = finished
    seeds = [job.seed for job in jobs.values() if job.task == "cola"]
    found = [100 * values_of("cola", seed)["cola"]["matthews"] for seed in seeds]
    row = next(r for r in to_text(load_report(out)).splitlines() if r.startswith("CoLA"))
    assert len(found) == 4
    assert f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}" in row and "4/4" in row


def test_a_metric_that_does_not_count_changes_no_score(finished):
    out, jobs = finished
    before = {t.task: t.score for t in load_report(out).tasks}
    for job in jobs.values():
        values = values_of(job.task, job.seed)
        for metrics in values.values():
            for metric in set(metrics) - set(task(job.task).score_metrics):
                metrics[metric] = 0.0
        write_result(job, metrics=values)
    report = load_report(out)
    assert {t.task: t.score for t in report.tasks} == before
    assert "accuracy (not counted)" in to_text(report)


def test_the_csv_holds_every_value(finished):
    out, jobs = finished
    rows = list(csv.DictReader(io.StringIO(to_csv(load_report(out)))))
    values = [r for r in rows if r["metric"] != "score"]
    splits = {name: len(about.eval_splits) * len(about.metrics) for name, about in TASKS.items()}
    assert len(values) == sum(splits[job.task] for job in jobs.values())
    for row in values:
        truth = values_of(row["task"], int(row["seed"]))[row["evaluation"]][row["metric"]]
        assert float(row["percent"]) == 100 * truth
    assert rows[-1]["task"] == "average" and rows[-1]["status"] == "complete"


def test_what_is_missing_is_said_and_not_averaged(finished):
    out, jobs = finished
    (jobs["cola-seed717"].folder / "result.json").unlink()
    error = "ValueError: no such file | or so"
    write_result(jobs["rte-seed19"], status="failed", problem="exit code 1", error=error)
    for seed in (19, 8364, 717, 10536, 90166):
        write_result(jobs[f"mrpc-seed{seed}"], status="blocked", problem="mnli failed")
    write_result(jobs["qqp-seed19"], hash="another")
    undefined = {"stsb": {"spearman": None, "pearson": 0.5}}
    write_result(jobs["stsb-seed8364"], metrics=undefined)
    report = load_report(out)
    tasks = {t.task: t for t in report.tasks}
    assert report.average is None and report.average_text == "incomplete: 3 of 8 tasks"
    for name in ("cola", "rte", "mrpc", "qqp", "stsb"):
        assert tasks[name].score is None and not tasks[name].is_complete
    assert tasks["cola"].note == "not run: seed 717" and len(tasks["cola"].defined) == 3
    assert tasks["rte"].note == "failed: seed 19" and tasks["rte"].problems == {19: error}
    assert tasks["mrpc"].note == "blocked"
    assert tasks["qqp"].note == "other settings"
    assert tasks["stsb"].note == "undefined metric: seed 8364"

    text, markdown = to_text(report), to_markdown(report)
    assert "incomplete: 3 of 8 tasks" in text and "incomplete: 3 of 8 tasks" in markdown
    assert "3/4" in text and error in text
    assert next(r for r in markdown.splitlines() if r.startswith("| RTE")).count("|") == 8
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert rows[-1]["percent"] == "" and rows[-1]["status"] == "incomplete"
    assert len(write_report(report, out)) == 4


def test_the_report_names_the_model_and_what_the_commonest_answer_gives(finished):
    out, jobs = finished
    write_result(jobs["sst2-seed717"], constant_predictions=["sst2"])
    report = load_report(out)
    assert report.model == "m2_bert, 80.3 M parameters, from some/checkpoint"
    assert f"Model: {report.model}" in to_text(report) and report.model in to_markdown(report)
    tasks = {t.task: t for t in report.tasks}
    assert tasks["mnli"].commonest_score == pytest.approx(30)  # the mean of 25 and 35
    assert tasks["sst2"].note == "the same answer to all rows: seed 717"
    assert tasks["sst2"].is_complete
    rows = {(r["task"], r["evaluation"], r["metric"]): r["commonest"] for r in csv.DictReader(
        io.StringIO(to_csv(report))
    )}  # fmt: skip
    assert float(rows["mnli", "mnli_mismatched", "accuracy"]) == pytest.approx(35)
    assert float(rows["mnli", "", "score"]) == pytest.approx(30)
    row = next(r for r in to_text(report).splitlines() if r.startswith("MRPC"))
    assert "25.0" in row


def test_a_result_without_baselines_is_read(finished):
    """As older versions wrote it."""
    out, jobs = finished
    for job in jobs.values():
        result = {"status": "finished", "hash": job.hash}
        result["metrics"] = values_of(job.task, job.seed)
        (job.folder / "result.json").write_text(json.dumps(result))
    report = load_report(out)
    assert report.average is not None and report.model == ""
    assert {t.commonest_score for t in report.tasks} == {None}
    assert len(write_report(report, out)) == 4


def test_a_sweep_of_fewer_tasks_has_no_average(tmp_path):
    text = CONFIG.read_text().replace("include: ", f"include: {CONFIG.parent}/")
    config = tmp_path / "sweep.yaml"
    config.write_text(text)
    sweep = load_sweep(config)
    jobs = [job for job in plan(sweep, tmp_path) if job.task in ("cola", "sst2")]
    write_plan(sweep, jobs, tmp_path)
    for job in jobs:
        write_result(job)
    report = load_report(tmp_path)
    assert report.average is None and report.average_text == "incomplete: 2 of 8 tasks"


def test_the_picture_has_a_point_for_every_seed(finished):
    from m2_plugin.glue.report import _draw
    from m2_plugin.pictures import drawing

    out, jobs = finished
    (jobs["cola-seed717"].folder / "result.json").unlink()
    report = load_report(out)
    with drawing() as figure:
        _draw(report, figure)
    axes = figure.axes[0]
    dots = {
        round(x, 9) for line in axes.lines for x in line.get_xdata() if line.get_marker() == "o"
    }
    scores = {round(score, 9) for t in report.tasks for score in t.defined}
    assert scores <= dots
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].startswith("CoLA") and labels[-1] == "average" and len(labels) == 9
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"mean of an incomplete task", "the commonest answer"} <= named
    ticks = [x for line in axes.lines if line.get_markersize() == 13 for x in line.get_xdata()]
    assert sorted(ticks) == sorted(t.commonest_score for t in report.tasks)
    write_report(report, out)
    assert Image.open(out / "report.png").size == (1200, 1120)


def test_report_only_needs_nothing_but_the_folder(finished, capsys, tmp_path):
    out, _ = finished
    assert cli.main(["glue", "--report-only", "--out", str(out)]) == 0
    assert "GLUE: m2-bert-base" in capsys.readouterr().out
    assert {"report.txt", "report.md", "report.csv", "report.png"} <= {
        p.name for p in out.iterdir()
    }
    assert cli.main(["glue", "--report-only", "--out", str(tmp_path / "none")]) == 1
    assert "There is no sweep in" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------


def test_the_command_names_what_is_wrong(capsys):
    assert cli.main(["glue"]) == 1
    assert "--config is missing" in capsys.readouterr().err
    assert cli.main(["glue", "--config", str(CONFIG), "tasks.colla.lr=1"]) == 1
    assert "Did you mean 'cola'" in capsys.readouterr().err
    assert cli.main(["glue", "--config", str(CONFIG), "--seeds", "one"]) == 1
    assert "--seeds takes whole numbers" in capsys.readouterr().err


def test_overrides_may_follow_a_list():
    from m2_plugin.glue.command import parse

    arguments = parse(["--config", "x", "--tasks", "cola", "sst2", "a=1", "--seeds", "19", "b=2"])
    assert arguments.tasks == ["cola", "sst2"] and arguments.seeds == [19]
    assert sorted(arguments.overrides) == ["a=1", "b=2"]
    assert parse(["a=1", "--start", "x.pt"]).overrides == ["a=1", "start=x.pt"]


def test_the_entry_point_lists_its_commands(capsys):
    assert cli.main([]) == 0
    assert "glue" in capsys.readouterr().out
    assert cli.main(["gleu"]) == 2
    assert "There is no command 'gleu'" in capsys.readouterr().err


# --- for the server ------------------------------------------------------------------------------


@pytest.fixture
def predicted(finished):
    """The sweep with predictions: logits whose largest entry depends on the row and the seed."""
    out, jobs = finished
    for job in jobs.values():
        about = task(job.task)
        labels = {"mnli": ["mnli_matched", "mnli_mismatched", "ax"]}.get(job.task, [job.task])
        (job.folder / "predictions").mkdir()
        for label in labels:
            np.save(job.folder / "predictions" / f"{label}.npy", logits_of(about, job.seed))
        said = {label: {"rows": ROWS} for label in labels}
        write_result(job, predictions=said)
    return out, jobs


def logits_of(about, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *about.name.encode()])
    if about.is_regression:
        return np.array([[-0.2], [0.0], [2.34567], [5.0], [5.7]], dtype=np.float32)
    return rng.normal(size=(ROWS, about.num_labels)).astype(np.float32)


def read(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_submission_has_the_servers_files_and_format(predicted, tmp_path, caplog):
    out, jobs = predicted
    folder = tmp_path / "submission"
    files = write_submission(out, folder)
    expected = set(TEST_ROWS)
    assert {p.name for p in files} == {p.name for p in folder.iterdir()}
    assert {p.name for p in files} == expected | {"submission.zip"}
    with zipfile.ZipFile(folder / "submission.zip") as archive:
        assert set(archive.namelist()) == expected
        assert archive.read("CoLA.tsv") == (folder / "CoLA.tsv").read_bytes()
    for name in expected - {"WNLI.tsv"}:
        rows = read(folder / name)
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(i) for i in range(ROWS)]
        assert f"{name} has {ROWS} rows" in caplog.text
    stsb = [row[1] for row in read(folder / "STS-B.tsv")[1:]]
    assert stsb == ["0.000", "0.000", "2.346", "5.000", "5.000"]
    assert {row[1] for row in read(folder / "RTE.tsv")[1:]} <= {"entailment", "not_entailment"}
    mnli = jobs["mnli-seed19"]
    names = ("entailment", "neutral", "contradiction")
    for file in ("MNLI-m.tsv", "AX.tsv"):
        predictions = [row[1] for row in read(folder / file)[1:]]
        assert predictions == [names[i] for i in logits_of(task("mnli"), mnli.seed).argmax(1)]
    wnli = read(folder / "WNLI.tsv")
    assert len(wnli) == 147 and {row[1] for row in wnli[1:]} == {"0"}


def test_submission_takes_the_seed_that_is_best_on_the_development_set(predicted, tmp_path):
    out, jobs = predicted
    scores = {
        job.seed: values_of("cola", job.seed)["cola"]["matthews"]
        for job in jobs.values()
        if job.task == "cola"
    }
    best = max(scores, key=scores.get)
    write_submission(out, tmp_path / "submission")
    rows = [row[1] for row in read(tmp_path / "submission" / "CoLA.tsv")[1:]]
    assert rows == [str(i) for i in logits_of(task("cola"), best).argmax(1)]
    others = [logits_of(task("cola"), seed).argmax(1) for seed in scores if seed != best]
    assert any(rows != [str(i) for i in other] for other in others)


def test_an_incomplete_submission_names_all_that_is_missing(predicted, tmp_path):
    out, jobs = predicted
    folder = tmp_path / "submission"
    problem: dict = {"mnli_matched": {"rows": ROWS}, "mnli_mismatched": {"rows": ROWS}}
    problem["ax"] = {"error": "there is no file AX/AX.tsv below /data"}
    write_result(jobs["mnli-seed19"], predictions=problem)
    write_result(jobs["qnli-seed19"])
    write_result(jobs["rte-seed19"], status="failed")
    with pytest.raises(ValueError, match="No submission") as caught:
        write_submission(out, folder)
    message = str(caught.value)
    assert "AX.tsv: mnli-seed19 could not read the test file: there is no file AX" in message
    assert "QNLI.tsv: qnli-seed19 has no predictions" in message
    assert "rte is not finished (failed: seed 19)" in message
    assert not folder.exists()


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if not t.is_regression])
def test_classes_are_written_as_the_official_files_do(name):
    about = task(name)
    text = format_predictions(about, np.eye(about.num_labels))
    assert [line.split("\t")[1] for line in text.splitlines()[1:]] == list(about.official_labels)
