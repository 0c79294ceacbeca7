"""Decide which model a checkpoint holds. Every command that reads a checkpoint calls `resolve`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m2_plugin.checkpoints.names import config_fields, derived_tensors, our_name, translate
from m2_plugin.constants import VOCAB_MULTIPLE
from m2_plugin.models.configuration_m2_bert import (
    REFERENCE_KEYS,
    M2BertConfig,
    check_values,
    padded_size,
    unknown_keys,
)
from m2_plugin.models.modeling_m2_bert import (
    M2BertForMaskedLM,
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
    M2BertForTokenClassification,
    M2BertModel,
)

__all__ = [
    "Resolved",
    "expected_tensors",
    "holds_m2_bert",
    "is_reference_config",
    "listed",
    "model_class_of",
    "reference_config",
    "resolve",
]

TOKEN_TYPE_IDS = "bert.embeddings.token_type_ids"
WORDS, DECODER = "model.embeddings.word_embeddings.weight", "decoder.weight"
POSITIONS = "embeddings.position_embeddings.weight"
# The beginning of names that only models with this head have; the first that occurs counts. A
# classifier without a pooler is one of tokens.
HEADS: list[tuple[str, type[PreTrainedModel]]] = [
    ("head.", M2BertForMaskedLM),
    ("decoder.", M2BertForMaskedLM),
    ("qa_outputs.", M2BertForQuestionAnswering),
    ("choice_scorer.", M2BertForMultipleChoice),
    ("classifier.", M2BertForSequenceClassification),
    ("pooler.", M2BertForTextEmbedding),
    ("", M2BertModel),
]
OWN_FIELDS = [p for p in signature(M2BertConfig.__init__).parameters if p not in ("self", "kwargs")]
LABEL_FIELDS = ("problem_type", "id2label", "label2id")
# Flags of the reference: our field, and its values for true and false.
REFERENCE_FLAGS: dict[str, tuple[str, Any, Any]] = {
    "monarch_mixer_sequence_mixing": ("sequence_mixer", "monarch_mixer", "alibi_attention"),
    "pool_all": ("classifier_pooling", "mean", "cls"),
    "use_normalized_embeddings": ("normalize_embeddings", True, False),
}
# Fields of the reference for which this package implements one value only.
REQUIRED_VALUES = {
    "hidden_act": "gelu",
    "attention_pooling": False,
    "sequence_token_planting": False,
}
# Fields of the reference that do not change what a trained model computes. For use_cls_token and
# gather_sentence_embeddings see `_drop_spare_heads`.
IGNORED_FIELDS = {
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
# Our fields that the reference does not have.
NOT_EXPORTED = ("pad_vocab_size_multiple", "backend", "hyena_extended_from")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Fields that change the model's outputs and that no tensor shows. If no config gives them, their
# defaults are assumed.
ASSUMED_FIELDS = (
    "hyena_w_mod",
    "mask_padding",
    "layer_norm_eps",
    "classifier_pooling",
    "normalize_embeddings",
)


@dataclass
class Resolved:
    """The model that a checkpoint holds.

    Args:
        config: The model's configuration.
        weights: The model's weights under our names; views of the tensors in the checkpoint.
        mapped: Name in the checkpoint → our name.
        derived: Names in the checkpoint of tensors that our model computes, with equal values.
        rounded: Names in `derived` whose values differ from ours in the last bits.
        different: Names in `derived` whose values differ by more, which the caller allows.
        dropped: Name in the checkpoint → why the model does not use this tensor.
        unknown: Names in the checkpoint that no M2-BERT has.
        unread: Keys of the saved config that no M2-BERT has, such as misspelt ones.
        assumed: Field → default value, for fields that neither weights nor config show.
        of_reference: Whether the names in the checkpoint are the reference's.
    """

    config: M2BertConfig
    weights: dict[str, Tensor]
    mapped: dict[str, str]
    derived: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)
    of_reference: bool = False

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class of the model, found by the names of its weights."""
        found = model_class_of(self.weights, self.config)
        if found is M2BertForTokenClassification and (
            self.of_reference
            or self.config.architectures == [M2BertForSequenceClassification.__name__]
        ):
            return M2BertForSequenceClassification  # that has lost its pooler
        return found


def model_class_of(names: Iterable[str], config: M2BertConfig) -> type[PreTrainedModel]:
    """Find the model class whose tensors have these names (ours)."""
    names = list(names)

    def there(part: str) -> bool:
        return any(name.startswith(part) for name in names)

    found = next(model_class for part, model_class in HEADS if there(part))
    if found is M2BertForSequenceClassification and not there("pooler."):
        return M2BertForTokenClassification
    embeds = found is M2BertModel and not config.embedding_pooler
    return M2BertForTextEmbedding if embeds else found


