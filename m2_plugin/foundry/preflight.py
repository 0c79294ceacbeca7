"""Check the settings of a training run against each other before anything is built.

llm-foundry applies the config transform `preflight` to every training config. It ends a run whose
tokenizer, vocabulary, lengths and data do not fit each other, and fills in what follows from them.
Configs without a model, loader or layer of this package only get a precision that their machine
has. All ranks compute the same, without communication.
"""

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from llmfoundry import registry
from llmfoundry.utils.builders import build_tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from m2_plugin.checkpoints.read import is_checkpoint_file
from m2_plugin.checkpoints.tokenizer import holds_tokenizer, load_data_tokenizer
from m2_plugin.constants import VOCAB_MULTIPLE
from m2_plugin.data.formats import DataError
from m2_plugin.data.tokenizer import (
    HubError,
    load_tokenizer,
    vocabularies_fit,
    vocabulary_digest,
    vocabulary_size,
)
from m2_plugin.foundry.errors import ConfigError, one_line
from m2_plugin.foundry.starting_points import (
    Weights,
    build_config,
    check_vocab_size,
    is_folder_of_reference,
    read_source,
)
from m2_plugin.foundry.token_streams import TokenStream, local_streams, read_token_stream
from m2_plugin.models.configuration_m2_bert import M2BertConfig, padded_size
from m2_plugin.recipes import ROOT

__all__ = ["RunTokenizer", "preflight"]

log = logging.getLogger(__name__)

# Our models: their default model type, and whether they are for pretraining.
MODELS = {
    "m2_bert_mlm": ("m2_bert", True),
    "hf_bert_mlm": ("bert", True),
    "m2_bert_classification": ("m2_bert", False),
    "hf_bert_classification": ("bert", False),
    "m2_bert_token_classification": ("m2_bert", False),
    "hf_bert_token_classification": ("bert", False),
    "m2_bert_question_answering": ("m2_bert", False),
    "hf_bert_question_answering": ("bert", False),
    "m2_bert_contrastive": ("m2_bert", False),
}
LOADERS = ("mlm_text", "glue", "text_classification", "token_classification", "question_answering")
MDS_LOADERS = ("mlm_text", "text")  # their streams may be tokens
MPT_LAYERS = ("monarch", "block_diagonal")  # beginnings of the names of our layers for MPT
TOKENIZER = "m2_plugin"  # the name of RunTokenizer in llm-foundry's registry
INFONCE = "infonce"  # the default loss of m2_bert_contrastive
# The vocabulary of bert-base-uncased, with which all models of the M2 reference were trained.
BERT_TOKENIZER = str(ROOT / "data_prep" / "quickstart" / "tokenizer")
BERT_VOCAB_SIZES = (30522, 30528)
MUCH = 1.1  # a vocabulary so many times larger than the tokenizer's is hardly meant
NO_LIMIT = int(1e30)  # llm-foundry's model_max_length if none is given


def preflight(config: dict[str, Any]) -> dict[str, Any]:
    """Check a training config, and complete it; llm-foundry's registry calls it.

    Args:
        config: llm-foundry's training config, resolved; it is changed in place.

    Returns:
        The config.

    Raises:
        ConfigError: If its values do not fit each other, or a file that they name.
    """
    _fit_device(config)
    if _is_ours(config):
        with one_line(ConfigError):
            _check(config)
    return config


# --- the machine ---------------------------------------------------------------------------------


