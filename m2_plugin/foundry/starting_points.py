"""Build a model from the keys of a YAML: read its source, config and weights, and check the fit."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from llmfoundry.models.hf.hf_fsdp import hf_get_init_device
from llmfoundry.models.utils import init_empty_weights
from llmfoundry.utils.config_utils import set_config_overrides
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from m2_plugin.checkpoints.config import holds_m2_bert, is_reference_config, listed, resolve
from m2_plugin.checkpoints.folder import weights_file
from m2_plugin.checkpoints.names import our_name
from m2_plugin.checkpoints.read import Saved, is_checkpoint_file, read_file
from m2_plugin.constants import VOCAB_MULTIPLE
from m2_plugin.data.tokenizer import vocabulary_size
from m2_plugin.files import read_json
from m2_plugin.foundry.fsdp import MetaInitializer, prepare_for_fsdp
from m2_plugin.models.configuration_m2_bert import M2BertConfig, padded_size
from m2_plugin.suggest import did_you_mean

__all__ = [
    "Weights",
    "build_config",
    "build_from_keys",
    "check_vocab_size",
    "is_folder_of_reference",
    "prepare_for_composer",
    "read_source",
]

log = logging.getLogger(__name__)

# Tensors and the config field that each of their dimensions shows. An error names the first field
# that differs.
FIELDS: list[tuple[str, tuple[str | None, ...]]] = [
    (r"word_embeddings\.weight", ("vocab_size", "hidden_size")),
    (r"position_embeddings\.weight", ("max_position_embeddings", "hidden_size")),
    (r"token_type_embeddings\.weight", ("type_vocab_size", "hidden_size")),
    (r"filter\.pos_emb", ("long_conv_l_max", "hyena_emb_dim")),
    (r"filter\.freq", ("hyena_filter_order",)),
    (r"(up|down)_proj\.weight", ("monarch_mlp_nblocks", "intermediate_size", "intermediate_size")),
    (r"intermediate\.dense\.weight|up_proj\.weight", ("intermediate_size", "hidden_size")),
    (r"down_proj\.weight", ("hidden_size", "intermediate_size")),
]

Shape = tuple[int, ...]


class Weights(NamedTuple):
    """The tensors in a checkpoint file, their config, and the tokenizer that was saved with them.

    `of_reference` is true if the tensors have the names of the M2 reference.
    """

    path: str
    tensors: Mapping[str, torch.Tensor]
    config: PretrainedConfig
    tokenizer: Mapping[str, Any] = {}
    of_reference: bool = False


def read_weights(path: str, model_type: str, overrides: Mapping[str, Any]) -> Weights:
    """Read a checkpoint file, or a folder of the reference's, and decide which model it holds.

    Args:
        path: The file or folder.
        model_type: The default model type of the model that the YAML names.
        overrides: Config fields to replace.

    Raises:
        ValueError: If the file cannot be read, holds another model type, or `resolve` refuses it.
    """
    if os.path.isdir(path):
        tensors, _ = read_file(weights_file(path))
        saved = Saved(read_json(Path(path) / "config.json"))
    else:
        tensors, saved = read_file(path)
    if holds_m2_bert(tensors):
        _check_fields(M2BertConfig(), overrides)
        try:
            found = resolve(tensors, saved.config, overrides, where="the config saved in it")
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        if found.unknown:
            raise ValueError(
                f"{path!r} has tensors that an M2-BERT lacks: {listed(found.unknown)}. To leave "
                f"them out, convert it with m2-plugin import --allow-unused."
            )
        if found.assumed:
            values = ", ".join(f"{key} {value}" for key, value in found.assumed.items())
            log.warning("%s: weights and config do not give these, so by default: %s", path, values)
        if found.of_reference and (full := found.config.padded_length) is not None:
            log.warning(
                "%s: the model pads every text to %d tokens itself, as the reference does "
                "(pad_inputs in config_overrides; mask_padding: true needs no padding)",
                path,
                full,
            )
        return Weights(path, found.weights, found.config, saved.tokenizer, found.of_reference)
    saved_type = (saved.config or {}).get("model_type")
    if saved.config is None or saved_type is None:
        raise ValueError(
            f"{path!r} holds no config, and its weights are not those of an M2-BERT: "
            f"{', '.join(list(tensors)[:3])}, ... Give a transformers folder instead."
        )
    if model_type == M2BertConfig.model_type and saved_type in ("bert", model_type):
        other = [name for name in tensors if our_name(name) is None]
        raise ValueError(
            f"{path!r} is no M2-BERT checkpoint (it has {listed(other[:3])}). For a BERT, use the "
            f"models hf_bert_mlm and hf_bert_classification."
        )
    # Keys that begin with _ are state of the process that saved the config.
    content = {key: value for key, value in saved.config.items() if not key.startswith("_")}
    config = type(AutoConfig.for_model(saved_type)).from_dict(content)
    return Weights(path, tensors, _replaced(config, overrides), saved.tokenizer)


def build_config(
    source: str | None, model_type: str, overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """Build the config of a folder or a hub name, or the default config of a model type.

    Raises:
        ValueError: If the config has no field of an override, or the folder does not exist.
    """
    if source is None:
        _check_fields(AutoConfig.for_model(model_type), overrides)
        return AutoConfig.for_model(model_type, **overrides)
    _check_folder(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if is_reference_config(config.to_dict()):
        raise ValueError(
            f"{source!r} is a model of the M2 reference: make a folder of it with m2-plugin import"
        )
    return _replaced(config, overrides)


def _replaced(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config with fields replaced; its constructor checks them against each other."""
    _check_fields(config, overrides)
    if isinstance(config, M2BertConfig):
        return config.with_overrides(overrides)
    set_config_overrides(config, dict(overrides))
    return type(config).from_dict(config.to_dict())


