"""What was found out about the kernels on a machine, in JSON files in the user's cache.

The folder is `${XDG_CACHE_HOME:-~/.cache}/m2_plugin`, or what `M2_PLUGIN_CACHE` names. What was
found in another environment (GPU, driver, versions, source of the kernels) is in other files.
"""

import functools
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import triton

from m2_plugin.files import read_json, write_json

log = logging.getLogger(__name__)

DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def source_hash() -> str:
    """Return a hash of the source of all ops and kernels."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _driver() -> str:
    try:
        version = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        version = None
    return version[0] if version else "unknown"


def environment(device: torch.device) -> dict[str, str]:
    """Return all that decides what a kernel computes on a device, and how fast."""
    gpu, capability = device.type, ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "gpu": gpu,
        "capability": capability,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": source_hash(),
    }


def path(kind: str, device: torch.device) -> Path:
    """Return the file with what was found on a device; `kind` says what it is about."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("M2_PLUGIN_CACHE") or os.path.join(caches, "m2_plugin"))
    found = environment(device)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    gpu = re.sub(r"[^\w.]+", "-", found["gpu"])
    return folder / f"{gpu}-{digest}-{kind}.json"


def load(path: Path) -> dict[str, Any]:
    """Return the entries of a file; none, and a warning, if it cannot be read."""
    try:
        found: dict[str, Any] | None = read_json(path, missing_ok=True)
        return found or {}
    except ValueError as error:
        log.warning("%s; what it should hold is found out again.", error)
        return {}


def add(path: Path, name: str, entry: Any, device: torch.device) -> None:
    """Add an entry to a file by replacing it as a whole. Entries of other processes stay.

    If two processes write at once, the entry of one may be lost; it is then found out again.
    """
    entries = {"environment": environment(device)} | load(path) | {name: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, entries, indent=1)
    except OSError as error:
        log.warning("%s cannot be written (%s): it is found out again next time.", path, error)
