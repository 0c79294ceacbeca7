"""Read the files of Composer's loggers: TensorBoard, MLflow, Weights & Biases; and our own.

Our own are `loss_curve.csv` and `config.yaml`, of the callbacks `loss_curve` and `run_summary`.
"""

import csv
import json
import logging
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

__all__ = ["MSE", "SOURCES", "Log", "Series", "loss_curve_series", "read_logs"]

log = logging.getLogger(__name__)

TENSORBOARD, MLFLOW, WANDB, CSV = "TensorBoard", "MLflow", "Weights & Biases", "loss_curve.csv"
CONFIG = "config.yaml"
# If several loggers have the same curve, the first of them in this order is used.
SOURCES = (TENSORBOARD, MLFLOW, WANDB, CSV, CONFIG)
MSE = "MeanSquaredError"  # the metric that is a regression's loss
# The curves to read, of about 50 in a log; this saves half the memory.
WANTED = re.compile(
    r"loss/train/total|lr-.*|throughput/.*|memory/peak_.*|cpu_memory_used|baseline/.*"
    r"|time/(batch|token)|metrics/(?!train/).*(CrossEntropy|Loss|MeanSquaredError)"
)
EVENT_FILE = re.compile(r".*tfevents\.(\d+)\.(.*)\.(\d+)")  # torch: time, host and process, count


@dataclass(frozen=True)
class Series:
    """A logged curve: for each point the batch, the Unix time and the value."""

    steps: NDArray[np.int64]
    walls: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def where(self, mask: NDArray[Any]) -> "Series":
        """Return the points that a mask or an index selects."""
        return Series(self.steps[mask], self.walls[mask], self.values[mask])


@dataclass
class Log:
    """What one logger wrote about one run; `walls` are NaN if it writes no times.

    Attributes:
        source: One of `SOURCES`.
        name: The name of the run.
        folder: The folder of the log.
        series: The curves by tag.
        parameters: The hyperparameters.
        starts: The Unix times at which processes began to write, as far as the files show.
    """

    source: str
    name: str
    folder: Path
    series: dict[str, Series] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)


class _Points:
    """Curves to which points are added."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[array[int], array[float], array[float]]] = {}
        self.wanted: dict[str, bool] = {}

    def wants(self, tag: str) -> bool:
        if tag not in self.wanted:
            self.wanted[tag] = WANTED.fullmatch(tag) is not None
        return self.wanted[tag]

    def add(self, tag: str, step: int, wall: float, value: float) -> None:
        if tag not in self.columns:
            self.columns[tag] = (array("q"), array("d"), array("d"))
        steps, walls, values = self.columns[tag]
        steps.append(step)
        walls.append(wall)
        values.append(value)

    def extend(self, other: "_Points") -> None:
        for tag, (steps, walls, values) in other.columns.items():
            mine = self.columns.setdefault(tag, (array("q"), array("d"), array("d")))
            mine[0].extend(steps)
            mine[1].extend(walls)
            mine[2].extend(values)

    def series(self) -> dict[str, Series]:
        return {
            tag: Series(np.array(steps, np.int64), np.array(walls), _drawable(np.array(values)))
            for tag, (steps, walls, values) in self.columns.items()
        }

    def span(self) -> tuple[float, float]:
        """Return the times of the first and the last point."""
        walls = [column[1] for column in self.columns.values()]
        return min(map(min, walls)), max(map(max, walls))


def _drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make numbers infinite if the scale of an axis that shows them would overflow."""
    return np.where(np.abs(values) >= 1e100, np.copysign(np.inf, values), values)


def _printable(text: str) -> str:
    """Replace what neither a terminal nor a file in UTF-8 can show."""
    return "".join(character if character.isprintable() else "?" for character in text)


