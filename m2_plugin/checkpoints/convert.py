"""Checkpoints in, checkpoints out: the reference's files and Composer's ↔ transformers folders."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from m2_plugin.checkpoints.names import (
    config_fields,
    derived_tensors,
    to_reference,
    translate,
)
from m2_plugin.checkpoints.read import read_file
from m2_plugin.constants import VOCAB_MULTIPLE
from m2_plugin.files import whole
from m2_plugin.models.configuration_m2_bert import (
    TRANSFORMERS_KEYS,
    M2BertConfig,
    check_values,
)
from m2_plugin.models.modeling_m2_bert import (
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertModel,
)
from m2_plugin.models.sentence_folder import write_modules

__all__ = ["ImportReport", "export_checkpoint", "import_checkpoint", "load_folder"]

log = logging.getLogger(__name__)

WEIGHTS = (  # in the order they are looked for
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.bin",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
TOKEN_TYPE_IDS = "bert.embeddings.token_type_ids"
WORDS, DECODER = "model.embeddings.word_embeddings.weight", "decoder.weight"
POSITIONS = "embeddings.position_embeddings.weight"
# A part of the names that only models with this head have; the first that is there counts.
HEADS: list[tuple[str, type[PreTrainedModel]]] = [
    ("head.", M2BertForMaskedLM),
    ("decoder.", M2BertForMaskedLM),
    ("classifier.", M2BertForSequenceClassification),
    ("pooler.", M2BertForTextEmbedding),
    ("", M2BertModel),
]
OWN_FIELDS = [p for p in signature(M2BertConfig.__init__).parameters if p not in ("self", "kwargs")]
LABEL_FIELDS = ("problem_type", "id2label", "label2id")
# The reference's switches: our field, and its values for true and false.
SWITCHES: dict[str, tuple[str, Any, Any]] = {
    "monarch_mixer_sequence_mixing": ("sequence_mixer", "monarch_mixer", "alibi_attention"),
    "pool_all": ("classifier_pooling", "mean", "cls"),
    "use_normalized_embeddings": ("normalize_embeddings", True, False),
}
# Its fields with a choice that is not implemented here, and the value that is.
ONLY = {"hidden_act": "gelu", "attention_pooling": False, "sequence_token_planting": False}
# Its other fields: how it was trained, run and evaluated, and what else a BERT's config holds. Of
# these use_cls_token and gather_sentence_embeddings ask for what there is: the pooler's output, of
# the first token unless pool_all.
NOT_OURS = {
    "alibi_starting_size",
    "expand_positional_embeddings",
    "gather_sentence_embeddings",
    "gradient_checkpointing",
    "hyena_filter_dropout",
    "hyena_lr_pos_emb",
    "hyena_wd",
    "long_conv_kernel_learning_rate",
    "performing_BEIR_evaluation",
    "position_embedding_type",
    "use_cache",
    "use_cls_token",
    "use_flash_fft",
    "use_flash_mm",
}
NOT_THEIRS = ("pad_vocab_size_multiple", "backend", "hyena_extended_from")
# Fields that no tensor tells, and which change what the model computes.
UNTOLD = (
    "hyena_w_mod",
    "mask_padding",
    "layer_norm_eps",
    "classifier_pooling",
    "normalize_embeddings",
)


@dataclass
class ImportReport:
    """What an import did.

    Args:
        source: what was read.
        model: the class that the folder holds.
        config: its configuration.
        mapped: name in the source → name in the folder.
        derived: names in the source of tensors that the model computes; checked to be the same.
        rounded: those of them that are the same but for their last bits.
        unused: names in the source that were left out, as allowed.
        missing: names that the source would have, and lacks, as allowed: they start at random.
        tokenizer: where that in the folder is from, or None if there is none.
        unread: keys of the config that are no fields, as misspelt ones.
        assumed: fields that neither the weights nor a config told, with the values taken.
    """

    source: str
    model: str
    config: M2BertConfig
    mapped: dict[str, str] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    assumed: dict[str, Any] = field(default_factory=dict)

    def lines(self, verbose: bool = False) -> Iterator[str]:
        """The report for a reader; `verbose` names every tensor."""
        config = self.config
        yield (
            f"{self.source}: {self.model}, {config.num_hidden_layers} layers, "
            f"hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"up to {config.max_sequence_length or 'any number of'} tokens"
        )
        yield (
            f"{len(self.mapped)} tensors mapped, {len(self.derived)} derived, "
            f"{len(self.unused)} unused, {len(self.missing)} missing"
        )
        if verbose:
            width = max(map(len, self.mapped), default=0)
            yield from (f"  {name:{width}}  {ours}" for name, ours in self.mapped.items())
            yield from (f"  {name:{width}}  derived" for name in self.derived)
        if self.rounded:
            yield (
                f"{len(self.rounded)} derived differ in their last bits from what M2-BERT "
                f"computes, which an export will write: {_listed(self.rounded)}"
            )
        yield from (f"  {name}: unused" for name in self.unused)
        yield from (f"  {name}: missing, starts at random" for name in self.missing)
        if self.tokenizer is None:
            yield "no tokenizer came with it: --tokenizer saves one beside"
        if self.unread:
            yield f"keys of the config that no M2-BERT has, not read: {', '.join(self.unread)}"
        if self.assumed:
            values = ", ".join(f"{key} {value}" for key, value in self.assumed.items())
            yield f"not told by weights or config, so by default: {values}"


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> ImportReport:
    """Makes a transformers folder of a checkpoint; no code in it is run.

    Args:
        source: a Composer checkpoint or bare weights, of the M2 reference or of this package; or a
            folder with `config.json` and weights under either's names.
        out: the folder to make. It appears when it is whole.
        config: a JSON file of the reference's or our fields, in place of the folder's
            `config.json` or what Composer saved. The weights decide, and what it says otherwise is
            an error; it tells what they do not.
        tokenizer: a folder or hub name, to be saved beside; by default the one in the source, if
            there is any.
        allow_missing: patterns (`cls.*`) of the names, as the source has them, that it may lack.
        allow_unused: patterns of names that may be left out.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: if something cannot be read, contradicts something else, is missing or is not
            used; the message names it. Nothing is left behind.
    """
    source, out = str(source), Path(out)
    file, given, where = _find(source, config)
    raw, saved = read_file(file)
    if given is None and saved.config is not None:
        given, where = saved.config, f"the config saved in {file}"
    try:
        report, weights = _translated(source, raw)
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error
    # Of a BERT, the names of embeddings and outputs are the reference's too; other models have an
    # .mlp. of ours, or a .mixer.
    parts = [re.match(r"model\.layers\.\d+\.(mixer|mlp)\.", name) for name in weights]
    if len({part[1] for part in parts if part}) < 2:
        others = report.unused or list(raw)
        raise ValueError(
            f"{source!r} is no M2-BERT: it has weights of other names, {', '.join(others[:3])} ..."
        )
    try:
        report.config, report.assumed = _config(weights, given or {}, where)
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error
    model_class = _head(weights)
    report.model, report.unread = model_class.__name__, _unread(given or {})
    report.config.architectures = [report.model]
    computed = derived_tensors(weights)
    # A buffer of a part that is not there is no different from any tensor that has no place.
    for name in [n for n in report.derived if n not in computed and n != TOKEN_TYPE_IDS]:
        report.derived.remove(name)
        report.unused.append(name)
    _untie(report, weights)
    _check(report, weights, model_class, allow_missing, allow_unused)
    _check_derived(report, raw, computed)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    report.config.torch_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    report.tokenizer, files = tokenizer or _own_tokenizer(source), {}
    if report.tokenizer is None and any(name in saved.tokenizer for name in TOKENIZER_FILES):
        report.tokenizer, files = file, saved.tokenizer
    with whole(out) as temporary:
        temporary.mkdir()
        report.config.save_pretrained(temporary)
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS[0], metadata={"format": "pt"})
        if model_class is M2BertForTextEmbedding:
            write_modules(temporary, report.config, tensors)
        if report.tokenizer is not None:
            _save_tokenizer(report.tokenizer, files, report.config, temporary)
    return report


def export_checkpoint(folder: str | Path, out: str | Path) -> int:
    """Writes a folder of ours as a Composer checkpoint of the reference.

    The inverse of `import_checkpoint`: every tensor is there again, buffers included.

    Args:
        folder: a transformers folder with an M2-BERT.
        out: the `.pt` file to write. It appears when it is whole.

    Returns:
        The number of tensors.

    Raises:
        ValueError: if the folder is none, or the reference has no such model.
    """
    config, weights = load_folder(folder)
    if config.mask_padding:
        raise ValueError(
            f"{str(folder)!r} has mask_padding: true, which the reference cannot compute"
        )
    if config.hyena_extended_from:
        raise ValueError(
            f"{str(folder)!r} was extended by the method 'continue': the reference's filters decay "
            f"otherwise (hyena_extended_from: {config.hyena_extended_from})"
        )
    tensors = {f"model.{name}": tensor for name, tensor in to_reference(weights).items()}
    content = reference_config(config)
    integrations = {"huggingface": {"model": {"config": {"content": content}}}}
    with whole(Path(out)) as temporary:
        torch.save(
            {"state": {"model": tensors, "integrations": integrations}, "rng": []}, temporary
        )
    return len(tensors)


def load_folder(folder: str | Path) -> tuple[M2BertConfig, dict[str, Tensor]]:
    """Reads a transformers folder of ours without building the model.

    Returns:
        Its config; and its weights, mapped from the file, with names as in the models with a head:
        those of the encoder begin with `model.`.

    Raises:
        ValueError: if it is no such folder, or a tensor is missing or of another shape than the
            config says: transformers would draw it at random.
    """
    config, weights = load_config(folder), read_file(_weights_in(str(folder)))[0]
    if config.tie_word_embeddings:
        weights.pop(DECODER, None)  # .bin files have it twice
    weights = _with_prefix(weights)
    by_name = {c.__name__: c for _, c in HEADS}
    expected = _expected(by_name.get((config.architectures or [""])[0], _head(weights)), config)
    if missing := _listed([name for name in expected if name not in weights]):
        raise ValueError(f"{str(folder)!r} is not whole: its weights lack {missing}")
    if misfit := _misfit(weights, expected, {}):
        raise ValueError(f"{str(folder)!r}: {misfit} by its config.json")
    return config, weights


def load_config(folder: str | Path) -> M2BertConfig:
    """Reads the config of a transformers folder of ours.

    Raises:
        ValueError: if it is no such folder.
    """
    model_type = _read_json(Path(folder) / "config.json").get("model_type")
    if model_type != M2BertConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds no M2-BERT: model_type in its config.json is "
            f"{model_type!r}, not {M2BertConfig.model_type!r}"
        )
    return M2BertConfig.from_pretrained(folder)


def reference_config(config: M2BertConfig) -> dict[str, Any]:
    """The fields of a config in the reference's vocabulary."""
    fields = {key: getattr(config, key) for key in OWN_FIELDS if key not in NOT_THEIRS}
    fields["monarch_mixer_sequence_mixing"] = fields.pop("sequence_mixer") == "monarch_mixer"
    fields["pool_all"] = fields.pop("classifier_pooling") == "mean"
    fields["use_normalized_embeddings"] = fields.pop("normalize_embeddings")
    return fields | {"model_type": "bert"}


