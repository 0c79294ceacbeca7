"""Write the files that sentence-transformers reads beside a model: a list of modules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from m2_plugin.models.configuration_m2_bert import M2BertConfig

__all__ = ["write_modules"]

TYPES = "sentence_transformers.models."


def write_modules(folder: str | Path, config: M2BertConfig, weights: Mapping[str, Tensor]) -> None:
    """Make `SentenceTransformer(folder)` compute the same as `M2BertForTextEmbedding`.

    The first module is the encoder in the folder itself. The pooler becomes a `Pooling` and a
    `Dense`, and `normalize_embeddings` a `Normalize`.

    Args:
        folder: The folder with the saved model.
        config: The model's configuration.
        weights: The model's tensors. `pooler.dense.weight` (D, D) and `pooler.dense.bias` (D,) are
            written a second time, under the names of `Dense`.
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
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    if config.normalize_embeddings:
        modules.append(("3_Normalize", "Normalize"))
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    _write(folder / "1_Pooling" / "config.json", pooling)
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


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
