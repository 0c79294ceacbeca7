"""What a model's folder says about search: its prompts, its similarity, its longest text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2_plugin.checkpoints.folder import load_folder
from m2_plugin.files import read_json

__all__ = ["SIMILARITIES", "Settings", "read_settings"]

FILE = "config_sentence_transformers.json"
SIMILARITIES = ("cosine", "dot")
DOCUMENT_PROMPTS = (
    "document",
    "passage",
    "corpus",
)  # the first that there is, as in encode_document


class Settings(NamedTuple):
    """How a model is used for search.

    Attributes:
        similarity: A name in `SIMILARITIES`.
        query_prompt: The text to put before each query.
        document_prompt: The text to put before each document.
        max_length: The number of tokens to which texts are cut, or None.
    """

    similarity: str
    query_prompt: str
    document_prompt: str
    max_length: int | None


def read_settings(folder: str | Path) -> Settings:
    """Read the settings of an embedding model, with the same rules as sentence-transformers.

    Args:
        folder: A transformers folder. If it lacks `config_sentence_transformers.json`, there are no
            prompts, and the similarity is the cosine.

    Raises:
        ValueError: If the folder holds no M2-BERT, the file is wrong, or its similarity is unknown.
    """
    folder = Path(folder)
    config, _ = load_folder(folder)
    saved = read_json(folder / FILE, missing_ok=True) or {}
    similarity = saved.get("similarity_fn_name") or SIMILARITIES[0]
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"{str(folder / FILE)!r}: similarity_fn_name is {similarity!r}, which should be one of "
            f"{', '.join(SIMILARITIES)}"
        )
    prompts = _prompts(saved, folder / FILE)
    default = prompts.get(saved.get("default_prompt_name") or "", "")
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), default)
    settings = Settings(
        similarity, prompts.get("query", default), document, config.max_sequence_length
    )
    if settings.query_prompt or settings.document_prompt:
        _check_pooling(folder)
    return settings


def _prompts(saved: Mapping[str, Any], file: Path) -> dict[str, str]:
    prompts = saved.get("prompts") or {}
    texts = isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())
    if not texts:
        raise ValueError(f"{str(file)!r}: prompts is {prompts!r}, which should map names to texts")
    name = saved.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise ValueError(
            f"{str(file)!r}: default_prompt_name is {name!r}, which prompts does not have"
        )
    return prompts


def _check_pooling(folder: Path) -> None:
    """Refuse a model that leaves its prompts out of the mean, which ours do not do."""
    for module in read_json(folder / "modules.json", list, missing_ok=True) or []:
        file = folder / module["path"] / "config.json"
        if module["type"].endswith("Pooling") and read_json(file).get("include_prompt") is False:
            raise ValueError(
                f"{str(file)!r}: include_prompt is false, which only sentence-transformers "
                "computes: set it to true, or remove the prompts"
            )
