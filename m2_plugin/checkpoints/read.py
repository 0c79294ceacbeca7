"""Read the weights in a checkpoint file, without running code in it."""

import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
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
from m2_plugin.files import read_json

__all__ = ["Saved", "is_checkpoint_file", "read_file", "shard_names"]

SHARD_INDEX = ".index.json"  # transformers writes it if weights are in several files
# Keys under which common training loops save the weights.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
# Parts that torch.compile, activation checkpointing and FSDP add, at any place in a name.
INNER_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Prefixes of data parallelism, inside or outside of a model that Composer or Lightning wraps.
OUTER_WRAPPERS = ("module.", "model.", "module.")
MAX_UNPACKED = 50  # times the file's size; trained weights do not shrink by half
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
    """An empty object in place of every pickled object that is not a tensor or plain data."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def is_checkpoint_file(path: str | None) -> bool:
    """Tell whether a path is a file of weights by its suffix, not a folder or a hub name."""
    return path is not None and path.endswith(CHECKPOINT_SUFFIXES) and not os.path.isdir(path)


class Saved(NamedTuple):
    """The data that Composer saves for a transformers model beside its weights.

    Args:
        config: The content of `config.json`, or None.
        tokenizer: The tokenizer's JSON and text files: name → the content of a JSON file, or the
            lines of a text file.
    """

    config: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = {}


def read_file(path: str) -> tuple[dict[str, Tensor], Saved]:
    """Read the weights of a Composer checkpoint or a state dict, without running code in it.

    Other objects that a Composer checkpoint pickles (times, random states) become empty objects.

    Args:
        path: A Composer checkpoint, of this package or of the M2 reference; a file of torch or
            safetensors; or the index (`.index.json`) of weights in several files.

    Returns:
        The state dict under the names of the transformers model, mapped from the file if its
        format allows that; and the data that Composer saved beside it.

    Raises:
        ValueError: If the file does not exist, is damaged, holds no weights, or would run
            unexpected code.
    """
    content: Any = _read_shards(path) if path.endswith(SHARD_INDEX) else _load(path)
    state, saved = content, Saved()
    if isinstance(content, Mapping) and isinstance(content.get("state"), Mapping):
        state = content["state"].get("model")
        saved = _saved(content["state"])
    elif isinstance(content, Mapping):
        state = next((content[key] for key in STATE_KEYS if _are_weights(content.get(key))), state)
    if not _are_weights(state):
        found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path!r} must hold the state dict of a model, but holds {found}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{path!r}: {name} must be a dense tensor with values")
    return _unwrapped(path, state), saved


def _saved(state: Mapping[str, Any]) -> Saved:
    """Read what Composer saves beside the weights, as far as it is what it should be."""

    def inner(value: Any, *keys: str) -> Any:
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    kept = inner(state, "integrations", "huggingface")
    config = inner(kept, "model", "config", "content")
    tokenizer, files = inner(kept, "tokenizer"), {}
    for name, file in tokenizer.items() if isinstance(tokenizer, Mapping) else ():
        ending = inner(file, "file_extension")  # which older versions leave out of the name
        content = inner(file, "content")
        is_text = ending == ".txt" and isinstance(content, list | tuple)
        if ending == ".json" or (is_text and all(isinstance(line, str) for line in content)):
            files[str(name).removesuffix(ending) + ending] = content
    return Saved(config if isinstance(config, dict) else None, files)


def _are_weights(value: Any) -> bool:
    tensors = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )
    return tensors and len(value) > 0


def _unwrapped(path: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the parts that wrappers add to the names of a model's tensors."""
    names = {name: INNER_WRAPPERS.sub("", name) for name in weights}
    for wrapper in OUTER_WRAPPERS:
        if all(name.startswith(wrapper) for name in names.values()):
            names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    unwrapped: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if names[name] in unwrapped:
            raise ValueError(f"{path!r} has two tensors {names[name]}, one with a wrapper's prefix")
        unwrapped[names[name]] = tensor
    return unwrapped


def _load(path: str) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r}")
    try:
        return load_file(path) if path.endswith(".safetensors") else _unpickle(path)
    except Exception as error:
        # torch puts the reason in its second line, among advice to load the file unsafely.
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else str(error) or type(error).__name__
        raise ValueError(f"{path!r} cannot be read as a checkpoint: {reason}") from error


def shard_names(index: str) -> list[str]:
    """Read the names of the files that the index of weights in several files lists.

    Raises:
        ValueError: If it is no such index, or a name is not that of a file beside it.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: str) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index!r} must be a JSON object with a weight_map")
    for name in files.values():
        if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name:
            raise ValueError(f"{index!r} names {name!r}, but must name files in its own folder")
    return files


def _read_shards(index: str) -> dict[str, Tensor]:
    files = _weight_map(index)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        weights |= _load(os.path.join(os.path.dirname(index), name))
    if lost := sorted(files.keys() - weights.keys()):
        raise ValueError(f"{index!r} lists {lost[0]!r}, but {files[lost[0]]!r} does not have it")
    return weights


class _PlainUnpickler(pickle._Unpickler):
    """Reads numbers, texts and their containers, and calls nothing.

    The unpickler in C would allocate as much memory as a damaged file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it would call {module}.{name}, which no checkpoint needs")


def _unpickle(path: str) -> Any:
    if not zipfile.is_zipfile(path):
        return _unpickle_older(path)
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_UNPACKED * os.path.getsize(path):
            raise ValueError(f"it would unpack to {unpacked / 2**20:,.0f} MiB")
        damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it is damaged: its checksum does not match")
        entries = archive.infolist()
        orders = [archive.read(e) for e in entries if e.filename.endswith("/byteorder")]
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("its archive has two files of one name")
    # torch would map compressed data, or another byte order, as if they were plain.
    as_it_is = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    mapped = as_it_is and set(orders) <= {sys.byteorder.encode()}
    names = get_unsafe_globals_in_checkpoint(path)
    for name in names:
        if name.split(".")[0] not in PICKLED:
            raise ValueError(f"it would call {name}, which no checkpoint needs")
    inert = [(_Inert, name) for name in names]
    with safe_globals(inert):  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _unpickle_older(path: str) -> Any:
    """Read a file in the format that torch.save wrote before it wrote archives."""
    older = pickle.dumps(MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        start = file.read(len(older))
        if start.startswith(b"PK\x03\x04"):
            raise ValueError("it is truncated: the end of the archive is missing")
        if start != older:
            raise ValueError("torch.save did not write it")
        _PlainUnpickler(file).load()  # the version of the format
        system = _PlainUnpickler(file).load()
    # torch does not look at it.
    if not isinstance(system, dict) or system.get("little_endian") is not (
        sys.byteorder == "little"
    ):
        raise ValueError(f"its bytes are in another order than here ({sys.byteorder}-endian)")
    return torch.load(path, map_location="cpu", weights_only=True)
