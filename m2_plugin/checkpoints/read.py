"""Read the weights in a checkpoint file, without running code in it."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import (
    MAGIC_NUMBER,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from m2_plugin.constants import CHECKPOINT_SUFFIXES

__all__ = ["Saved", "is_checkpoint_file", "read_file"]

SHARD_INDEX = ".index.json"  # what transformers writes beside weights in several files
# Where training loops of other people keep the weights.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
# Of torch.compile, activation checkpointing and FSDP, at any place in a name.
INNER_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Of data parallelism, inside or outside of the model that Composer or Lightning wrap.
OUTER_WRAPPERS = ("module.", "model.", "module.")
# Packages whose objects a Composer checkpoint pickles beside its weights.
PICKLED = (
    "collections",
    "composer",
    "datetime",
    "llmfoundry",
    "numpy",
    "omegaconf",
    "pathlib",
    "streaming",
    "torch",
    "torchmetrics",
    "transformers",
)


class _Inert(dict):
    """Stand for every object of a checkpoint that is not a tensor or plain data."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def is_checkpoint_file(path: str | None) -> bool:
    """Tell whether a path means a file of weights, not a folder or a hub name."""
    return path is not None and path.endswith(CHECKPOINT_SUFFIXES) and not os.path.isdir(path)


class Saved(NamedTuple):
    """What Composer saves of a transformers model beside its weights.

    Args:
        config: The content of its `config.json`, or None.
        tokenizer: Those of the tokenizer's files that are data: name → what a JSON file holds, or
            the lines of a text.
    """

    config: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = {}


def read_file(path: str) -> tuple[dict[str, Tensor], Saved]:
    """Read the weights of a Composer checkpoint or a state dict, without running code in it.

    Other objects that a Composer checkpoint pickles (times, random states) become empty ones.

    Args:
        path: A file of Composer's, ours or of the M2 reference, or of torch or safetensors; or the
            index of weights in several files.

    Returns:
        The state dict, mapped from the file if its format allows that, under the names of the
        transformers model; and what Composer saved beside it.

    Raises:
        ValueError: If there is no such file, it holds no weights, or it would run unexpected code.
    """
    content: Any = _read_shards(path) if path.endswith(SHARD_INDEX) else _load(path)
    state, saved = content, Saved()
    if isinstance(content, Mapping) and isinstance(content.get("state"), Mapping):
        state = content["state"].get("model")
        kept = (content["state"].get("integrations") or {}).get("huggingface") or {}
        files = {}
        for name, file in (kept.get("tokenizer") or {}).items():
            ending = file.get("file_extension")  # which older versions leave out of the name
            if ending in (".json", ".txt"):
                files[name.removesuffix(ending) + ending] = file.get("content")
        config = ((kept.get("model") or {}).get("config") or {}).get("content")
        saved = Saved(config, files)
    elif isinstance(content, Mapping):
        state = next((content[key] for key in STATE_KEYS if _are_weights(content.get(key))), state)
    if not _are_weights(state):
        found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path!r} holds no state dict of a model, but {found}.")
    return _unwrapped(state), saved


def _are_weights(value: Any) -> bool:
    tensors = isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())
    return tensors and len(value) > 0


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the names off that wrappers put before or into those of the model."""
    names = {name: INNER_WRAPPERS.sub("", name) for name in weights}
    for wrapper in OUTER_WRAPPERS:
        if all(name.startswith(wrapper) for name in names.values()):
            names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    return {names[name]: tensor for name, tensor in weights.items()}


def _load(path: str) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r}")
    try:
        return load_file(path) if path.endswith(".safetensors") else _unpickle(path)
    except Exception as error:
        # torch surrounds the reason with advice to load the file unsafely.
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else str(error) or type(error).__name__
        raise ValueError(f"{path!r} cannot be read as a checkpoint: {reason}") from error


def _read_shards(index: str) -> dict[str, Tensor]:
    try:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{index!r} is no index of weights: it needs a weight_map") from error
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        weights |= _load(os.path.join(os.path.dirname(index), name))
    if lost := sorted(files.keys() - weights.keys()):
        raise ValueError(f"{index!r} names {lost[0]!r}, which is not in {files[lost[0]]!r}")
    return weights


def _unpickle(path: str) -> Any:
    if not zipfile.is_zipfile(path):
        older = pickle.dumps(MAGIC_NUMBER, protocol=2)  # how torch's older format begins
        with open(path, "rb") as file:
            start = file.read(len(older))
        if start.startswith(b"PK\x03\x04"):
            raise ValueError("it is cut short: the end of the archive is missing")
        if start != older:
            raise ValueError("it is no file of torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise ValueError(f"{damaged} in it is damaged: its checksum is another")
    names = get_unsafe_globals_in_checkpoint(path)
    for name in names:
        if name.split(".")[0] not in PICKLED:
            raise ValueError(f"it would call {name}, which no checkpoint needs")
    inert = [(_Inert, name) for name in names]
    with safe_globals(inert):  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
