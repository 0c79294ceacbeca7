"""Combine logs into runs: group logs, remove repeated batches, and compute the results."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2_plugin.train_report.readers import (
    CONFIG,
    CSV,
    MSE,
    SOURCES,
    TENSORBOARD,
    Log,
    Series,
    read_logs,
)

__all__ = [
    "AXES",
    "Run",
    "Summary",
    "common_rate",
    "default_span",
    "load_runs",
    "loss_unit",
    "memory_series",
    "running_mean",
    "summarize",
    "tokenizers_differ",
]

log = logging.getLogger(__name__)

TRAIN = "loss/train/total"
CLOCKS = ("time/batch", TRAIN)  # logged once per batch: a repeated batch is a resume
EVAL = re.compile(r"metrics/(.+)/(\w+)")
# x axis: its label, and what a run must have logged for it.
AXES = {
    "batch": ("batch", ""),
    "tokens": ("tokens", "time/token, which Composer logs if batches count their tokens"),
    "time": ("hours of training", "times, which loggers write and loss_curve.csv does not"),
}
RATES = ("tokens", "samples", "batches")
GPU_PEAK, GPU_RESERVED = "memory/peak_allocated_mem", "memory/peak_reserved_mem"
CPU_USED = "cpu_memory_used"


@dataclass
class Run:
    """One training run, with all its attempts.

    Attributes:
        name: The name in the legend.
        folder: The folder of its first log.
        series: The curves by tag, one point per batch, in order.
        parameters: The hyperparameters that the last attempt logged.
        sources: The loggers whose files were read.
        starts: The Unix time and the batch at which each attempt began; empty without times.
        ends: The Unix time of each attempt's last point.
    """

    name: str
    folder: Path
    series: dict[str, Series]
    parameters: dict[str, str]
    sources: list[str]
    starts: list[tuple[float, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def get(self, tag: str) -> Series | None:
        """Return the finite points of a curve; None if there are none."""
        found = self.series.get(tag)
        if found is None:
            return None
        found = found.where(np.isfinite(found.values))
        return found if len(found) else None

    def evals(self) -> dict[str, Series]:
        """Return evaluation losses by label: the cross-entropy, or another loss without it."""
        tags = [match for tag in self.series if (match := EVAL.fullmatch(tag))]
        found: dict[str, Series] = {}
        for match in sorted(tags, key=lambda m: ("CrossEntropy" not in m[2], m[0])):
            series = self.get(match[0])
            if series is not None:
                found.setdefault(match[1], series)
        return dict(sorted(found.items()))

    def rate(self, kind: str, device: bool = False) -> Series | None:
        """Return the throughput in `kind` per second, of all devices or of one."""
        return self.get(f"throughput/{'device/' if device else ''}{kind}_per_sec")

    def learning_rates(self) -> dict[str, Series]:
        """Return the learning rates by parameter group."""
        tags = sorted(tag for tag in self.series if tag.startswith("lr-"))
        return {
            tag.removeprefix("lr-"): series for tag in tags if (series := self.get(tag)) is not None
        }

    def x(self, series: Series, axis: str) -> NDArray[np.float64] | None:
        """Return the x values of a curve on an axis of `AXES`; None if the run has none."""
        if axis == "batch":
            return series.steps.astype(np.float64)
        if axis == "time":
            return self._hours(series.walls) if self.starts else None
        tokens = self.get("time/token")
        if tokens is None:
            return None
        return np.interp(series.steps, tokens.steps, tokens.values)

    def _hours(self, walls: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return the hours since the start without the pauses between attempts."""
        if not np.isfinite(walls).all():
            return None
        begins = np.array([wall for wall, _ in self.starts])
        lengths = np.array(self.ends) - begins
        before = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
        attempt = np.maximum(np.searchsorted(begins, walls, side="right") - 1, 0)
        inside = np.clip(walls - begins[attempt], 0, lengths[attempt])
        hours: NDArray[np.float64] = (before[attempt] + inside) / 3600
        return hours


@dataclass(frozen=True)
class Summary:
    """The results of a run, None if not logged: losses in nats, memory in GB, rates per second."""

    name: str
    batches: int
    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_eval_batch: int | None
    rate: float | None
    device_rate: float | None
    rate_kind: str
    memory: float | None
    memory_kind: str
    peak_lr: float | None
    hours: float | None
    attempts: int | None


