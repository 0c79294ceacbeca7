"""Read and write the files that sentence-transformers keeps beside a model: its modules."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from m2_plugin.constants import POOLINGS
from m2_plugin.models.configuration_m2_bert import M2BertConfig

__all__ = ["Embedder", "read_modules", "write_modules"]

TYPES = "sentence_transformers.models."
# Modules of sentence-transformers that compute what M2BertForTextEmbedding does; the last two may
# be missing.
MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]


class Embedder(NamedTuple):
    """The part of an M2BertForTextEmbedding that sentence-transformers saves beside the encoder.

    Args:
        fields: Fields of its config.
        weights: Its pooler, if it has one.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor]


def read_modules(
    find: Callable[[str], str | None], read: Callable[[str], Mapping[str, Tensor]], width: int
) -> Embedder | None:
    """Read the pooler from the folders of sentence-transformers' modules.

    Args:
        find: Gives the path of a file by its name in the folder, or None if there is none.
        read: Reads a file of tensors.
        width: The hidden size.

    Returns:
        The pooler, or None if the folder has no modules or if they do not compute what
        M2BertForTextEmbedding does.

    Raises:
        ValueError: If a file of theirs is missing, lies outside of the folder or cannot be read;
            the message names it.
    """
    file = find("modules.json")
    if file is None:
        return None
    modules = _read(find, "modules.json", list)
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [PurePosixPath(module["path"]) for module in modules]
    except Exception as error:  # the file may hold anything
        raise ValueError(f"{file!r} must be a JSON list of modules: {error!r}") from error
    for path in paths:
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file!r} names {str(path)!r}, which is not in its folder")
    if kinds[:2] != MODULES[:2] or kinds[2:] not in (MODULES[2:], ["Dense"], ["Normalize"], []):
        return None
    if paths[0] != PurePosixPath():
        return None
    pooling = _read(find, f"{paths[1]}/config.json", dict)
    flags = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}  # older versions
    modes = [pooling["pooling_mode"]] if "pooling_mode" in pooling else []
    modes += [
        flags.get(k) for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True
    ]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        return None
    weights = {}
    if "Dense" in kinds:
        dense = _read(find, f"{paths[2]}/config.json", dict)
        if not str(dense.get("activation_function")).endswith(".Tanh"):
            return None
        names = [f"{paths[2]}/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
        there = find(names[0]) or find(names[1])
        if there is None:
            raise ValueError(f"{file!r} names a Dense, and there is no {names[0]}")
        tensors = read(there)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"linear.weight": (width, width), "linear.bias": (width,)}:
            return None
        weights = {name.replace("linear.", "pooler.dense."): t for name, t in tensors.items()}
    fields = {
        "classifier_pooling": modes[0],
        "normalize_embeddings": "Normalize" in kinds,
        "embedding_pooler": "Dense" in kinds,
    }
    return Embedder(fields, weights)


def write_modules(folder: str | Path, config: M2BertConfig, weights: Mapping[str, Tensor]) -> None:
    """Make `SentenceTransformer(folder)` compute the same as `M2BertForTextEmbedding`.

    The first module is the encoder in the folder itself. The pooler becomes a `Pooling` and, if
    `embedding_pooler`, a `Dense`, and `normalize_embeddings` a `Normalize`.

    Args:
        folder: The folder with the saved model.
        config: The model's configuration.
        weights: The model's tensors. `pooler.dense.weight` (D, D) and `pooler.dense.bias` (D,), if
            there are any, are written a second time, under the names of `Dense`.
    """
    folder, width = Path(folder), config.hidden_size
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": config.classifier_pooling == "cls",
        "pooling_mode_mean_tokens": config.classifier_pooling == "mean",
    }
    dense = {
        "in_features": width,
        "out_features": width,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] if config.embedding_pooler else []
    kinds += ["Normalize"] if config.normalize_embeddings else []
    modules = [(f"{i}_{kind}" if i else "", kind) for i, kind in enumerate(kinds)]
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    _write(folder / "1_Pooling" / "config.json", pooling)
    if config.embedding_pooler:
        _write(folder / "2_Dense" / "config.json", dense)
        save_file(
            {f"linear.{n}": weights[f"pooler.dense.{n}"].contiguous() for n in ("weight", "bias")},
            folder / "2_Dense" / "model.safetensors",
            metadata={"format": "pt"},
        )
    length = {"max_seq_length": config.max_sequence_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", length)
    # Written last, because without it the folder is a plain transformers folder.
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": TYPES + name}
            for i, (path, name) in enumerate(modules)
        ],
    )


def _read(find: Callable[[str], str | None], name: str, kind: type) -> Any:
    path = find(name) or name
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path!r} must be a JSON {kind.__name__} of modules or fields")
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