def is_reference_config(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is the M2 reference's; its `model_type` may be `bert` or `m2_bert`."""
    return bool((REFERENCE_KEYS | REFERENCE_FLAGS.keys()) & config.keys())


def holds_m2_bert(names: Iterable[str]) -> bool:
    """Tell whether these names of tensors, the reference's or ours, belong to an M2-BERT.

    Layers of an M2-BERT have both a mixer and an MLP. Other names prove nothing: transformers' BERT
    and the reference use the same names for embeddings and heads, and other models have an `mlp`.
    """
    layer = re.compile(r"(?:model\.)?layers\.\d+\.(mixer|mlp)\.")
    matches = [layer.match(our_name(name) or name) for name in names]
    return {match[1] for match in matches if match} == {"mixer", "mlp"}


def resolve(
    weights: Mapping[str, Tensor],
    saved_config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    where: str = "the saved config",
    allow_different: Sequence[str] = (),
) -> Resolved:
    """Decide which model a checkpoint holds.

    The tensors decide all fields that their names and shapes show. The saved config gives the other
    fields and must not contradict the tensors. Fields that neither shows take their defaults.
    Finally the overrides replace fields. The caller must check that the weights fit them.

    Args:
        weights: Tensors under the names of the M2 reference or of this package.
        saved_config: The config that belongs to them, in the reference's fields or ours.
        overrides: Fields to replace, in our names. They also give fields that neither weights nor
            config show.
        where: The name of the saved config in error messages.
        allow_different: Patterns (`*.deltas`) of names of tensors that the reference stores and our
            model computes, and whose values may differ.

    Returns:
        The config, and the weights under our names.

    Raises:
        ValueError: If the tensors are not an M2-BERT, do not fit each other, contradict the saved
            config, or do not show the whole model (for example if the position embeddings are
            lost). The message names the tensor or the field.
    """
    if not holds_m2_bert(weights):
        other = [name for name in weights if our_name(name) is None] or list(weights)
        raise ValueError(
            f"it is no M2-BERT: it has weights with other names, {', '.join(other[:3])} ..."
        )
    result = _translated(weights)
    _check_numbers(result)
    saved_config = saved_config or {}
    result.unread = _unread(saved_config)
    raw = _drop_spare_heads(result, saved_config, where)
    told = _reference_defaults(result, saved_config, raw) | dict(overrides or {})
    result.config, result.assumed = _config(result.weights, saved_config, told, where)
    computed = derived_tensors(result.weights)
    # Buffers of a module that the model lacks have no place in the model.
    for name in [n for n in result.derived if n not in computed and n != TOKEN_TYPE_IDS]:
        result.derived.remove(name)
        result.unknown.append(name)
    _untie(result)
    _check_shapes(result)
    _check_derived(result, weights, computed, allow_different)
    if overrides:
        result.config = result.config.with_overrides(overrides)
    return result


def reference_config(config: M2BertConfig) -> dict[str, Any]:
    """Translate a config to the reference's fields."""
    fields = {key: getattr(config, key) for key in OWN_FIELDS if key not in NOT_EXPORTED}
    fields["monarch_mixer_sequence_mixing"] = fields.pop("sequence_mixer") == "monarch_mixer"
    fields["pool_all"] = fields.pop("classifier_pooling") == "mean"
    fields["use_normalized_embeddings"] = fields.pop("normalize_embeddings")
    fields["use_cls_token"] = not fields.pop("embedding_pooler")
    return fields | {"model_type": "bert"}


def expected_tensors(model_class: type[PreTrainedModel], config: M2BertConfig) -> dict[str, Tensor]:
    """List the tensors that a folder with this model holds, without values (on the meta device)."""
    with torch.device("meta"):
        expected = with_prefix(model_class(config).state_dict())
    if config.tie_word_embeddings:
        expected.pop(DECODER, None)
    return expected


def with_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix `model.` to names of a bare encoder, as in the models with a head."""
    parts = ("embeddings.", "layers.")
    return {f"model.{n}" if n.startswith(parts) else n: t for n, t in weights.items()}


def listed(names: Sequence[str]) -> str:
    """Join the first five names, and count the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _translated(weights: Mapping[str, Tensor]) -> Resolved:
    if any(name.startswith("bert.") for name in weights):
        found = translate(weights)
        return Resolved(
            M2BertConfig(),
            found.weights,
            found.mapped,
            found.derived,
            dropped=dict.fromkeys(found.flash_fft, "a buffer of FlashFFTConv"),
            unknown=found.unknown,
            of_reference=True,
        )
    ours = with_prefix(weights)
    return Resolved(M2BertConfig(), ours, dict(zip(weights, ours, strict=True)))


def _check_numbers(result: Resolved) -> None:
    """Refuse weights that are no numbers a model can compute with, or that claim to be larger."""
    for name, ours in result.mapped.items():
        tensor = result.weights[ours]
        if tensor.dtype not in WEIGHT_DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {dtype} there, and weights must be one of {kinds}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is {tuple(tensor.shape)} there, but stores fewer values")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} has NaN or infinite values: the training that wrote it had diverged, or "
                f"the file is damaged"
            )


