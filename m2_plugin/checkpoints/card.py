"""Write the model card (README.md) of a transformers folder, from what is known of the model.

Nothing is made up: what is not known is left out, and there is a licence only if somebody gave one.
Paths on this machine become their last part.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig

from m2_plugin.checkpoints.fetch import NAME
from m2_plugin.checkpoints.folder import CARD
from m2_plugin.files import write_atomically
from m2_plugin.models.configuration_m2_bert import M2BertConfig

__all__ = [
    "add_section",
    "metadata_of",
    "new_card",
    "shown_name",
    "table",
    "usage",
]

# The end of an architecture's name → what the model has beside the encoder, the task of the hub's
# widgets, and transformers' class for it.
HEADS = {
    "ForMaskedLM": ("a masked-language-model head", "fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": (
        "a pooler and a classifier or regressor of texts",
        "text-classification",
        "AutoModelForSequenceClassification",
    ),
    "ForTokenClassification": (
        "a classifier of tokens",
        "token-classification",
        "AutoModelForTokenClassification",
    ),
    "ForQuestionAnswering": (
        "a head that marks answers in a text",
        "question-answering",
        "AutoModelForQuestionAnswering",
    ),
    "ForMultipleChoice": ("a score for each of several texts", None, "AutoModelForMultipleChoice"),
    "ForTextEmbedding": (
        "a pooler that embeds texts",
        "feature-extraction",
        "AutoModelForTextEncoding",
    ),
    "ForCausalLM": ("a language-model head", "text-generation", "AutoModelForCausalLM"),
    "Model": ("no head", "feature-extraction", "AutoModel"),
}
PAPER = """\
```bibtex
@inproceedings{fu2023monarch,
  title = {Monarch Mixer: A Simple Sub-Quadratic {GEMM}-Based Architecture},
  author = {Fu, Daniel Y. and Arora, Simran and Grogan, Jessica and Johnson, Isys and Eyuboglu,
    Sabri and Thomas, Armin W. and Spector, Benjamin and Poli, Michael and Rudra, Atri and R{\\'e},
    Christopher},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2310.12109}
}
```"""
SIZES = {  # rows of the table: a config's field, or that of another architecture
    "Layers": ("num_hidden_layers", "n_layers"),
    "Hidden size": ("hidden_size", "d_model"),
    "Intermediate size": ("intermediate_size",),
    "Vocabulary": ("vocab_size",),
}
# Metadata that stay true if weights change.
INHERITED = ("license", "license_name", "license_link", "language", "datasets", "base_model")

Section = tuple[str, str]  # title and text


def new_card(
    name: str,
    config: PretrainedConfig,
    parameters: int,
    sections: Iterable[Section] = (),
    has_tokenizer: bool = True,
    results: Sequence[tuple[str, str, float]] = (),
    **metadata: Any,
) -> str:
    """Return the text of a card, in the hub's format.

    Args:
        name: The model's name, its title.
        config: The model's config, whose `architectures` say what it is.
        parameters: The number of parameters.
        sections: More sections, such as the training.
        has_tokenizer: Whether the folder has a tokenizer.
        results: Of evaluations: the data's name, the metric's and the value. They go into the
            metadata; a section should show them.
        **metadata: Fields of `huggingface_hub.ModelCardData`, such as `license`; None is left out.
    """
    is_m2 = isinstance(config, M2BertConfig)
    architecture = (config.architectures or ["Model"])[0]
    head, task, auto = _head(architecture)
    if is_m2:
        kind = "An M2-BERT, a Monarch Mixer encoder ([paper](https://arxiv.org/abs/2310.12109)),"
    else:
        kind = f"A model of type `{config.model_type}`"
    rows: dict[str, Any] = {"Class": f"`{architecture}`", "Parameters": parameters}
    for title, fields in SIZES.items():
        rows[title] = next((getattr(config, f) for f in fields if hasattr(config, f)), None)
    limits = []
    if is_m2:
        length = config.max_sequence_length
        rows["Longest input"] = length and f"{length:,} tokens"
        rows["Sequence mixer"] = f"`{config.sequence_mixer}`"
        limits = _limits(config)
    metadata["eval_results"] = [
        EvalResult(task or "other", data, data, metric, value) for data, metric, value in results
    ] or None
    metadata["model_name"] = name if results else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[config.model_type],
        **{key: value for key, value in metadata.items() if value is not None},
    )
    parts: list[Section] = [
        ("Use", usage(architecture, is_m2=is_m2, has_tokenizer=has_tokenizer)),
        *sections,
        *([("Limits", "\n".join(f"- {limit}" for limit in limits))] if limits else []),
        *([("Citation", PAPER)] if is_m2 else []),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{kind} with {head}.\n\n{table(rows)}\n"
    return str(ModelCard(text + "".join(f"\n## {title}\n\n{body}\n" for title, body in parts)))


def add_section(
    folder: Path,
    title: str,
    text: str,
    *,
    name: str,
    config: PretrainedConfig,
    parameters: int,
    **metadata: Any,
) -> None:
    """Append a section to a folder's card, which stays as it is; make a card if there is none.

    Args:
        folder: The folder.
        title: The section's title.
        text: Its text.
        name: As in `new_card`, like the other arguments.
        config: The model's config.
        parameters: The number of parameters.
        **metadata: Of a new card.
    """
    path = folder / CARD
    if path.is_file():
        card = path.read_text(encoding="utf-8", errors="replace").rstrip()
        text = f"{card}\n\n## {title}\n\n{text}\n"
    else:
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        text = new_card(name, config, parameters, [(title, text)], has_tokenizer, **metadata)
    write_atomically(path, text)


def metadata_of(folder: str | Path) -> dict[str, Any]:
    """Read from a folder's card what stays true of models made from it; {} if there is no card."""
    path = Path(folder) / CARD
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # the card may be absent, and its metadata may hold anything
        return {}
    return {key: value for key, value in data.to_dict().items() if key in INHERITED}


