"""The table of a sweep as text, Markdown, CSV and a picture, from the results of its jobs.

As in the paper, the score of a task is the mean of the final evaluation over its seeds, evaluation
splits and counting metrics, and the average is the unweighted mean over the eight tasks. The table
shows a task with missing seeds, and a note names them. The average is shown when all tasks are
complete.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2_plugin.files import read_json, write_atomically
from m2_plugin.glue import tasks as glue_tasks
from m2_plugin.glue.job import BLOCKED, FAILED, FINISHED, job_name
from m2_plugin.pictures import LIGHT, drawing, to_png

__all__ = ["Report", "TaskReport", "load_report", "write_report"]

# The paper's averages on the development sets (arXiv 2310.12109), in percent.
PAPER_AVERAGES = {
    "M2-BERT-base (80M)": 79.9,
    "M2-BERT-base (110M)": 80.9,
    "M2-BERT-large (260M)": 82.2,
    "M2-BERT-large (341M)": 82.8,
    "BERT-base": 79.6,
    "BERT-large": 82.1,
}
# The tasks that the average counts.
SCORED = tuple(name for name, task in glue_tasks.TASKS.items() if task.score_metrics)
MISSING = "missing"
OTHER_SETTINGS = "other settings"
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews",
    "spearman": "Spearman",
    "pearson": "Pearson",
}


@dataclass(frozen=True)
class TaskReport:
    """The results of one task.

    Attributes:
        task: The name of the task.
        seeds: The seeds of the plan.
        statuses: By seed: finished, failed, blocked, missing (not run yet), or other settings (the
            result belongs to settings that the plan no longer has).
        problems: The reason by seed, for seeds that failed or were blocked.
        values: In percent, by (evaluation label, metric) and seed; None if undefined.
        scores: In percent, by finished seed: the mean over splits and counting metrics; None if
            one of them is undefined.
        commonest: In percent, by (evaluation label, metric): a model that always gives the
            commonest class of the development set, or the mean of its numbers.
        constant: The finished seeds whose model gave the same answer to all rows of a split.
    """

    task: str
    seeds: tuple[int, ...]
    statuses: dict[int, str]
    problems: dict[int, str]
    values: dict[tuple[str, str], dict[int, float | None]]
    scores: dict[int, float | None]
    commonest: dict[tuple[str, str], float]
    constant: tuple[int, ...] = ()

    @property
    def commonest_score(self) -> float | None:
        """The score of the commonest answer; None if it is not known."""
        counting = glue_tasks.task(self.task).score_metrics
        found = [self.commonest.get(key) for key in self.values if key[1] in counting]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None

    @property
    def defined(self) -> list[float]:
        """The scores of the seeds that have one."""
        return [score for score in self.scores.values() if score is not None]

    @property
    def is_complete(self) -> bool:
        """Whether every seed has a score."""
        return bool(self.seeds) and len(self.defined) == len(self.seeds)

    @property
    def score(self) -> float | None:
        """The mean of the scores; None unless complete."""
        return statistics.fmean(self.defined) if self.is_complete else None

    @property
    def note(self) -> str:
        """What is missing or wrong; empty if nothing is."""
        parts = []
        for status in (FAILED, BLOCKED, MISSING, OTHER_SETTINGS):
            seeds = [str(seed) for seed in self.seeds if self.statuses[seed] == status]
            name = {FAILED: "failed", BLOCKED: "blocked", MISSING: "not run"}.get(status, status)
            if len(seeds) == len(self.seeds):
                parts.append(name)
            elif seeds:
                parts.append(f"{name}: seed {', '.join(seeds)}")
        undefined = [str(seed) for seed, score in self.scores.items() if score is None]
        if undefined:
            parts.append(f"undefined metric: seed {', '.join(undefined)}")
        if self.constant:
            same = ", ".join(map(str, self.constant))
            parts.append(f"the same answer to all rows: seed {same}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Report:
    """The results of a sweep.

    Attributes:
        name: The name of the sweep.
        paper_average: The paper's average for this model in percent, or None.
        tasks: One entry per task of the plan.
        model: The model: its type, its size, and the checkpoint; empty if no job has finished.
    """

    name: str
    paper_average: float | None
    tasks: tuple[TaskReport, ...]
    model: str = ""

    @property
    def average(self) -> float | None:
        """The paper's score: None unless all eight tasks are complete."""
        scores = {task.task: task.score for task in self.tasks}
        if set(scores) != set(SCORED) or any(scores[name] is None for name in SCORED):
            return None
        return statistics.fmean(score for score in scores.values() if score is not None)

    @property
    def average_text(self) -> str:
        """The average, or why there is none."""
        if self.average is not None:
            return f"{self.average:.1f}"
        complete = sum(task.is_complete for task in self.tasks)
        return f"incomplete: {complete} of {len(SCORED)} tasks"