def _find(source: str, config: str | Path | None) -> tuple[str, dict[str, Any] | None, str]:
    """The file of weights, the config given with it, and where that stands."""
    if not os.path.isdir(source):
        given = None if config is None else _read_json(Path(config))
        return source, given, str(config)
    config = Path(config or os.path.join(source, "config.json"))
    return _weights_in(source), _read_json(config), str(config)


def _weights_in(folder: str) -> str:
    there = [path for name in WEIGHTS if os.path.isfile(path := os.path.join(folder, name))]
    if not there:
        raise ValueError(f"{folder!r} has none of {', '.join(WEIGHTS)}")
    return there[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object")
    return content


def _with_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bare encoder's names as they are in the models with a head."""
    parts = ("embeddings.", "layers.")
    return {f"model.{n}" if n.startswith(parts) else n: t for n, t in weights.items()}


def _translated(source: str, raw: Mapping[str, Tensor]) -> tuple[ImportReport, dict[str, Tensor]]:
    report = ImportReport(source, "", M2BertConfig())
    if any(name.startswith("bert.") for name in raw):
        result = translate(raw)
        report.mapped, report.derived, report.unused = result.mapped, result.derived, result.unknown
        return report, result.weights
    weights = _with_prefix(raw)
    report.mapped = dict(zip(raw, weights, strict=True))
    return report, weights


def _config(
    weights: Mapping[str, Tensor], given: Mapping[str, Any], where: str
) -> tuple[M2BertConfig, dict[str, Any]]:
    """The config that the weights tell, and for the rest the one given, or defaults."""
    try:
        given = _our_fields(given)
        check_values(given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    told = config_fields(weights)
    # Lost or never there: the weights look the same.
    if not told["use_positional_encodings"] and given.get("use_positional_encodings") is not False:
        raise ValueError(
            f"there is no {POSITIONS}. Of a model that has none, a config must say so "
            f"(use_positional_encodings: false)"
        )
    nblocks = told.get("monarch_mlp_nblocks", 1)
    # What a size is padded to a multiple of: the config may hold it as it was before.
    padded = {
        "vocab_size": given.get("pad_vocab_size_multiple", VOCAB_MULTIPLE),
        "intermediate_size": nblocks,
    }
    for key, value in told.items():
        found, multiple = given.get(key, value), padded.get(key)
        before = multiple and isinstance(found, int) and -(-found // multiple) * multiple == value
        if found != value and not before:
            raise ValueError(f"{key} is {found!r} in {where}, and {value!r} by the weights")
    fields: dict[str, Any] = given | told
    size, up = fields["intermediate_size"], weights.get("model.layers.0.mlp.up_proj.weight")
    if "intermediate_size" in given:
        fields["intermediate_size"] = given["intermediate_size"]
    elif up is not None and nblocks * up.shape[-2] not in (size, 2 * size):
        raise ValueError(
            "the blocks of the MLP are padded, and so do not tell intermediate_size: give a config"
        )
    if told["vocab_size"] % padded["vocab_size"]:
        fields["pad_vocab_size_multiple"] = 1
    for name in ("classifier.bias", "classifier.weight"):
        if name in weights:
            fields["num_labels"] = len(weights[name])
    config = M2BertConfig(**fields)
    untold = [*UNTOLD, "num_attention_heads"] if "sequence_mixer" in told else UNTOLD
    return config, {key: getattr(config, key) for key in untold if key not in given}


def _our_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, the reference's or ours, that M2BertConfig has."""
    fields = {k: v for k, v in given.items() if k in (*OWN_FIELDS, *LABEL_FIELDS)}
    for theirs, (ours, true, false) in SWITCHES.items():
        if theirs in given:
            if not isinstance(given[theirs], bool):
                raise ValueError(f"{theirs} must be true or false, not {given[theirs]!r}")
            fields[ours] = true if given[theirs] else false
    for key, value in ONLY.items():
        if given.get(key, value) != value:
            raise ValueError(f"{key} is {given[key]!r}, and only {value!r} is supported here")
    return fields


def _unread(given: Mapping[str, Any]) -> list[str]:
    """The keys of a config that neither the reference nor transformers has: slips, perhaps."""
    known = {*OWN_FIELDS, *TRANSFORMERS_KEYS, *PretrainedConfig().to_dict(), *LABEL_FIELDS}
    known |= {*SWITCHES, *ONLY, *NOT_OURS}
    return [key for key in given if key not in known and not key.startswith("_")]


def _untie(report: ImportReport, weights: dict[str, Tensor]) -> None:
    """Drops the decoder's weight where it is the word embeddings' again; else unties the two."""
    if DECODER not in weights or WORDS not in weights:
        return
    if _equal(weights[DECODER], weights[WORDS]):
        theirs = next(name for name, ours in report.mapped.items() if ours == DECODER)
        del weights[DECODER], report.mapped[theirs]
        report.derived.append(theirs)
    else:
        report.config.tie_word_embeddings = False


def _check_derived(
    report: ImportReport, raw: Mapping[str, Tensor], computed: Mapping[str, Tensor]
) -> None:
    """Compares what the source stores with what the model computes in its place."""
    for name in report.derived:
        if name.endswith(DECODER):  # `_untie` has compared it
            continue
        found = raw[name]
        right = torch.zeros_like(found) if name == TOKEN_TYPE_IDS else computed[name]
        if found.shape != right.shape:
            raise ValueError(
                f"{report.source!r}: {name} is {tuple(found.shape)} there, and "
                f"{tuple(right.shape)} in the model that the other tensors make"
            )
        if _equal(found, right):
            continue
        bound = 4 * torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
        if not torch.allclose(found.float(), right.float(), rtol=bound, atol=1e-6):
            raise ValueError(f"{report.source!r}: {name} is not what M2-BERT computes in its place")
        report.rounded.append(name)


def _equal(found: Tensor, other: Tensor) -> bool:
    if found.shape != other.shape or found.dtype != other.dtype:
        return False
    return found.data_ptr() == other.data_ptr() or torch.equal(found, other)


def _head(weights: Iterable[str]) -> type[PreTrainedModel]:
    """The model that weights of these names are for."""
    return next(c for part, c in HEADS if any(name.startswith(part) for name in weights))


def _expected(model_class: type[PreTrainedModel], config: M2BertConfig) -> dict[str, Tensor]:
    """The tensors that a folder of such a model holds, without values."""
    with torch.device("meta"):
        expected = _with_prefix(model_class(config).state_dict())
    if config.tie_word_embeddings:
        expected.pop(DECODER, None)
    return expected


def _misfit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, str]
) -> str | None:
    """The first tensor that has another shape than it should; `names` are those to say."""
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name].shape:
            found, right = tuple(tensor.shape), tuple(expected[name].shape)
            return f"{names.get(name, name)} is {found} there, and {right}"
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check(
    report: ImportReport,
    weights: dict[str, Tensor],
    model_class: type[PreTrainedModel],
    allow_missing: Sequence[str],
    allow_unused: Sequence[str],
) -> None:
    """Compares names and shapes with those of the model; drops what may be unused."""
    expected = _expected(model_class, report.config)
    # Names are given as the source has, or would have them.
    reference = any(name.startswith("bert.") for name in report.mapped)
    names = dict(zip(expected, to_reference(expected) if reference else expected, strict=False))
    found = {ours: name for name, ours in report.mapped.items()}
    for ours in [name for name in weights if name not in expected]:
        del weights[ours], report.mapped[found[ours]]
        report.unused.append(found[ours])
    report.missing = [names[ours] for ours in expected if ours not in weights]
    if misfit := _misfit(weights, expected, found):
        raise ValueError(f"{report.source!r}: {misfit} in the model that the other tensors make")
    for tensors, allowed, what, option in (
        (report.missing, allow_missing, "lacks", "allow-missing"),
        (report.unused, allow_unused, "has, and an M2-BERT has no place for,", "allow-unused"),
    ):
        refused = [n for n in tensors if not any(fnmatch(n, pattern) for pattern in allowed)]
        if refused:
            raise ValueError(
                f"{report.source!r} {what} {_listed(refused)}. To import it all the same: "
                f"--{option} {refused[0]!r}"
            )


def _own_tokenizer(source: str) -> str | None:
    there = any(os.path.isfile(os.path.join(source, name)) for name in TOKENIZER_FILES)
    return source if there else None


def _save_tokenizer(
    name: str, files: Mapping[str, Any], config: M2BertConfig, folder: Path
) -> None:
    """Saves a tokenizer by name, or if there are any the one that these files make."""
    try:
        with TemporaryDirectory() as scratch:
            for file, content in files.items():
                text = json.dumps(content) if file.endswith(".json") else "\n".join(content)
                (Path(scratch) / os.path.basename(file)).write_text(text, encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(
                scratch if files else name, trust_remote_code=False
            )
    except Exception as error:  # its files may be anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer {name!r} cannot be loaded: {reason}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer {name!r} has {len(tokenizer)} entries, the model's vocab_size is "
            f"{config.vocab_size}"
        )
    if config.max_sequence_length is not None:
        tokenizer.model_max_length = config.max_sequence_length
    tokenizer.save_pretrained(folder)
