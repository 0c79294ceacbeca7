"""Configuration of M2-BERT."""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PretrainedConfig

from m2_plugin.constants import POOLINGS, VOCAB_MULTIPLE
from m2_plugin.ops.backend import BACKENDS
from m2_plugin.suggest import did_you_mean

log = logging.getLogger(__name__)

SEQUENCE_MIXERS = ("monarch_mixer", "alibi_attention")
# Keys beside its fields that transformers writes to a config.json or passes to a config.
TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "bos_token_id",  # the Trainer writes a tokenizer's; transformers 5 has no such fields
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",  # of transformers 4
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "trust_remote_code",
}

# Fields of the M2 reference's config that no other has. Its weights have other names.
REFERENCE_KEYS = {
    "alibi_starting_size",
    "hyena_lr_pos_emb",
    "hyena_wd",
    "long_conv_kernel_learning_rate",
    "monarch_mixer_sequence_mixing",
    "use_flash_mm",
}


class M2BertConfig(PretrainedConfig):
    """Configuration of an M2-BERT encoder (arXiv 2310.12109).

    The defaults are those of the published M2-BERT-base (80M). Fields have transformers' names, or
    the M2 reference's names if transformers has none.

    Args:
        vocab_size: Number of token ids; rounded up to a multiple of `pad_vocab_size_multiple`.
        hidden_size: D, the width of the model.
        num_hidden_layers: Number of layers.
        intermediate_size: F, the width of the MLP's activation.
        hidden_dropout_prob: Dropout after the embeddings and inside the MLP.
        max_position_embeddings: Number of learned positions.
        type_vocab_size: Number of token types.
        initializer_range: Standard deviation of initial linear and embedding weights.
        layer_norm_eps: Epsilon of the LayerNorms, except the one in the mixer (torch's 1e-5).
        pad_token_id: Id of the padding token; its embedding starts at zero and has no gradient.
        tie_word_embeddings: Whether the decoder shares its weight with the word embeddings.
        pad_vocab_size_multiple: See `vocab_size`.
        use_positional_encodings: Whether to add learned positions to the embeddings.
        sequence_mixer: `monarch_mixer`, or `alibi_attention` for the reference's baseline.
        long_conv_l_max: The longest sequence, in tokens, that the long convolutions can mix.
        bidirectional: Whether the long convolutions see later positions.
        residual_long_conv: Whether the mixer has a residual path, a second long convolution.
        hyena_training_additions: Whether a LayerNorm precedes the mixer.
        mixer_dropout_prob: Dropout inside the mixer.
        hyena_filter_order: Width of the filters' MLPs.
        hyena_emb_dim: Number of positional features of the filters; odd, at least 3.
        hyena_w: Initial frequency of the filters' sines.
        hyena_w_mod: Constant factor on that frequency.
        hyena_extended_from: Earlier values of `long_conv_l_max`, ascending, if the model was
            extended (`m2-plugin extend`), else None. Old taps keep their decay.
        mask_padding: Whether to keep padding out of the long convolutions, so that outputs do not
            depend on the amount of padding. The released checkpoints were trained without it.
        pad_inputs: Whether the model pads every input to `max_sequence_length` itself, and cuts the
            output back. The released checkpoints were trained on texts padded like this. It has no
            effect if padding changes nothing: with `mask_padding` or `alibi_attention`.
        use_glu_mlp: Whether the MLP's activation is gated.
        use_monarch_mlp: Whether the MLP's matrices are block-diagonal.
        monarch_mlp_nblocks: Number of their blocks. Sizes that do not fill whole blocks are padded.
        num_attention_heads: Heads of `alibi_attention`; must divide `hidden_size` there.
        attention_probs_dropout_prob: Dropout of attention weights in `alibi_attention`.
        classifier_pooling: The input of the pooler's dense layer, for classifiers and embeddings:
            `cls`, the first token, or `mean`, the mean of the tokens that are not padding (the
            reference's `pool_all`).
        classifier_dropout: Dropout before the classifier; None means `hidden_dropout_prob`.
        normalize_embeddings: Whether to scale text embeddings to length 1 (the reference's
            `use_normalized_embeddings`).
        embedding_pooler: Whether text embeddings pass through the pooler's dense layer and tanh.
            False: they are the first token, or the mean (the reference's `use_cls_token`).
        backend: How to compute the Monarch layers. `auto`: Triton kernels on CUDA, plain PyTorch
            elsewhere and if a kernel cannot be built. `torch`: plain PyTorch. `triton`: kernels, or
            an error.
        **kwargs: More fields of `transformers.PretrainedConfig`, such as `num_labels`.

    Raises:
        ValueError: If a key is unknown or a value is out of range; the message names the key, and
            for a value also the value.
    """

    model_type = "m2_bert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        hidden_dropout_prob: float = 0.1,
        max_position_embeddings: int = 128,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        pad_vocab_size_multiple: int = VOCAB_MULTIPLE,
        use_positional_encodings: bool = True,
        sequence_mixer: str = "monarch_mixer",
        long_conv_l_max: int = 128,
        bidirectional: bool = True,
        residual_long_conv: bool = True,
        hyena_training_additions: bool = False,
        mixer_dropout_prob: float = 0.0,
        hyena_filter_order: int = 128,
        hyena_emb_dim: int = 5,
        hyena_w: float = 10.0,
        hyena_w_mod: float = 1.0,
        hyena_extended_from: list[int] | None = None,
        mask_padding: bool = False,
        pad_inputs: bool = False,
        use_glu_mlp: bool = True,
        use_monarch_mlp: bool = True,
        monarch_mlp_nblocks: int = 4,
        num_attention_heads: int = 12,
        attention_probs_dropout_prob: float = 0.0,
        classifier_pooling: str = "cls",
        classifier_dropout: float | None = None,
        normalize_embeddings: bool = False,
        embedding_pooler: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ):
        _reject_unknown_keys(kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        self.use_positional_encodings = use_positional_encodings
        self.sequence_mixer = sequence_mixer
        self.long_conv_l_max = long_conv_l_max
        self.bidirectional = bidirectional
        self.residual_long_conv = residual_long_conv
        self.hyena_training_additions = hyena_training_additions
        self.mixer_dropout_prob = mixer_dropout_prob
        self.hyena_filter_order = hyena_filter_order
        self.hyena_emb_dim = hyena_emb_dim
        self.hyena_w = hyena_w
        self.hyena_w_mod = hyena_w_mod
        self.hyena_extended_from = hyena_extended_from
        self.mask_padding = mask_padding
        self.pad_inputs = pad_inputs
        self.use_glu_mlp = use_glu_mlp
        self.use_monarch_mlp = use_monarch_mlp
        self.monarch_mlp_nblocks = monarch_mlp_nblocks
        self.num_attention_heads = num_attention_heads
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_pooling = classifier_pooling
        self.classifier_dropout = classifier_dropout
        self.normalize_embeddings = normalize_embeddings
        self.embedding_pooler = embedding_pooler
        self.backend = backend
        # Newer transformers versions set it only in configs whose base class declares it.
        self.pad_token_id = pad_token_id
        # Before transformers' own checks: in newer versions their messages for types are unclear.
        check_values({**vars(self), "tie_word_embeddings": tie_word_embeddings})
        self.vocab_size = padded_size(vocab_size, pad_vocab_size_multiple)
        super().__init__(
            pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
        )
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from a saved one; `from_pretrained` calls this.

        Other tools add keys to a config.json, and `resize_token_embeddings` sets any vocabulary
        size. Therefore, unlike the constructor, this method keeps unknown keys with one warning,
        and does not round `vocab_size` up.

        Args:
            config_dict: The content of a config.json.
            **kwargs: Fields to replace, and `return_unused_kwargs`, as in transformers.

        Raises:
            ValueError: If a value is out of range, or if the config is the M2 reference's:
                transformers would not find the weights, which have other names.
        """
        if theirs := sorted(REFERENCE_KEYS & config_dict.keys()):
            raise ValueError(
                f"this config is the M2 reference's (it has {theirs[0]}): make a folder that "
                f"transformers can load with `m2-plugin import`"
            )
        unknown = unknown_keys(config_dict)
        if unknown:
            _warn_of(tuple(unknown))
        kept = {key: kwargs.pop(key, config_dict[key]) for key in unknown}
        if "vocab_size" in config_dict:
            kept["vocab_size"] = kwargs.pop("vocab_size", config_dict["vocab_size"])
        fields = {key: value for key, value in config_dict.items() if key not in unknown}
        result = super().from_dict(fields, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for key, value in kept.items():
            setattr(config, key, value)
        config._check()
        return result

    def with_overrides(self, overrides: Mapping[str, Any]) -> "M2BertConfig":
        """Copy the config with some fields replaced; a new `vocab_size` is rounded up.

        Raises:
            ValueError: If a value is out of range.
        """
        config = copy.deepcopy(self)
        config.update(dict(overrides))
        config = M2BertConfig.from_dict(config.to_dict())
        if "vocab_size" in overrides:
            config.vocab_size = padded_size(config.vocab_size, config.pad_vocab_size_multiple)
        return config

    def _check(self) -> None:
        """Raise a ValueError for the first field that is out of range or does not fit another."""
        for name in ("hidden_dropout_prob", "mixer_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "at least 0 and below 1")
        _require(
            self.hyena_emb_dim >= 3 and self.hyena_emb_dim % 2 == 1,
            "hyena_emb_dim",
            self.hyena_emb_dim,
            "odd and at least 3: time, and a cosine and a sine for each frequency",
        )
        lengths = [*(self.hyena_extended_from or []), self.long_conv_l_max]
        _require(
            lengths[0] > 1 and all(a < b for a, b in pairwise(lengths)) or len(lengths) == 1,
            "hyena_extended_from",
            self.hyena_extended_from,
            f"ascending lengths from 2 to below long_conv_l_max = {self.long_conv_l_max}",
        )
        _require(
            self.sequence_mixer in SEQUENCE_MIXERS,
            "sequence_mixer",
            self.sequence_mixer,
            f"one of {', '.join(SEQUENCE_MIXERS)}",
        )
        _require(
            self.classifier_pooling in POOLINGS,
            "classifier_pooling",
            self.classifier_pooling,
            f"one of {', '.join(POOLINGS)}",
        )
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        _require(
            0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            self.pad_token_id,
            f"a token id below vocab_size = {self.vocab_size}",
        )
        smallest = min(self.hidden_size, self.intermediate_size)
        _require(
            not self.use_monarch_mlp or self.monarch_mlp_nblocks <= smallest,
            "monarch_mlp_nblocks",
            self.monarch_mlp_nblocks,
            f"at most min(hidden_size, intermediate_size) = {smallest}",
        )
        _require(
            self.sequence_mixer != "alibi_attention"
            or self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a divisor of hidden_size = {self.hidden_size}",
        )

    @property
    def max_sequence_length(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None if there is no limit."""
        limits = []
        if self.use_positional_encodings:
            limits.append(self.max_position_embeddings)
        if self.sequence_mixer == "monarch_mixer":
            limits.append(self.long_conv_l_max)
        return min(limits, default=None)

    @property
    def padded_length(self) -> int | None:
        """The length to which the model pads every input itself, or None if it pads none."""
        sees_padding = self.sequence_mixer == "monarch_mixer" and not self.mask_padding
        return self.max_sequence_length if self.pad_inputs and sees_padding else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _are_integers(value: Any) -> bool:
    return isinstance(value, Sequence) and all(map(_is_integer, value))


# Annotation of a field → check of its values, and their description in an error.
KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: _is_integer(value) and value > 0, "a positive integer"),
    float: (_is_number, "a number"),
    float | None: (lambda value: value is None or _is_number(value), "a number or null"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    list[int] | None: (lambda value: value is None or _are_integers(value), "integers, or null"),
}


