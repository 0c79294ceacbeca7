"""Chooses a kernel's configuration: candidates are timed once on a machine, the choice is kept.

`triton.autotune` forgets its choice when the process ends; this module writes it to a file in the
user's cache (`cache.py`). `M2_PLUGIN_AUTOTUNE=0` takes the defaults and times nothing.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from triton.testing import do_bench

from m2_plugin.ops.kernels import cache, check
from m2_plugin.ops.kernels.compilation import compile_together
from m2_plugin.ops.kernels.launch import next_power_of_2

Config = TypeVar("Config")

log = logging.getLogger(__name__)

WARMUP_MS, MEASURE_MS = 2, 8
# With fewer rows the device is idle whatever the tiles; with more, the fastest tiles are the same.
FEWEST_ROWS, MOST_ROWS = 1 << 10, 1 << 16

_chosen: dict[tuple[Any, ...], Any] = {}


def row_class(num_rows: int) -> int:
    """Return the number of rows up to which a choice holds: one of seven powers of two."""
    return min(max(next_power_of_2(num_rows), FEWEST_ROWS), MOST_ROWS)


def best(
    op: str,
    key: tuple[Any, ...],
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    device: torch.device,
    launches_only: bool = True,
) -> Config:
    """Return the fastest candidate for a class of shapes on a device.

    The candidates are timed when this machine first meets the class of shapes. Each takes at most
    eight launches and 10 ms, and its compilation, which Triton does once per machine. There are at
    most four candidates and seven classes of rows. The first candidate is returned without timing
    if it is the only one, without a CUDA device, while a CUDA graph is captured, under
    `torch.use_deterministic_algorithms` and with `M2_PLUGIN_AUTOTUNE=0`.

    Args:
        op: The name of the launch.
        key: The class of shapes: all that the choice depends on, printable. Masks, residuals and
            directions belong to it, if a kernel does less work without them.
        candidates: Configurations, the safe one first. Their `repr` must tell them apart.
        run: A function that launches a candidate; all must compute the same.
        device: The device of the tensors.
        launches_only: Whether `run` keeps nothing of what it computes. The candidates are then
            compiled together, before they are timed (`compilation.py`).

    Raises:
        Exception: The first candidate's error, if no candidate can be built and launched.
    """
    compared = check.alternative(len(candidates))
    if compared is not None:
        return candidates[compared]
    fixed = len(candidates) == 1 or device.type != "cuda"
    if fixed or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    entry = (device.index, op, key)
    if entry not in _chosen:
        off = os.environ.get("M2_PLUGIN_AUTOTUNE") == "0"
        if off or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        path = cache.path("choices", device)
        name = f"{op} {' '.join(map(str, key))}"
        try:
            kept = _read(path, name, candidates)
            if kept is not None:
                _chosen[entry] = kept
            else:
                if launches_only:
                    compile_together(lambda: [run(config) for config in candidates])
                _chosen[entry], found = _measure(name, candidates, run)
                cache.add(path, name, found, device)
        except torch.OutOfMemoryError:  # for the timer's own buffer: measure another time
            return candidates[0]
    return _chosen[entry]


def _read(path: Path, name: str, candidates: Sequence[Config]) -> Config | None:
    """Return the choice in a file, if it was made among the same candidates; else None."""
    found = cache.load(path).get(name)
    names = [repr(config) for config in candidates]
    if not isinstance(found, dict) or found.get("candidates") != names:
        return None
    return next((c for c in candidates if repr(c) == found.get("best")), None)


def _measure(
    name: str, candidates: Sequence[Config], run: Callable[[Config], object]
) -> tuple[Config, dict[str, Any]]:
    """Time the candidates; return the fastest, and what the file shall hold."""
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
    return fastest, found