def shown_name(source: str | Path) -> str:
    """Return what a card may say of a source: a hub name, or the last part of a path or URL."""
    text = str(source).rstrip("/")
    if NAME.fullmatch(text) and not text.startswith(".") and not Path(text).exists():
        return text
    return re.split(r"[/\\]", re.sub(r"[?#].*", "", text))[-1] or "."


def table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns; values that are None or empty are left out."""

    def shown(value: Any) -> str:
        text = (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
        return " ".join(text.split()).replace("|", "\\|")

    known = {key: value for key, value in rows.items() if value not in (None, "", [], {})}
    lines = [f"| {shown(key)} | {shown(value)} |" for key, value in known.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def usage(
    architecture: str,
    is_m2: bool,
    has_tokenizer: bool,
    where: str = ".",
    remote_code: bool = False,
) -> str:
    """Return code that loads the model of a folder.

    Args:
        architecture: The name of the model's class.
        is_m2: Whether it is a class of this package.
        has_tokenizer: Whether the folder has a tokenizer.
        where: The folder, or its name on the hub.
        remote_code: Whether the folder has the model's code, to be used in place of this package.
    """
    _, _, auto = _head(architecture)
    classes = [auto, *(["AutoTokenizer"] if has_tokenizer else [])]
    lines = [f"from transformers import {', '.join(classes)}", ""]
    if is_m2 and not remote_code:
        lines += ["import m2_plugin.models  # so that transformers knows M2-BERT", ""]
    arguments = f'"{where}"' + (", trust_remote_code=True" if remote_code else "")
    comment = "  # this folder" if where == "." else ""
    lines.append(f"model = {auto}.from_pretrained({arguments}){comment}")
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{where}")')
        if auto != "AutoModelForMultipleChoice":
            lines.append('output = model(**tokenizer("A text.", return_tensors="pt"))')
    return "\n".join(["```python", *lines, "```"])


def _head(architecture: str) -> Sequence[Any]:
    return next((h for end, h in HEADS.items() if architecture.endswith(end)), HEADS["Model"])


def _limits(config: M2BertConfig) -> list[str]:
    limits = []
    length = config.max_sequence_length
    if length is not None:
        limits.append(f"Longer texts than {length:,} tokens must be cut or split.")
    if config.padded_length is not None:
        limits.append("The model pads every text to that length itself, and each costs as much.")
    elif config.sequence_mixer == "monarch_mixer" and not config.mask_padding:
        limits.append(
            "The long convolutions see padding (`mask_padding: false`): the output for a text "
            "depends on how much padding follows it. Pad texts as in training."
        )
    return limits