def default_span(points: int) -> int:
    """Return the span of a running mean over that many points: 1/50 of them."""
    return min(points // 50 + 4, points)


def running_mean(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Return the centred mean over `span` values; the window shrinks at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - span // 2, 0)
    high = np.minimum(index + span // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def summarize(run: Run, rate_kind: str) -> Summary:
    """Return the row of a run in the table, with its throughput in `rate_kind` per second."""
    train = run.series.get(TRAIN)
    loss = None
    if train is not None and len(train):
        # The last point of the drawn curve; NaN if the run ended with NaN.
        loss = float(np.mean(train.values[-(default_span(len(train)) // 2 + 1) :]))
    evals = next(iter(run.evals().values()), None)
    best = 0 if evals is None else int(np.argmin(evals.values))
    rates = [run.rate(rate_kind, device) for device in (False, True)]
    rate, device_rate = (None if r is None else float(np.median(r.values)) for r in rates)
    memory, kind = memory_series(run)
    lrs = [series.values.max() for series in run.learning_rates().values()]
    hours = sum(e - b for e, (b, _) in zip(run.ends, run.starts, strict=True)) / 3600
    return Summary(
        name=run.name,
        batches=_batches(run),
        train_loss=loss,
        eval_loss=None if evals is None else float(evals.values[-1]),
        best_eval_loss=None if evals is None else float(evals.values[best]),
        best_eval_batch=None if evals is None else int(evals.steps[best]),
        rate=rate,
        device_rate=device_rate,
        rate_kind=rate_kind,
        memory=None if memory is None else float(memory.values.max()),
        memory_kind=kind,
        peak_lr=float(max(lrs)) if lrs else None,
        hours=hours if run.starts else None,
        attempts=len(run.starts) or None,
    )


def _batches(run: Run) -> int:
    # Composer logs the loss of a batch under the number of batches before it.
    return max(int(s.steps[-1]) + (tag == TRAIN) for tag, s in run.series.items() if len(s))


def memory_series(run: Run) -> tuple[Series | None, str]:
    """Return the memory in GB, and its kind: "GPU" if the run had one, else "machine"."""
    peak = run.get(GPU_PEAK)
    if peak is not None:
        return peak, "GPU"
    used = run.get(CPU_USED)
    if used is not None:
        return Series(used.steps, used.walls, used.values / 1e9), "machine"
    return None, ""


def common_rate(runs: Sequence[Run]) -> str:
    """Return the unit of throughput that most runs have: tokens, samples or batches."""
    counts = {kind: sum(run.rate(kind) is not None for run in runs) for kind in RATES}
    return max(RATES, key=lambda kind: counts[kind])  # the first of equals


def loss_unit(runs: Sequence[Run]) -> str:
    """Return the unit of the losses; empty if some runs are regressions and others are not."""
    kinds = {any(tag.endswith(MSE) for tag in run.series) for run in runs}
    return "" if len(kinds) > 1 else "mean squared error" if kinds == {True} else "nats"


def tokenizers_differ(runs: Sequence[Run]) -> bool:
    """Tell whether runs name different tokenizers, so that a token is not the same for all."""
    return len({run.parameters.get("tokenizer.name") for run in runs} - {None}) > 1


# --- from logs -----------------------------------------------------------------------------------


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read all runs below some folders.

    Raises:
        ValueError: If a folder does not exist, or has no logs.
    """
    found: list[tuple[Path, Run]] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}")
        runs = [run for logs in _groups(read_logs(folder)) if (run := _merge(logs)).series]
        if not runs:
            raise ValueError(
                f"{str(folder)!r} has no logs of a run. Accepted are TensorBoard event files, "
                "MLflow file stores (mlruns), offline files of Weights & Biases, loss_curve.csv. "
                "`loggers: {tensorboard_file: {}}` in the run's YAML writes event files."
            )
        known = [run.folder for _, run in found]
        found += [(folder, run) for run in runs if run.folder not in known]
    _name([folder for folder, _ in found], [run for _, run in found])
    return [run for _, run in found]


def _groups(logs: Sequence[Log]) -> list[list[Log]]:
    """Group the logs of each run, from several loggers or several processes.

    A TensorBoard folder is one run. In MLflow and Weights & Biases each attempt has a folder of its
    own, and the name identifies the run.
    """
    groups: dict[str, list[Log]] = defaultdict(list)
    events = [entry for entry in logs if entry.source == TENSORBOARD]
    for entry in logs:
        if entry.source != CONFIG:
            groups[_key(entry, events)].append(entry)
    for key, group in list(groups.items()):
        if all(entry.source == CSV for entry in group) and len(groups) == 2:
            (other,) = groups.keys() - {key}  # there is only one run that it can belong to
            if any(entry.source != CSV for entry in groups[other]):
                groups[other] += groups.pop(key)
    for entry in logs:
        if entry.source == CONFIG and (owner := _owner(entry, list(groups.values()))) is not None:
            owner.append(entry)
    return list(groups.values())


def _owner(config: Log, groups: Sequence[list[Log]]) -> list[Log] | None:
    """Return the logs of the run with these settings: those beside them, or of the run's name.

    Composer's TensorBoard logger writes to a folder of the run's name, which may be below.
    """
    near = [g for g in groups if any(e.folder == config.folder for e in g)]
    near = near or [g for g in groups if any(e.folder.parent == config.folder for e in g)]
    near = near or [g for g in groups if any(e.name == config.name for e in g)]
    return near[0] if len(near) == 1 else None


def _key(entry: Log, events: Sequence[Log]) -> str:
    if entry.source == TENSORBOARD:
        # Hyperparameters are in a folder below their run's.
        parents = [e.folder for e in events if e.series and e.folder in entry.folder.parents]
        return str(parents[-1] if parents and not entry.series else entry.folder)
    if entry.source == CSV:
        near = [e.folder for e in events if e.series and e.folder == entry.folder]
        near = near or [e.folder for e in events if e.series and e.folder.parent == entry.folder]
    else:
        near = [e.folder for e in events if e.series and e.name == entry.name]
    return str(near[0]) if len(near) == 1 else f"{entry.source}: {entry.name}"


def _merge(logs: Sequence[Log]) -> Run:
    """Build one run: each curve from the first source that has it, and each batch once."""
    logs = sorted(logs, key=lambda entry: SOURCES.index(entry.source))
    parts: dict[str, list[Series]] = {}
    owner: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for entry in logs:
        parameters |= {k: v for k, v in entry.parameters.items() if not k.startswith("baseline/")}
        if entry.source == CSV and TRAIN in owner:
            continue
        for tag, series in entry.series.items():
            if owner.setdefault(tag, entry.source) == entry.source:
                parts.setdefault(tag, []).append(series)
    joined = {tag: _sorted(several) for tag, several in parts.items()}
    used = [entry for entry in logs if any(owner.get(t) == entry.source for t in entry.series)]
    run = Run(
        name=next((e.name for e in logs if e.source == CONFIG), logs[0].name),
        folder=logs[0].folder,
        series=joined,
        parameters=parameters,
        sources=list(dict.fromkeys(entry.source for entry in used)),
    )
    clock = next((joined[tag] for tag in CLOCKS if tag in joined), None)
    if clock is not None and np.isfinite(clock.walls).all():
        starts = [s for e in logs if e.source == used[0].source for s in e.starts]
        run.starts = _attempts(clock, starts)
        walls = np.sort(np.concatenate([series.walls for series in joined.values()]))
        walls = walls[np.isfinite(walls)]
        begins = [wall for wall, _ in run.starts[1:]]
        run.ends = [float(walls[i - 1]) for i in np.searchsorted(walls, begins)]
        run.ends.append(float(walls[-1]))
    run.series = {tag: _clean(series, run.starts) for tag, series in joined.items()}
    return run


def _sorted(several: Sequence[Series]) -> Series:
    """Join the points of several logs in the order of their times."""
    together = Series(
        np.concatenate([s.steps for s in several]),
        np.concatenate([s.walls for s in several]),
        np.concatenate([s.values for s in several]),
    )
    return together.where(np.argsort(together.walls, kind="stable"))


def _attempts(clock: Series, starts: Sequence[float]) -> list[tuple[float, int]]:
    """Return the time and the batch at which each attempt began.

    An attempt begins with a new process, or with a batch that is not after the last one: some
    loggers continue their own run and do not show that the process is new.
    """
    begins = {0, *(np.flatnonzero(np.diff(clock.steps) <= 0) + 1)}
    begins |= {int(np.searchsorted(clock.walls, start)) for start in starts}
    found = [(float(clock.walls[i]), int(clock.steps[i])) for i in sorted(begins - {len(clock)})]
    # An attempt begins with its process, which may log points before its first batch.
    earlier = sorted(starts)
    for i, (wall, step) in enumerate(found):
        before = [s for s in earlier if s <= wall and (i == 0 or s > found[i - 1][0])]
        found[i] = (max(before, default=wall), step)
    return found


def _clean(series: Series, starts: Sequence[tuple[float, int]]) -> Series:
    """Keep each batch once, with the last attempt's value.

    Points after the batch at which the next attempt began are lost work, even if the next attempt
    has not reached them. Points at that batch stay, since its evaluation is not repeated.
    """
    keep = np.ones(len(series), dtype=bool)
    for wall, step in starts[1:]:
        keep &= (series.walls >= wall) | (series.steps <= step)
    series = series.where(keep)
    # The last of equal batches, hence the first in reverse.
    steps, first = np.unique(series.steps[::-1], return_index=True)
    return series.where(len(series) - 1 - first) if len(steps) else series


def _name(folders: Sequence[Path], runs: Sequence[Run]) -> None:
    """Make names unique: add the parts in which their folders differ."""
    counts = Counter(run.name for run in runs)
    for name in [name for name, count in counts.items() if count > 1]:
        alike = [i for i, run in enumerate(runs) if run.name == name]
        given = [str(folders[i].resolve()) for i in alike]
        if len(set(given)) < len(given):
            given = [str(runs[i].folder.resolve()) for i in alike]
        shared = os.path.commonpath(given) if len(set(given)) > 1 else os.path.dirname(given[0])
        for i, path in zip(alike, given, strict=True):
            runs[i].name = f"{name} ({os.path.relpath(path, shared)})"
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        run.name += f" #{seen[run.name]}" if seen[run.name] > 1 else ""