def read_logs(folder: Path) -> list[Log]:
    """Read all logs below a folder.

    A file that cannot be read, or that is cut short, gives a warning; its whole records are used.
    """
    events: dict[Path, list[Path]] = defaultdict(list)
    logs: list[Log] = []
    for path, folders, names in os.walk(folder):
        folders.sort()
        here = Path(path)
        names = [name for name in names if (here / name).is_file()]  # to open a pipe would wait
        for name in sorted(names):
            if "tfevents" in name:
                events[here].append(here / name)
            elif name.endswith(".wandb"):
                logs += _attempt(_read_wandb, here / name)
            elif name == "loss_curve.csv":
                logs += _attempt(_read_csv, here / name)
            elif name == CONFIG:
                logs += _attempt(_read_config, here / name)
        if "meta.yaml" in names and "metrics" in folders:
            logs += _attempt(_read_mlflow, here)
    for here, files in events.items():
        logs += _attempt(_read_events, here, files)
    logs = [entry for entry in logs if entry.series or entry.parameters]
    for entry in logs:
        entry.name = _printable(entry.name)
        entry.parameters = {
            _printable(key): _printable(value) for key, value in entry.parameters.items()
        }
    return sorted(logs, key=lambda entry: (SOURCES.index(entry.source), entry.folder))


def _attempt(read: Any, *arguments: Any) -> list[Log]:
    try:
        return [read(*arguments)]
    except Exception as error:  # of any kind, since other files may be whole
        log.warning("%s cannot be read: %s", arguments[0], error or type(error).__name__)
        return []


# --- TensorBoard ---------------------------------------------------------------------------------


def _read_events(folder: Path, files: list[Path]) -> Log:
    """Read a folder of event files; Composer begins a new file at every flush."""
    found = Log(TENSORBOARD, folder.resolve().name, folder)
    points, until, overlapping = _Points(), -np.inf, False
    for writer in _writers(files):
        written = _Points()
        for path in writer:
            try:
                _read_event_file(path, written, found.parameters)
            except OSError as error:
                log.warning("%s cannot be read: %s", path, error)
        if not written.columns:
            continue
        first, last = written.span()
        if first < until:  # for example all ranks, if rank_zero_only is false
            overlapping = True
            continue
        found.starts.append(first)
        points.extend(written)
        until = last
    if overlapping:
        log.warning("%s was written by several processes at once: only one is drawn", folder)
    found.series = points.series()
    return found


def _writers(files: list[Path]) -> Iterator[list[Path]]:
    """Return the files of each process, by age."""
    named = []
    for path in files:
        match = EVENT_FILE.match(path.name)
        time, process, count = match.groups() if match else ("0", path.name, "0")
        named.append((int(time), int(count), process, path))
    writers: list[tuple[str, int, list[Path]]] = []  # process, last count, files
    for _, count, process, path in sorted(named):
        for i, (other, last, paths) in enumerate(writers):
            # In a container the next process may have the same id, but its count restarts.
            if other == process and last < count:
                paths.append(path)
                writers[i] = (other, count, paths)
                break
        else:
            writers.append((process, count, [path]))
    return iter([paths for _, _, paths in writers])


def _read_event_file(path: Path, points: _Points, parameters: dict[str, str]) -> None:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    whole = 0
    # The other loaders turn every number into a tensor, and hide that a file is cut short.
    for record in RawEventFileLoader(str(path)).Load():
        whole += len(record) + 16  # a length and two checksums
        try:
            event = Event.FromString(record)
        except DecodeError:
            log.warning("%s has a record that is not an event, at byte %d", path, whole)
            continue
        for value in event.summary.value:
            if points.wants(value.tag) and value.HasField("simple_value"):
                points.add(value.tag, event.step, event.wall_time, value.simple_value)
            elif value.tag == "_hparams_/session_start_info":
                parameters |= _hyperparameters(value.metadata.plugin_data.content)
    if whole < (size := path.stat().st_size):
        log.warning(
            "%s is whole only up to byte %d of %d: its run was killed, or is still writing",
            path,
            whole,
            size,
        )


def _hyperparameters(content: bytes) -> dict[str, str]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    values = HParamsPluginData.FromString(content).session_start_info.hparams
    found: dict[str, str] = {}
    for name, value in values.items():
        kind = value.WhichOneof("kind")
        found |= _flat(name, getattr(value, kind) if kind else None)
    return found