def load_report(out: Path) -> Report:
    """Read the plan and the results of a sweep.

    Args:
        out: The folder of the sweep.

    Raises:
        ValueError: If no sweep was started there.
    """
    plan = read_json(out / "plan.json", missing_ok=True)
    if plan is None:
        raise ValueError(f"There is no sweep in {str(out)!r}: plan.json is missing.")
    seeds: dict[str, list[dict[str, Any]]] = {}
    for job in plan["jobs"]:
        seeds.setdefault(job["task"], []).append(job)
    order = [name for name in glue_tasks.TASKS if name in seeds]
    names = [job_name(job["task"], job["seed"]) for job in plan["jobs"]]
    results = [read_json(out / name / "result.json", missing_ok=True) for name in names]
    return Report(
        name=plan["name"],
        paper_average=plan.get("paper_average"),
        tasks=tuple(_task_report(out, name, seeds[name]) for name in order),
        model=_model_text(plan, [result for result in results if result]),
    )


def _model_text(plan: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    model = next((result["model"] for result in results if result.get("model")), None)
    if model is None:
        return ""
    text = f"{model['type']}, {model['parameters'] / 1e6:,.1f} M parameters"
    if not plan.get("pretrained", True):
        return f"{text}, from random weights"
    return f"{text}, from {plan['start']}" if plan.get("start") else text


def _task_report(out: Path, name: str, jobs: Sequence[Mapping[str, Any]]) -> TaskReport:
    task = glue_tasks.task(name)
    statuses: dict[int, str] = {}
    problems: dict[int, str] = {}
    scores: dict[int, float | None] = {}
    values: dict[tuple[str, str], dict[int, float | None]] = {
        (task.eval_label(split), metric): {}
        for split in task.eval_splits
        for metric in task.metrics
    }
    commonest: dict[tuple[str, str], float] = {}
    constant: list[int] = []
    for job in jobs:
        seed = job["seed"]
        result = read_json(out / job_name(name, seed) / "result.json", missing_ok=True)
        status = MISSING if result is None else result["status"]
        if status == FINISHED and result["hash"] != job["hash"]:
            status = OTHER_SETTINGS
        statuses[seed] = status
        if status in (FAILED, BLOCKED):
            problems[seed] = result.get("error") or result.get("problem", "")
        if status != FINISHED:
            continue
        if result.get("constant_predictions"):
            constant.append(seed)
        given = result.get("commonest_answer", {})
        for label, metric in values:
            if (value := given.get(label, {}).get(metric)) is not None:
                commonest[label, metric] = 100 * value
            value = result["metrics"].get(label, {}).get(metric)
            values[label, metric][seed] = None if value is None else 100 * value
        counting = [
            values[label, metric][seed] for label, metric in values if metric in task.score_metrics
        ]
        known = [value for value in counting if value is not None]
        scores[seed] = statistics.fmean(known) if len(known) == len(counting) else None
    return TaskReport(
        task=name,
        seeds=tuple(job["seed"] for job in jobs),
        statuses=statuses,
        problems=problems,
        values=values,
        scores=scores,
        commonest=commonest,
        constant=tuple(constant),
    )


# --- as text -------------------------------------------------------------------------------------


def _spread(values: Sequence[float | None]) -> str:
    """Return mean and sample standard deviation of the defined values, as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "—"
    mean = f"{statistics.fmean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


def _rows(report: Report) -> list[list[str]]:
    """Return header and cells: a line per task, evaluation split and metric."""
    rows = [["task", "metric", "value", "commonest answer", "score", "seeds", "note"]]
    for task in report.tasks:
        about = glue_tasks.task(task.task)
        for i, ((label, metric), values) in enumerate(task.values.items()):
            split = label.removeprefix(task.task).lstrip("_")
            name = METRIC_NAMES.get(metric, metric) + (f", {split}" if split else "")
            name += "" if metric in about.score_metrics else " (not counted)"
            first = i == 0
            rows.append(
                [
                    about.folder if first else "",
                    name,
                    _spread(list(values.values())),
                    _percent(task.commonest.get((label, metric))),
                    _percent(task.score) if first else "",
                    f"{len(task.defined)}/{len(task.seeds)}" if first else "",
                    task.note if first else "",
                ]
            )
    note = report.average_text if report.average is None else ""
    rows.append(["average", "", "", "", _percent(report.average), "", note])
    if report.paper_average is not None:
        paper = f"{report.paper_average:.1f}"
        rows.append([f"paper, {report.name}", "", "", "", paper, "", ""])
    return rows


def _footer(report: Report) -> list[str]:
    lines = [
        "Value: mean ± sample standard deviation over seeds, in percent, of the final evaluation "
        "on the development set. Commonest answer: always the commonest class of this set, or the "
        "mean of its numbers. Score: mean over seeds, splits and counting metrics. Average: "
        "unweighted mean over the eight tasks, as the paper counts it.",
        "The paper's averages: "
        + ", ".join(f"{name} {value}" for name, value in PAPER_AVERAGES.items())
        + ".",
    ]
    lines += [
        f"{job_name(task.task, seed)}: {task.statuses[seed]}. {problem}"
        for task in report.tasks
        for seed, problem in task.problems.items()
    ]
    return lines


def to_text(report: Report) -> str:
    """Return the table for a terminal."""
    rows = _rows(report)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    last = 1 + (report.paper_average is not None)
    body = [lines[0], rule, *lines[1:-last], rule, *lines[-last:]]
    table = "\n".join(line.rstrip() for line in body)
    model = f"Model: {report.model}\n" if report.model else ""
    footer = "\n".join(_footer(report))
    return f"GLUE: {report.name}\n{model}\n{table}\n\n{footer}\n"


def to_markdown(report: Report) -> str:
    """Return the table in Markdown."""
    rows = _rows(report)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "| --- | --- | ---: | ---: | ---: | ---: | --- |")
    footer = "\n\n".join(_footer(report))
    model = f"Model: {report.model}\n\n" if report.model else ""
    return f"# GLUE: {report.name}\n\n{model}" + "\n".join(lines) + f"\n\n{footer}\n"


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def to_csv(report: Report) -> str:
    """Return a line per value of each job; scores and the average have the metric `score`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ("task", "evaluation", "metric", "counts", "seed", "status", "percent", "commonest")
    writer.writerow(header)
    for task in report.tasks:
        about = glue_tasks.task(task.task)
        for (label, metric), values in task.values.items():
            counts = metric in about.score_metrics
            for seed in task.seeds:
                value = values.get(seed)
                cell = _exact(value)
                row = (task.task, label, metric, counts, seed, task.statuses[seed], cell)
                writer.writerow((*row, _exact(task.commonest.get((label, metric)))))
        status = "complete" if task.is_complete else "incomplete"
        cells = (_exact(task.score), _exact(task.commonest_score))
        writer.writerow((task.task, "", "score", "", "", status, *cells))
    status = "incomplete" if report.average is None else "complete"
    writer.writerow(("average", "", "score", "", "", status, _exact(report.average), ""))
    return text.getvalue()


# --- as a picture --------------------------------------------------------------------------------

COMMONEST = {"markersize": 13, "markeredgewidth": 1.5}


def draw(report: Report) -> bytes:
    """Draw the seeds of each task, their mean and sample standard deviation, and the averages.

    Returns:
        A PNG.
    """
    with drawing(height=5.6) as figure:
        _draw(report, figure)
        return to_png(figure)


def _draw(report: Report, figure: Any) -> None:
    axes = figure.add_subplot()
    blue, orange = LIGHT.series[:2]
    names = [_draw_task(axes, y, task) for y, task in enumerate(report.tasks)]
    bottom = len(report.tasks) + 0.3
    names.append("average")
    shown = [score for task in report.tasks for score in (*task.defined, task.commonest_score)]
    if report.average is None:
        _note(axes, bottom, report.average_text)
    else:
        axes.plot(report.average, bottom, "D", color=blue, markersize=7)
        _label(axes, report.average, bottom, f"{report.average:.1f}", blue)
    if report.paper_average is not None:
        axes.plot(report.paper_average, bottom, "x", color=orange, markersize=8, markeredgewidth=2)
    known = [x for x in (*shown, report.average, report.paper_average) if x is not None]
    axes.axhline(len(report.tasks) - 0.35, color=LIGHT.faint, linewidth=0.8)
    axes.set_yticks([*range(len(report.tasks)), bottom], names)
    axes.set_ylim(bottom + 0.6, -0.7)
    low, high = (min(known), max(known)) if known else (0.0, 100.0)
    pad = max(3.0, 0.12 * (high - low))
    axes.set_xlim(low - pad, high + pad)
    axes.set(title=f"GLUE development sets: {report.name}", xlabel="score (%)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _add_legend(report, figure, axes)


def _add_legend(report: Report, figure: Any, axes: Any) -> None:
    """Explain the marks that occur."""
    blue, orange = LIGHT.series[:2]
    hollow = {"color": blue, "markerfacecolor": "none"}
    partly = any(task.defined and not task.is_complete for task in report.tasks)
    commonest = any(task.commonest_score is not None for task in report.tasks)
    paper = "" if report.paper_average is None else f"the paper's average: {report.paper_average}"
    marks: list[tuple[Any, str, str, dict[str, Any]]] = [
        (True, "D", "mean ± standard deviation", {"color": blue}),
        (True, "o", "one seed", hollow),
        (partly, "D", "mean of an incomplete task", {"color": LIGHT.faint}),
        (commonest, "|", "the commonest answer", {"color": LIGHT.ink, **COMMONEST}),
        (paper, "x", paper, {"color": orange, "markeredgewidth": 2}),
    ]
    for occurs, mark, label, style in marks:
        if occurs:
            axes.plot([], [], mark, label=label, **style)
    figure.legend(loc="outside lower left", ncols=2)


def _draw_task(axes: Any, y: int, task: TaskReport) -> str:
    """Draw the line of a task, and return its label."""
    about = glue_tasks.task(task.task)
    metrics = ", ".join(METRIC_NAMES.get(name, name) for name in about.score_metrics)
    name = f"{about.folder}\n{metrics}"
    if task.commonest_score is not None:
        axes.plot(task.commonest_score, y, "|", color=LIGHT.ink, **COMMONEST)
    values = task.defined
    if not values:
        _note(axes, y, task.note)
        return name
    color = LIGHT.series[0] if task.is_complete else LIGHT.faint
    # Below the mean, so that they do not hide it.
    below = [y + 0.25] * len(values)
    axes.plot(values, below, "o", color=color, markerfacecolor="none", markersize=4)
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    axes.errorbar(mean, y, xerr=spread, fmt="D", color=color, markersize=5, capsize=3)
    label = f"{mean:.1f}"
    if not task.is_complete:
        label += f" ({len(values)}/{len(task.seeds)} seeds)"
    _label(axes, mean, y, label, color)
    return name


def _note(axes: Any, y: float, text: str) -> None:
    """Write a text at the left in place of a value."""
    axes.text(
        0.02, y, text, transform=axes.get_yaxis_transform(), va="center", color=LIGHT.faint,
        style="italic",
    )  # fmt: skip


def _label(axes: Any, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", color=color)


def write_report(report: Report, out: Path) -> list[Path]:
    """Write report.txt, report.md, report.csv and report.png.

    Returns:
        The files.
    """
    contents: dict[str, str | bytes] = {
        "report.txt": to_text(report),
        "report.md": to_markdown(report),
        "report.csv": to_csv(report),
        "report.png": draw(report),
    }
    for name, content in contents.items():
        write_atomically(out / name, content)
    return [out / name for name in contents]