def _check_folder(path: str) -> None:
    if path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise ValueError(f"pretrained_model_name_or_path: there is no folder {path!r}.")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        inside = [f"{path}/latest-rank0.pt", f"{path}/huggingface/final"]
        there = [repr(name) for name in inside if os.path.exists(name)]
        hint = f" Did you mean {' or '.join(there)}?" if there else ""
        raise ValueError(
            f"pretrained_model_name_or_path: {path!r} is not a transformers folder: it has no "
            f"config.json.{hint}"
        )


def is_folder_of_reference(path: str) -> bool:
    """Tell whether a path is a folder with a config of the M2 reference."""
    file = os.path.join(path, "config.json")
    return os.path.isfile(file) and is_reference_config(read_json(file))


def _check_fields(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        if not hasattr(config, key):
            raise ValueError(
                f"config_overrides: {type(config).__name__} has no field {key!r}."
                f"{did_you_mean(key, config.to_dict())}"
            )


def check_vocab_size(vocab_size: int, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Check that a vocabulary has a row for each id of a tokenizer.

    Args:
        vocab_size: The rows of the model's embedding.
        tokenizer: The run's tokenizer.
        key: The key that sets `vocab_size`, for the message.

    Raises:
        ValueError: If an id has no row.
    """
    needed = vocabulary_size(tokenizer)
    if vocab_size < needed:
        raise ValueError(
            f"The model's vocab_size {vocab_size} is smaller than the tokenizer's {needed} entries "
            f"({tokenizer.name_or_path!r}): set {key} to {needed} or more."
        )


def load_pretrained(auto_class: Any, path: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load the weights of a folder or hub name; only the task head may be new.

    Raises:
        ValueError: If weights of the encoder are missing or of another shape. transformers would
            give them random values, with a warning.
    """
    with _quiet_transformers():  # what is new is logged below
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            torch_dtype=torch.float32,  # master weights; the trainer's precision casts
            ignore_mismatched_sizes=True,  # the head may have other labels; checked below
            output_loading_info=True,
            trust_remote_code=False,
        )
    # In some versions of transformers the entries are names, in others tuples of name and shapes.
    names = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *names})
    theirs = shapes_in(path) if names else {}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = [(name, theirs.get(name), ours[name]) for name in names]
    encoder = f"{model.base_model_prefix}."
    check_fit(path, encoder, mismatched, info["missing_keys"], info["unexpected_keys"])
    if new:
        log.warning("Newly initialised (not in %s): %s", path, ", ".join(new))
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_weights(auto_class: Any, weights: Weights, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model with the weights of a file; only the task head may be new.

    Raises:
        ValueError: As in `load_pretrained`.
    """
    model = auto_class.from_config(config)
    tensors = dict(weights.tensors)
    new = fit_state_dict(weights.path, model, tensors)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    if new:
        log.warning("Newly initialised (not in %s): %s", weights.path, ", ".join(new))
    return model


def fit_state_dict(
    path: str, model: Any, tensors: dict[str, torch.Tensor], prefix: str = ""
) -> list[str]:
    """Drop heads of another shape from a state dict, and return the names that will be new.

    Args:
        path: The source of the tensors, for error messages.
        model: The transformers model that will load them.
        tensors: The state dict; changed in place.
        prefix: The prefix of the model's names in the state dict.

    Raises:
        ValueError: If weights of the encoder are missing, unexpected, or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    mismatched = [(n, found[n], own[n]) for n in own if n in found and found[n] != own[n]]
    tied = set(model._tied_weights_keys or ())  # they share the memory of a tensor that is checked
    missing = [name for name in own if name not in found and name not in tied]
    unexpected = [name for name in found if name not in own]
    check_fit(path, f"{model.base_model_prefix}.", mismatched, missing, unexpected)
    for name, _, _ in mismatched:
        del tensors[prefix + name]
    return sorted([*missing, *(name for name, _, _ in mismatched)])


def _check_loading(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check the state dict that Composer loads (`load_path`), before torch loads it.

    A new head needs `load_strict_model_weights: false`. With it, Composer would leave an encoder
    that does not fit at random values, but would fail for a head with other classes.
    """
    sharded = any(hasattr(m, "_fsdp_wrapped_module") for m in module.modules())
    if sharded or not any(name.startswith(prefix) for name in state_dict):
        return  # each rank gets only its shards
    new = fit_state_dict("load_path", module, state_dict, prefix)
    if new:
        log.warning("Newly initialised (not in load_path): %s", ", ".join(new))


def build_inner_model(
    auto_class: Any,
    config: PretrainedConfig,
    source: str | Weights | None,
    pretrained: bool,
    init_device: str,
) -> PreTrainedModel:
    """Build the model on the CPU, or without storage if FSDP will create or send the weights.

    Raises:
        ValueError: If `init_device` is unknown, or is meta for pretrained weights.
    """
    if init_device not in ("cpu", "meta", "mixed"):
        raise ValueError(f"init_device must be cpu, meta or mixed, got {init_device!r}.")
    if pretrained and init_device == "meta":
        raise ValueError("Pretrained weights need init_device cpu or mixed, not meta.")
    if hf_get_init_device(init_device) == "meta":
        rng_state = torch.get_rng_state()
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(config)
        model.tie_weights()  # on the meta device the constructor's tie is lost
        model.param_init_fn = (
            MetaInitializer(model, lambda: auto_class.from_config(config), rng_state)
            if init_device == "meta"
            else lambda module: None  # rank 0 sends the values
        )
        return model
    if pretrained:
        assert source is not None
        if isinstance(source, Weights):
            return load_weights(auto_class, source, config)
        return load_pretrained(auto_class, source, config)
    return auto_class.from_config(config)


def prepare_for_composer(model: Any) -> None:
    """Prepare a finished model for Composer: check the weights that it loads, and its sharding."""
    model.register_load_state_dict_pre_hook(_check_loading)
    prepare_for_fsdp(model)


def build_from_keys(
    auto_class: Any,
    model_type: str | None,
    default_model_type: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | None,
    pretrained: bool | None,
    config_overrides: Mapping[str, Any] | None,
    init_device: str,
    allow_embedding_resizing: bool = False,
) -> PreTrainedModel:
    """Build a transformers model from the keys that all models of this package take in a YAML.

    The vocabulary of a new model is the tokenizer's, unless `config_overrides` gives its size.

    Args:
        auto_class: The Auto class of the model.
        model_type: This and the other keys are those of `BertComposerModel`.
        default_model_type: The model type if neither `model_type` nor `path` is given.
        tokenizer: The run's tokenizer, whose ids must fit the vocabulary; None skips the check.
        path: `pretrained_model_name_or_path`.

    Raises:
        ValueError: As in `BertComposerModel`.
    """
    if pretrained is None:
        pretrained = path is not None
    if pretrained and path is None:
        raise ValueError("pretrained: true needs pretrained_model_name_or_path.")
    source, config = read_source(path, model_type, default_model_type, config_overrides or {})
    if not pretrained:
        if tokenizer is not None and "vocab_size" not in (config_overrides or {}):
            config.vocab_size = vocabulary_size(tokenizer)
        config.vocab_size = padded_size(config.vocab_size, VOCAB_MULTIPLE)
    resized = allow_embedding_resizing and tokenizer is not None
    if tokenizer is not None and not resized:
        check_vocab_size(config.vocab_size, tokenizer, "config_overrides.vocab_size")
    # With init_device mixed only rank 0 loads weights; FSDP sends them to the other ranks.
    load = pretrained and not (init_device == "mixed" and dist.get_global_rank() != 0)
    model = build_inner_model(auto_class, config, source, load, init_device)
    if resized and config.vocab_size < vocabulary_size(tokenizer):
        # Composer would count the tokens, and leave out ids if there are gaps.
        size = padded_size(vocabulary_size(tokenizer), VOCAB_MULTIPLE)
        log.warning("The vocabulary grows from %d to %d.", config.vocab_size, size)
        model.resize_token_embeddings(size)
    return model


def read_source(
    path: str | None,
    model_type: str | None,
    default_model_type: str,
    overrides: Mapping[str, Any],
) -> tuple[str | Weights | None, PretrainedConfig]:
    """Read what a model starts from: the weights of a file, and the config with its overrides.

    Args:
        path: `pretrained_model_name_or_path`; the other arguments are as in `build_from_keys`.

    Returns:
        The content of a file, or the name of a folder as it is; and the config.

    Raises:
        ValueError: If it cannot be read, or an override contradicts it.
    """
    if path is not None and model_type is not None:
        raise ValueError("Give pretrained_model_name_or_path or model_type, not both.")
    if path is not None and (is_checkpoint_file(path) or is_folder_of_reference(path)):
        weights = read_weights(path, default_model_type, overrides)
        return weights, weights.config
    return path, build_config(path, model_type or default_model_type, overrides)


def shapes_in(path: str) -> dict[str, Shape]:
    """Read the shapes of the tensors in a folder or hub name, or none if it has several files."""
    file = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def check_fit(
    path: str,
    prefix: str,
    mismatched: Iterable[tuple[str, Shape | None, Shape | None]],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Refuse weights that would leave the encoder, or a part of it, at random values.

    Args:
        path: The source of the weights, for error messages.
        prefix: The prefix of the encoder's names. Other names belong to a head, which may be new.
            The pooler may be new too: a masked language model has none.
        mismatched: Name, shape in the checkpoint and shape in the model.
        missing: Names in the model that the checkpoint lacks.
        unexpected: Names in the checkpoint that the model lacks.

    Raises:
        ValueError: If the weights do not fit. The message names a tensor and, if its shape differs,
            both shapes and the field to change.
    """

    def encoder(names: Iterable[str]) -> list[str]:
        left_out = (".pooler.", ".position_ids", ".token_type_ids")
        return [n for n in names if n.startswith(prefix) and not any(p in n for p in left_out)]

    wrong = [entry for entry in mismatched if encoder([entry[0]])]
    if wrong:
        raise ValueError(f"{path!r} does not fit the model: {_explain(wrong)}")
    for names, what in (
        (missing, "lacks weights of the encoder"),
        (unexpected, "has weights of an encoder that the model lacks"),
    ):
        names = encoder(names)
        if names:
            layers = ".layer" in names[0]
            field = "num_hidden_layers" if layers else "the other fields of the model"
            raise ValueError(
                f"{path!r} {what}: {listed(names)}. Check the model's name, and {field} in "
                f"config_overrides."
            )


def _explain(wrong: list[tuple[str, Shape | None, Shape | None]]) -> str:
    for pattern, fields in FIELDS:
        for name, theirs, ours in wrong:
            if not re.search(pattern, name) or theirs is None or ours is None:
                continue
            if not len(theirs) == len(ours) == len(fields):
                continue
            for a, b, field in zip(theirs, ours, fields, strict=True):
                if a != b:
                    # Blocks of a Monarch matrix do not show the whole size.
                    value = "" if len(fields) == 3 else f" of {a}"
                    return (
                        f"{name} has the shape {theirs} in the checkpoint and {ours} in the model. "
                        f"The checkpoint has another {field}{value}: change or remove {field} in "
                        f"config_overrides."
                    )
    name, theirs, ours = wrong[0]
    if theirs is None:
        return f"{name} does not have the model's shape, {ours}. Check config_overrides."
    return (
        f"{name} has the shape {theirs} in the checkpoint and {ours} in the model. Check "
        f"config_overrides."
    )