class _Loader(yaml.BaseLoader):
    """Reads all values as text, so that digits stay as logged.

    An alias is an error: a few of them can stand for more text than fits into memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _flat(name: str, value: Any) -> dict[str, str]:
    """Return a hyperparameter as text; loggers write whole sections of a YAML as one."""
    if isinstance(value, str) and value[:1] in "{\"'":
        try:
            value = yaml.load(value, _Loader)
        except (yaml.YAMLError, RecursionError):
            return {name: value}
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for key, below in value.items():
            found |= _flat(f"{name}.{key}", below)
        return found
    if isinstance(value, list):
        value = f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        value = f"{value:g}"
    return {name: str(value)}


# --- MLflow --------------------------------------------------------------------------------------


def _read_mlflow(folder: Path) -> Log:
    """Read a run of a file store: a file per curve, with lines `milliseconds value step`."""
    about = yaml.load((folder / "meta.yaml").read_text(encoding="utf-8"), _Loader) or {}
    points = _Points()
    for path in sorted((folder / "metrics").rglob("*")):
        tag = path.relative_to(folder / "metrics").as_posix()
        if not path.is_file() or not points.wants(tag):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                wall, value, step = line.split()[:3]
                points.add(tag, int(step), int(wall) / 1000, float(value))
            except (ValueError, OverflowError):
                log.warning("%s: line %d is not whole", path, number)
    parameters: dict[str, str] = {}
    for path in filter(Path.is_file, sorted((folder / "params").glob("*"))):
        parameters |= _flat(path.name, path.read_text(encoding="utf-8", errors="replace"))
    name = str(about.get("run_name") or folder.name)
    starts = [points.span()[0]] if points.columns else []
    return Log(MLFLOW, name, folder, points.series(), parameters, starts)


# --- Weights & Biases ----------------------------------------------------------------------------


def _read_wandb(path: Path) -> Log:
    """Read the file of an offline run, as `wandb sync` does."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    # Without this call the reader refuses to run. `wandb sync` calls it too; it is private.
    vars(wandb)["_set_internal_process"](disable=True)
    store = DataStore()
    store.open_for_scan(str(path))
    found, points = Log(WANDB, path.stem, path.parent), _Points()
    try:
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
            if record.HasField("history"):
                try:
                    _add_history(record.history, points)
                except (ValueError, OverflowError) as error:
                    log.warning("%s has a row that cannot be read: %s", path, error)
            if record.HasField("run"):
                found.name = record.run.display_name or record.run.run_id
                found.parameters |= _wandb_config(record.run.config)
            if record.HasField("config"):
                found.parameters |= _wandb_config(record.config)
    except AssertionError:  # its reader checks with `assert`
        log.warning("%s is not whole: its run was killed, or is still writing", path)
    found.series = points.series()
    found.starts = [points.span()[0]] if points.columns else []
    return found


def _add_history(history: Any, points: _Points) -> None:
    row = {(item.key or "/".join(item.nested_key)): item.value_json for item in history.item}
    step, wall = int(float(row.get("_step", 0))), float(row.get("_timestamp", "nan"))
    for tag, text in row.items():
        if points.wants(tag) and isinstance(value := json.loads(text), int | float):
            points.add(tag, step, wall, value)


def _wandb_config(config: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in config.update:
        name = item.key or ".".join(item.nested_key)
        if name != "_wandb":
            found |= _flat(name, json.loads(item.value_json))
    return found


# --- our own -------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Log:
    """Read what the callback `loss_curve` wrote; it has no times."""
    with path.open(encoding="utf-8", newline="") as file:
        series = loss_curve_series(file)
    return Log(CSV, path.parent.resolve().name, path.parent, series)


def _read_config(path: Path) -> Log:
    """Read the settings that the callback `run_summary` wrote, or nothing from another file."""
    config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    found = Log(CONFIG, path.parent.resolve().name, path.parent)
    if isinstance(config, dict) and {"run_name", "model", "train_loader"} <= config.keys():
        found.name = str(config["run_name"])
        for key, value in config.items():
            if key != "variables":  # their values are in the other sections
                found.parameters |= _flat(key, value)
    return found


def loss_curve_series(lines: Iterable[str]) -> dict[str, Series]:
    """Read the lines of a `loss_curve.csv`; the tags are those of Composer's loggers.

    The third column is `loss`, in nats, or `mse`.
    """
    points = _Points()
    rows = csv.DictReader(lines)
    mse = "mse" in (rows.fieldnames or ())
    for row in rows:
        batch, curve = int(row["batch"]), row["curve"]
        tag = f"metrics/{curve}/{MSE if mse else 'LanguageCrossEntropy'}"
        if curve == "train":
            tag, batch = "loss/train/total", batch - 1  # loggers count the batches before it
        elif batch == 0 and curve.startswith("unigram_"):
            tag = f"baseline/{curve}"
        points.add(tag, batch, np.nan, float(row["mse" if mse else "loss"]))
    return points.series()