def _drop_spare_heads(result: Resolved, saved: Mapping[str, Any], where: str) -> bool:
    """Drop what a text embedder of the reference does not use: see `Resolved.dropped`.

    `gather_sentence_embeddings: true` says that the model is one: a classifier is left over from
    its training. `use_cls_token: true` says that its embeddings are the first token's hidden
    states, not the pooler's output; in the config of a model with another head it says nothing.

    Returns:
        Whether embeddings are raw hidden states.

    Raises:
        ValueError: If `pool_all` says something else.
    """
    if not result.of_reference:
        return False
    gathers, raw = (saved.get(k) is True for k in ("gather_sentence_embeddings", "use_cls_token"))
    others = ("head.", "decoder.") if gathers else ("head.", "decoder.", "classifier.")
    if any(name.startswith(others) for name in result.weights):
        return False
    if raw and saved.get("pool_all") is True:
        raise ValueError(
            f"{where}: use_cls_token and pool_all are both true: set one of them to false, so that "
            f"embeddings are of the first token, or means"
        )
    spare = {"classifier.": "left over from training (gather_sentence_embeddings: true)"}
    if raw:
        spare["pooler."] = "embeddings are raw hidden states (use_cls_token: true)"
    for theirs, ours in list(result.mapped.items()):
        if (head := ours.partition(".")[0] + ".") in spare:
            result.dropped[theirs] = spare[head]
            del result.mapped[theirs], result.weights[ours]
    return raw


def _reference_defaults(result: Resolved, saved: Mapping[str, Any], raw: bool) -> dict[str, Any]:
    """What is true of a checkpoint of the reference unless its config, or a user, says otherwise.

    The reference pads every text to the full length, and its convolutions see that padding.
    """
    of_ours = saved.get("model_type") == M2BertConfig.model_type and not is_reference_config(saved)
    if not result.of_reference or of_ours:
        return {}
    fields = {"pad_inputs": saved.get("mask_padding") is not True, "embedding_pooler": not raw}
    return {key: value for key, value in fields.items() if key not in saved}


def _config(
    weights: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    overrides: Mapping[str, Any],
    where: str,
) -> tuple[M2BertConfig, dict[str, Any]]:
    """Return the config that fits the weights, and the fields in it that were assumed."""
    try:
        saved = _our_fields(saved)
        check_values(saved)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    shown = config_fields(weights)
    stated = {**saved, **overrides}
    # The other weights do not show whether the model never had positions or whether they are lost.
    if (
        not shown["use_positional_encodings"]
        and stated.get("use_positional_encodings") is not False
    ):
        raise ValueError(
            f"there is no {POSITIONS}. If the model has none, a config must say so "
            f"(use_positional_encodings: false)"
        )
    nblocks = int(shown.get("monarch_mlp_nblocks", 1))
    # Sizes that are rounded up to a multiple; a config may hold the value before rounding.
    multiples = {
        "vocab_size": saved.get("pad_vocab_size_multiple", VOCAB_MULTIPLE),
        "intermediate_size": nblocks,
    }

    def fits(key: str, value: Any) -> bool:
        if key in multiples and isinstance(value, int):
            return shown[key] in (value, padded_size(value, multiples[key]))
        return bool(value == shown[key])

    for key, value in shown.items():
        if key in saved and not fits(key, saved[key]):
            raise ValueError(f"{key} is {saved[key]!r} in {where}, but the weights show {value!r}")
    told = {k: v for k, v in overrides.items() if k not in shown and k != "num_labels"}
    fields: dict[str, Any] = {**saved, **told, **shown}
    size, up = fields["intermediate_size"], weights.get("model.layers.0.mlp.up_proj.weight")
    if fits("intermediate_size", stated.get("intermediate_size")):
        fields["intermediate_size"] = stated["intermediate_size"]
    elif up is not None and nblocks * up.shape[-2] not in (size, 2 * size):
        raise ValueError(
            "the blocks of the MLP are padded, so the weights do not show intermediate_size: give "
            "it in a config (--config of m2-plugin import, config_overrides in a YAML)"
        )
    for name in ("classifier.bias", "classifier.weight"):
        if name in weights:
            fields["num_labels"] = len(weights[name])
    try:
        config = M2BertConfig.from_dict(fields)
    except (TypeError, AttributeError, KeyError, RecursionError) as error:  # of transformers
        raise ValueError(f"{where} cannot be read as a config: {error}") from error
    assumed = [*ASSUMED_FIELDS, "num_attention_heads"]
    if config.sequence_mixer != "alibi_attention":
        assumed.pop()
    return config, {key: getattr(config, key) for key in assumed if key not in stated}