def check_values(fields: Mapping[str, Any]) -> None:
    """Check the type and sign of each value, without regard to other fields.

    Args:
        fields: Fields of `M2BertConfig`; other keys are ignored.

    Raises:
        ValueError: If a value has the wrong type, or a size is not positive.
    """
    for name, parameter in inspect.signature(M2BertConfig.__init__).parameters.items():
        if name not in fields or parameter.annotation not in KINDS:
            continue
        holds, accepted = KINDS[parameter.annotation]
        if name == "pad_token_id":  # the one integer that may be 0
            holds, accepted = _is_integer, "an integer"
        _require(holds(fields[name]), name, fields[name], accepted)


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"M2BertConfig: {name} must be {accepted}, not {value!r}")


def padded_size(size: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-size // multiple) * multiple


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """Find the keys that are not fields of M2BertConfig and that transformers does not write."""
    known = _known_keys()
    return [key for key in keys if key not in known and not key.startswith("_")]


def _known_keys() -> set[str]:
    own = set(inspect.signature(M2BertConfig.__init__).parameters) - {"self", "kwargs"}
    base = set(inspect.signature(PretrainedConfig.__init__).parameters) - {"self", "kwargs"}
    return own | base | set(PretrainedConfig().to_dict()) | TRANSFORMERS_KEYS


def _reject_unknown_keys(kwargs: Mapping[str, Any]) -> None:
    for key in unknown_keys(kwargs):
        proposal = did_you_mean(key, sorted(_known_keys()))
        raise ValueError(f"M2BertConfig has no key {key!r}.{proposal}")


@lru_cache  # warns once, although transformers reads a config several times to load a model
def _warn_of(keys: tuple[str, ...]) -> None:
    log.warning("M2-BERT ignores these keys of a saved config: %s", ", ".join(keys))
