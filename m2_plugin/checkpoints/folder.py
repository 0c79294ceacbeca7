"""Read and write transformers folders that hold an M2-BERT."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from m2_plugin.checkpoints.config import HEADS, expected_tensors, listed, model_class_of, resolve
from m2_plugin.checkpoints.read import SHARD_INDEX, read_file
from m2_plugin.files import read_json, write_json
from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.modeling_m2_bert import M2BertForTextEmbedding
from m2_plugin.models.sentence_folder import read_modules, write_modules

__all__ = [
    "CARD",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "build_model",
    "byte_count",
    "copy_beside_model",
    "copy_card",
    "copy_tokenizer",
    "load_folder",
    "save_folder",
    "weights_file",
]

CARD = "README.md"  # of a model, as the hub names it
WEIGHTS = (  # the first that exists is read
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.bin",
)
# Files of a tokenizer that hold data.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
# Other files of a folder that are data, and go where a copy of it goes: by name or ending.
DATA = (".json", ".txt", ".md", ".model", ".safetensors", ".jinja", "LICENSE", "pytorch_model.bin")
# Keys with which a tokenizer's config names code, or files anywhere.
POINTERS = re.compile(r"auto_map|init_inputs|name_or_path|\w+_file")

HEAD_NAMES = tuple(part for part, _ in HEADS if part)


def load_folder(folder: str | Path) -> tuple[M2BertConfig, dict[str, Tensor]]:
    """Read a transformers folder with an M2-BERT, without building the model.

    Returns:
        The config; and the weights, mapped from the file, with names as in the models with a head:
        those of the encoder begin with `model.`.

    Raises:
        ValueError: If the folder holds no M2-BERT, its config and weights contradict each other, or
            a tensor is missing (transformers would give it random values).
    """
    path = Path(folder) / "config.json"
    saved = read_json(path)
    if saved.get("model_type") != M2BertConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds no M2-BERT: model_type in its config.json is "
            f"{saved.get('model_type')!r}, not {M2BertConfig.model_type!r}"
        )
    tensors = read_file(weights_file(str(folder)))[0]
    try:
        found = resolve(tensors, saved, where=str(path))
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}") from error
    bare = not any(name.startswith(HEAD_NAMES) for name in found.weights)

    def find(name: str) -> str | None:
        file = Path(folder) / name
        return str(file) if file.is_file() else None

    def read(file: str) -> dict[str, Tensor]:
        return read_file(file)[0]

    if bare and (embedder := read_modules(find, read, found.config.hidden_size)):
        found.config.update({**embedder.fields, "architectures": ["M2BertForTextEmbedding"]})
        found.weights.update(embedder.weights)
    if not found.config.architectures:
        found.config.architectures = [found.model_class.__name__]
    expected = expected_tensors(_class_of(found.config) or found.model_class, found.config)
    if missing := listed([name for name in expected if name not in found.weights]):
        raise ValueError(f"{str(folder)!r} is not complete: its weights lack {missing}")
    return found.config, found.weights


def build_model(
    model_class: type[PreTrainedModel], config: M2BertConfig, weights: Mapping[str, Tensor]
) -> Any:
    """Build a model from what `load_folder` returned; weights that the class lacks are left out.

    Returns:
        The model, in fp32 and in evaluation mode.

    Raises:
        ValueError: If the weights lack a tensor of the model; the message names it.
    """
    if missing := [n for n in expected_tensors(model_class, config) if n not in weights]:
        raise ValueError(f"the weights lack {missing[0]}, which {model_class.__name__} needs")
    model = model_class(config)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def save_folder(folder: Path, config: M2BertConfig, weights: Mapping[str, Tensor]) -> None:
    """Write config and weights, and for an embedding model the files of sentence-transformers."""
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})
    if model_class_of(weights, config) is M2BertForTextEmbedding:
        write_modules(folder, config, tensors)


def byte_count(weights: Mapping[str, Tensor]) -> int:
    """Return the size of a model's weights, which is nearly all of its folder."""
    return sum(tensor.nbytes for tensor in weights.values())


def weights_file(folder: str) -> str:
    """Find the file of weights in a folder, or their index if they are in several files.

    Raises:
        ValueError: If the folder has no weights.
    """
    found = [path for name in WEIGHTS if os.path.isfile(path := os.path.join(folder, name))]
    if not found:
        raise ValueError(f"{folder!r} has none of {', '.join(WEIGHTS)}")
    return found[0]


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of a tokenizer that are data; its config names neither code nor other files.

    Raises:
        ValueError: If a file is a link out of the folder, or its config is not JSON.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            _copy(folder, Path(name), target)


def copy_card(folder: Path, target: Path) -> None:
    """Copy a folder's model card, if there is one.

    Raises:
        ValueError: If it is a link out of the folder.
    """
    if (folder / CARD).is_file():
        _copy(folder, Path(CARD), target)


def copy_beside_model(folder: Path, target: Path) -> None:
    """Copy what lies beside a folder's config and weights, as far as it is data; no code.

    Raises:
        ValueError: As `copy_tokenizer`.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        of_model = str(name) == "config.json" or (
            name.parent == Path(".") and path.name.endswith((".safetensors", ".bin", SHARD_INDEX))
        )
        if path.is_file() and path.name.endswith(DATA) and not of_model:
            _copy(folder, name, target)


def _copy(folder: Path, name: Path, target: Path) -> None:
    path, home = (folder / name).resolve(), folder.resolve()
    # The hub's cache keeps files in one folder, and links to them in another.
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (path.is_relative_to(home) or path.is_relative_to(cache)):
        raise ValueError(
            f"{str(folder / name)!r} is a link out of its folder, to {str(path)!r}: if that file "
            f"belongs to the folder, copy it there"
        )
    out = target / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if str(name) == "tokenizer_config.json":
        content = read_json(path)
        content = {key: value for key, value in content.items() if not POINTERS.fullmatch(key)}
        write_json(out, content)
    else:
        shutil.copyfile(path, out)


def _class_of(config: M2BertConfig) -> type[PreTrainedModel] | None:
    """Return the model class that the config names, or None."""
    by_name = {model_class.__name__: model_class for _, model_class in HEADS}
    return by_name.get((config.architectures or [""])[0])
