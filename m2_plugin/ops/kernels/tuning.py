"""Chooses a kernel's configuration: candidates are timed once on a machine, the choice is kept.

`triton.autotune` forgets its choice when the process ends; this module writes it to a file in the
user's cache. Two environment variables change that: `M2_PLUGIN_AUTOTUNE=0` takes the defaults and
times nothing; `M2_PLUGIN_CACHE` names a folder to use instead of
`${XDG_CACHE_HOME:-~/.cache}/m2_plugin`.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.testing import do_bench

Config = TypeVar("Config")

log = logging.getLogger(__name__)

# Raise this when a kernel changes: older measurements then no longer count.
VERSION = 1
WARMUP_MS, MEASURE_MS = 2, 8
# With fewer rows the device is idle whatever the tiles; with more, the fastest tiles are the same.
FEWEST_ROWS, MOST_ROWS = 1 << 10, 1 << 16

_chosen: dict[tuple[Any, ...], Any] = {}


def row_class(num_rows: int) -> int:
    """Return the number of rows up to which a choice holds: one of seven powers of two."""
    return min(max(triton.next_power_of_2(num_rows), FEWEST_ROWS), MOST_ROWS)


def best(
    op: str,
    key: tuple[Any, ...],
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """Return the fastest candidate for a class of shapes on a device.

    The candidates are timed when this machine first meets the class of shapes. Each takes at most
    eight launches and 10 ms, and its compilation, which Triton does once per machine. There are at
    most four candidates and seven classes of rows. The first candidate is returned without timing
    if it is the only one, without a CUDA device, while a CUDA graph is captured, under
    `torch.use_deterministic_algorithms` and with `M2_PLUGIN_AUTOTUNE=0`.

    Args:
        op: The name of the launch.
        key: The class of shapes: all that the choice depends on, printable.
        candidates: Configurations, the safe one first. Their `repr` must tell them apart.
        run: A function that launches a candidate; all must compute the same.
        device: The device of the tensors.

    Raises:
        Exception: The first candidate's error, if no candidate can be built and launched.
    """
    fixed = len(candidates) == 1 or device.type != "cuda"
    if fixed or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    entry = (device.index, op, key)
    if entry not in _chosen:
        off = os.environ.get("M2_PLUGIN_AUTOTUNE") == "0"
        if off or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        path = cache_file(torch.cuda.get_device_name(device))
        name = f"{op} {' '.join(map(str, key))}"
        try:
            _chosen[entry] = _read(path, name, candidates) or _measure(path, name, candidates, run)
        except torch.OutOfMemoryError:  # for the timer's own buffer: measure another time
            return candidates[0]
    return _chosen[entry]


def cache_file(device_name: str) -> Path:
    """Return the file that holds the choices for a device."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("M2_PLUGIN_CACHE") or os.path.join(caches, "m2_plugin"))
    name = re.sub(r"[^\w.]+", "-", f"{device_name} triton {triton.__version__} v{VERSION}")
    return folder / f"{name}.json"


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a JSON object")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("Kernels will be timed again: %s cannot be read (%s).", path, error)
        return {}


def _read(path: Path, name: str, candidates: Sequence[Config]) -> Config | None:
    """Return the choice in a file, if it was made among the same candidates; else None."""
    found = _load(path).get(name)
    names = [repr(config) for config in candidates]
    if not isinstance(found, dict) or found.get("candidates") != names:
        return None
    return next((c for c in candidates if repr(c) == found.get("best")), None)


def _measure(
    path: Path, name: str, candidates: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """Time the candidates, add the choice to the file and return it."""
    times: list[float] = []
    errors: list[Exception] = []
    for config in candidates:
        try:
            took = do_bench(
                lambda config=config: run(config),
                warmup=WARMUP_MS,
                rep=MEASURE_MS,
                return_mode="median",
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.debug("%s cannot run with %s: %s", name, config, error)
            errors.append(error)
            took = float("inf")
        times.append(took)
    if len(errors) == len(candidates):
        raise errors[0]
    fastest = candidates[times.index(min(times))]
    log.info("%s runs with %s: %.3f ms, fastest of %d", name, fastest, min(times), len(times))
    found = {
        "candidates": [repr(config) for config in candidates],
        "best": repr(fastest),
        "ms": [took if took < float("inf") else None for took in times],
    }
    _write(path, name, found)
    return fastest


def _write(path: Path, name: str, found: dict[str, Any]) -> None:
    """Add an entry to a file by replacing it as a whole. Entries of other processes stay."""
    text = json.dumps(_load(path) | {name: found}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(text + "\n")
            whole.replace(path)
    except OSError as error:
        log.warning("Kernels will be timed again: %s cannot be written (%s).", path, error)