def _fit_device(config: dict[str, Any]) -> None:
    """Without a GPU Composer has only fp32, and no search for a microbatch size."""
    if torch.cuda.is_available():
        return
    precision = config.get("precision", "amp_bf16")
    if precision != "fp32":
        config["precision"] = "fp32"
        _warn("There is no GPU: training in fp32 instead of %s.", precision)
    size = config.get("global_train_batch_size")
    if config.get("device_train_microbatch_size") == "auto" and isinstance(size, int):
        config["device_train_microbatch_size"] = max(1, size // dist.get_world_size())
        _warn(
            "There is no GPU: device_train_microbatch_size is %d instead of auto.",
            config["device_train_microbatch_size"],
        )


def _warn(message: str, *values: Any) -> None:
    if dist.get_global_rank() == 0:
        log.warning(message, *values)


# --- the whole config ----------------------------------------------------------------------------


def _is_ours(config: Mapping[str, Any]) -> bool:
    model = _section(config, "model")
    layers = [
        _section(model, "attn_config").get("attn_type"),
        _section(model, "ffn_config").get("ffn_type"),
        _section(model, "fc_type").get("name", model.get("fc_type")),
    ]
    return (
        model.get("name") in MODELS
        or any(str(layer).startswith(MPT_LAYERS) for layer in layers)
        or any(loader.get("name") in LOADERS for _, loader in _loaders(config))
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _loaders(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the loaders with their keys, first that of training."""
    for key in ("train_loader", "eval_loader", "eval_loaders"):
        value = config.get(key)
        for loader in value if isinstance(value, list) else [value]:
            if isinstance(loader, Mapping):
                label = loader.get("label")
                yield (f"{key}[{label}]" if isinstance(value, list) else key), loader


def _key(config: Mapping[str, Any], variable: str, key: str) -> str:
    """Name a key as the user sets it: our YAMLs have variables."""
    return f"variables.{variable}" if variable in _section(config, "variables") else key


class _Start(NamedTuple):
    """What a model of ours starts from.

    Attributes:
        name: A folder, hub name or file; None for new weights.
        key: The key that sets it.
        source: The content of a file, or the name.
        config: The model's config.
        own: The config of the start itself, without overrides.
    """

    name: str | None
    key: str
    source: str | Weights | None
    config: PretrainedConfig
    own: PretrainedConfig


def _check(config: dict[str, Any]) -> None:
    model = _section(config, "model")
    start = _start(config, model) if model.get("name") in MODELS else None
    tokenizer = _check_tokenizer(config, start)
    _check_vocabulary(config, start, tokenizer)
    if start is not None:
        _check_lengths(config, start)
    _check_negatives(config, model)
    for key, loader in _loaders(config):
        if loader.get("name") in MDS_LOADERS:
            _check_data(config, key, _section(loader, "dataset"), tokenizer)


def _start(config: Mapping[str, Any], model: Mapping[str, Any]) -> _Start:
    default_type, is_pretraining = MODELS[model["name"]]
    key = _key(config, "start", "model.pretrained_model_name_or_path")
    path, load_path = model.get("pretrained_model_name_or_path"), config.get("load_path")
    pretrained = model.get("pretrained")
    if not is_pretraining and path is None and load_path is None and pretrained is not False:
        raise ValueError(
            f"{key} is missing: give the model to fine-tune, a folder or a .pt file. To train from "
            f"random weights, set model.pretrained=false."
        )
    overrides = _section(model, "config_overrides")
    try:
        source, own = read_source(path, model.get("model_type"), default_type, overrides)
        full = own
        if isinstance(source, str):
            own = build_config(source, default_type, {})
    except OSError as error:  # of the hub
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{key} {path!r} is no folder or file, and: {reason}") from error
    name = load_path if path is None else path if pretrained is not False else None
    return _Start(name, key if path is not None else "load_path", source, full, own)


def _check_negatives(config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse microbatches that take negatives from a loss over the whole batch of a device."""
    size, whole = model.get("mini_batch_size"), config.get("global_train_batch_size")
    if size is None or model.get("loss", INFONCE) != INFONCE or not isinstance(whole, int):
        return
    whole //= dist.get_world_size()
    found = config.get("device_train_microbatch_size", "auto")
    if found == "auto" or found < whole:
        raise ValueError(
            f"model.mini_batch_size is {size}, for a loss over all {whole} queries of a device, "
            f"but with device_train_microbatch_size {found} a query has only the passages of its "
            f"microbatch as negatives: set device_train_microbatch_size={whole}; memory does not "
            f"grow with it"
        )


# --- the tokenizer -------------------------------------------------------------------------------


class RunTokenizer(PreTrainedTokenizerBase):
    """The tokenizer of a folder, a hub name or a checkpoint file; `m2_plugin` in a YAML.

    The object is of the tokenizer's own class. llm-foundry requires an end token, and its loaders a
    begin token: a tokenizer without them gets its [SEP] and [CLS].

    Args:
        source: The folder, name or file.
        model_max_length: The longest text in tokens.
        kwargs: More arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: If there is no tokenizer, or a begin or end token is not in its vocabulary.
    """

    def __new__(
        cls, source: str, model_max_length: int = NO_LIMIT, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        """Load it."""
        ends = {key: kwargs.pop(key, None) for key in ("bos_token", "eos_token")}
        tokenizer = _load(source, kwargs)
        tokenizer.model_max_length = model_max_length
        own = {"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token}
        for key, given in ends.items():
            token = given or getattr(tokenizer, key) or own[key]
            if token is None and key == "eos_token":
                raise ValueError(
                    f"the tokenizer {source!r} has no eos_token and no sep_token: set "
                    f"tokenizer.kwargs.eos_token to a token of it"
                )
            if token is not None and str(token) not in tokenizer.get_vocab():
                raise ValueError(
                    f"tokenizer.kwargs.{key} {str(token)!r} is not in the vocabulary of {source!r} "
                    f"and would be added to it: leave it out, or give a token of it"
                )
            if token is not None:
                setattr(tokenizer, key, token)
        return tokenizer


def _load(source: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is."""
    if is_checkpoint_file(source):
        files, is_bert = _in_file(source)
        if holds_tokenizer(files):
            return load_data_tokenizer(source, files, **kwargs)
        if not is_bert:
            raise DataError(f"{source!r} holds no tokenizer")
        return load_tokenizer(BERT_TOKENIZER, **kwargs)
    try:
        return load_tokenizer(source, **kwargs)
    except DataError:
        if is_folder_of_reference(source):
            return load_tokenizer(BERT_TOKENIZER, **kwargs)
        raise


@functools.lru_cache(maxsize=4)
def _in_file(path: str) -> tuple[Mapping[str, Any], bool]:
    """Read the tokenizer's files in a checkpoint, and whether it has the reference's vocabulary."""
    source, config = read_source(path, None, M2BertConfig.model_type, {})
    assert isinstance(source, Weights)
    return source.tokenizer, source.of_reference and config.vocab_size in BERT_VOCAB_SIZES


def _check_tokenizer(config: dict[str, Any], start: _Start | None) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, and let llm-foundry load the same one."""
    section = _section(config, "tokenizer")
    key = _key(config, "tokenizer", "tokenizer.name")
    name, kwargs = section.get("name"), dict(section.get("kwargs") or {})
    if name is None and start is not None:
        name = start.name
    if name is None:
        raise ValueError(f"{key} is missing: give a folder, such as data_prep/quickstart/tokenizer")
    if name in registry.tokenizers:
        return build_tokenizer(name, kwargs)
    kwargs["source"] = name
    config["tokenizer"] = {**section, "name": TOKENIZER, "kwargs": kwargs}
    try:
        tokenizer = RunTokenizer(**kwargs)
        if tokenizer.name_or_path == BERT_TOKENIZER != name:
            _warn(
                "%s holds no tokenizer: using the vocabulary of bert-base-uncased, with which the "
                "models of the M2 release were trained.",
                name,
            )
        return tokenizer
    except HubError as error:
        raise ValueError(f"{error}. Set {key}=FOLDER, a folder with a tokenizer") from error
    except DataError as error:
        raise ValueError(f"{error}. Set {key}=FOLDER, the tokenizer of the model") from error


def _check_vocabulary(
    config: dict[str, Any], start: _Start | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare the tokenizer with the start's and with the size of the vocabulary."""
    model = _section(config, "model")
    key, vocab_size = "model.vocab_size", model.get("vocab_size")
    if start is not None:
        key = "model.config_overrides.vocab_size"
        vocab_size = _section(model, "config_overrides").get("vocab_size")
        if start.name is not None:
            _compare_with_start(config, start, tokenizer)
        if vocab_size is None and start.name is not None and start.source is not None:
            vocab_size = start.config.vocab_size  # otherwise the model takes the tokenizer's
    elif vocab_size is None and "vocab_size" not in model and model.get("name") == "mpt_causal_lm":
        config["model"]["vocab_size"] = padded_size(vocabulary_size(tokenizer), VOCAB_MULTIPLE)
    if vocab_size is None:
        return
    if not model.get("allow_embedding_resizing"):
        check_vocab_size(vocab_size, tokenizer, key)
    needed = padded_size(vocabulary_size(tokenizer), VOCAB_MULTIPLE)
    if vocab_size > MUCH * needed:
        _warn(
            "%s is %d, but the tokenizer %r needs only %d: is one of the two another than meant?",
            *(key, vocab_size, tokenizer.name_or_path, needed),
        )


def _compare_with_start(
    config: Mapping[str, Any], start: _Start, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer that gives a token another id than the start's tokenizer."""
    assert start.name is not None
    source = _section(_section(config, "tokenizer"), "kwargs").get("source")
    if source == start.name:
        return
    try:
        theirs = _load(start.name, {})
    except ValueError:  # the start has none
        return
    if not vocabularies_fit(tokenizer, theirs):
        key = _key(config, "tokenizer", "tokenizer.name")
        raise ValueError(
            f"{key}: the tokenizer {source or tokenizer.name_or_path!r} has another vocabulary "
            f"({len(tokenizer)} tokens) than {start.key} {start.name!r} ({len(theirs)} tokens): "
            f"set {key}={start.name}"
        )


# --- lengths -------------------------------------------------------------------------------------


def _check_lengths(config: Mapping[str, Any], start: _Start) -> None:
    """Compare the model's longest text with that of each loader."""
    is_pretraining = MODELS[config["model"]["name"]][1]
    limits = _limits(start.config if start.name is None else start.own)
    for key, loader in _loaders(config):
        length = _section(loader, "dataset").get("max_seq_len")
        if not isinstance(length, int) or not limits:
            continue
        field, limit = min(limits.items(), key=lambda entry: entry[1])
        at = f"{key}.dataset.max_seq_len is {length}"
        set_to = f"{_key(config, 'max_seq_len', f'{key}.dataset.max_seq_len')}={limit}"
        if start.name is None:
            field, limit = next((e for e in limits.items() if e[1] != length), (field, length))
            exact = isinstance(start.config, M2BertConfig) and key == "train_loader"
            if limit < length or (exact and limit != length):
                raise ValueError(
                    f"model.config_overrides.{field} of the new model is {limit}, but {at}: give "
                    f"both the same length"
                )
        elif limit < length:
            raise ValueError(
                f"{start.key} {start.name!r} takes texts of {limit} tokens ({field}), but {at}: "
                f"set {set_to}, or make the model longer with m2-plugin extend"
            )
        elif limit > length and is_pretraining and key == "train_loader":
            _warn(
                "%s %r takes texts of %d tokens (%s), but %s: the positions after that are not "
                "trained.",
                *(start.key, start.name, limit, field, at),
            )


def _limits(config: PretrainedConfig) -> dict[str, int]:
    """Return the fields that limit the length of a text."""
    if not isinstance(config, M2BertConfig):
        longest = getattr(config, "max_position_embeddings", None)
        return {} if longest is None else {"max_position_embeddings": longest}
    limits = {}
    if config.use_positional_encodings:
        limits["max_position_embeddings"] = config.max_position_embeddings
    if config.sequence_mixer == "monarch_mixer":
        limits["long_conv_l_max"] = config.long_conv_l_max
    return limits


def _check_data(
    config: Mapping[str, Any],
    key: str,
    dataset: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Compare token streams with the loader's length and with the tokenizer."""
    length = dataset.get("max_seq_len")
    folders, are_all = local_streams(dataset)
    streams: list[TokenStream | None] = []
    for local, split, _ in folders:
        try:
            streams.append(
                read_token_stream(
                    os.path.join(local, split), dataset.get("token_encoding_type") or "int64"
                )
            )
        except ValueError:  # the loader says what is wrong
            return
    tokens = [stream for stream in streams if stream is not None]
    for stream in tokens:
        if stream.vocabulary not in (None, vocabulary_digest(tokenizer)):
            raise ValueError(
                f"{_key(config, 'tokenizer', 'tokenizer.name')}: the tokens in {stream.folder!r} "
                f"were written with the tokenizer {stream.tokenizer!r}, whose vocabulary is "
                f"another than that of {tokenizer.name_or_path!r}"
            )
        if isinstance(length, int) and stream.longest is not None and stream.longest > length:
            raise ValueError(
                f"{key}.dataset.max_seq_len is {length}, but the samples in {stream.folder!r} have "
                f"{stream.longest} tokens, of which the rest would be cut off: set "
                f"{_key(config, 'max_seq_len', f'{key}.dataset.max_seq_len')}={stream.longest}, or "
                f"convert the data again with --concat_tokens {length}"
            )
    if key != "train_loader" or not tokens or not are_all or len(tokens) < len(streams):
        return
    lengths = [stream.length for stream in tokens]
    if isinstance(length, int) and all(known is not None and known < length for known in lengths):
        longest = max(known for known in lengths if known is not None)
        raise ValueError(
            f"{key}.dataset.max_seq_len is {length}, but the samples in {tokens[0].folder!r} have "
            f"only {longest} tokens, so that the positions after them would never be trained: set "
            f"{_key(config, 'max_seq_len', f'{key}.dataset.max_seq_len')}={longest}, or convert "
            f"the data again with --concat_tokens {length}"
        )