def _our_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a saved config, with the reference's fields or ours, to our fields."""
    if saved.get("model_type") == M2BertConfig.model_type and not is_reference_config(saved):
        # Keys that begin with _ are state of the process that saved the config. The last two keys
        # name code in the folder.
        left_out = ("model_type", "transformers_version", "auto_map", "custom_pipelines")
        names = saved.get("architectures") or []
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"architectures must be a list of names, not {names!r}")
        return {k: v for k, v in saved.items() if k not in left_out and not k.startswith("_")}
    fields = {k: v for k, v in saved.items() if k in (*OWN_FIELDS, *LABEL_FIELDS)}
    for theirs, (ours, true, false) in REFERENCE_FLAGS.items():
        if theirs in saved:
            if not isinstance(saved[theirs], bool):
                raise ValueError(f"{theirs} must be true or false, not {saved[theirs]!r}")
            fields[ours] = true if saved[theirs] else false
    for key, value in REQUIRED_VALUES.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{key} is {saved[key]!r}, but only {value!r} is supported")
    return fields


def _unread(saved: Mapping[str, Any]) -> list[str]:
    """Find the keys of a config that neither we, the reference nor transformers have."""
    known = {*REFERENCE_FLAGS, *REQUIRED_VALUES, *IGNORED_FIELDS}
    return [key for key in unknown_keys(saved) if key not in known]


def _untie(result: Resolved) -> None:
    """Drop the decoder's weight if it repeats the word embeddings; else untie the two."""
    both = DECODER in result.weights and WORDS in result.weights
    if not (both and result.config.tie_word_embeddings):
        return
    decoder, words = result.weights[DECODER], result.weights[WORDS]
    if _equal(*_in_coarser(decoder, words)):
        theirs = next(name for name, ours in result.mapped.items() if ours == DECODER)
        del result.weights[DECODER], result.mapped[theirs]
        result.derived.append(theirs)
        if decoder.dtype != words.dtype:
            result.rounded.append(theirs)
    else:
        result.config.tie_word_embeddings = False


def _check_shapes(result: Resolved) -> None:
    expected = expected_tensors(result.model_class, result.config)
    for name, ours in result.mapped.items():
        if ours in expected and result.weights[ours].shape != expected[ours].shape:
            found, right = tuple(result.weights[ours].shape), tuple(expected[ours].shape)
            raise ValueError(
                f"{name} has the shape {found}, but the other tensors make a model where it has "
                f"{right}"
            )


def _check_derived(
    result: Resolved,
    raw: Mapping[str, Tensor],
    computed: Mapping[str, Tensor],
    allowed: Sequence[str],
) -> None:
    """Check that derived tensors in the file equal those that our model computes."""
    for name in result.derived:
        if name.endswith(DECODER):  # `_untie` has compared it already
            continue
        found = raw[name]
        right = torch.zeros_like(found) if name == TOKEN_TYPE_IDS else computed[name]
        if _equal(found, right):
            continue
        if _near(found, right):
            result.rounded.append(name)
        elif any(fnmatch(name, pattern) for pattern in allowed):
            result.different.append(name)
        else:
            is_other = "has other values than those that M2-BERT computes for it"
            if found.shape != right.shape:
                is_other = (
                    f"has the shape {tuple(found.shape)}, but the other tensors make a model where "
                    f"it has {tuple(right.shape)}"
                )
            raise ValueError(
                f"{name} {is_other}. To import the rest without it: "
                f"m2-plugin import --allow-different {name!r}"
            )


def _near(found: Tensor, right: Tensor) -> bool:
    """Tell whether tensors differ in their last bits only, in the coarser of their dtypes."""
    if found.shape != right.shape:
        return False
    found, right = _in_coarser(found, right)
    bound = 4 * torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    return torch.allclose(found.float(), right.float(), rtol=bound, atol=1e-6)


def _in_coarser(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in the less exact of their dtypes, if both are floating-point."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return one, other
    coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return one.to(coarser), other.to(coarser)


def _equal(found: Tensor, other: Tensor) -> bool:
    if found.shape != other.shape or found.dtype != other.dtype:
        return False
    return found.data_ptr() == other.data_ptr() or torch.equal(found, other)
