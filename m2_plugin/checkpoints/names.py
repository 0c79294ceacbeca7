"""Names of tensors: those of the M2 reference (HazyResearch/m2, `bert/`) and ours, in one table."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m2_plugin.layers.long_conv import DECAY_TARGET, FASTEST_DECAY, SLOWEST_DECAY

_LAYER = r"bert\.encoder\.layer\.(\d+)\."

# Pattern of the reference's names → our name. The first pattern that matches a whole name counts.
RENAMES: dict[str, str] = {
    r"bert\.embeddings\.LayerNorm\.(\w+)": r"model.embeddings.norm.\1",
    r"bert\.embeddings\.(\w+)\.weight": r"model.embeddings.\1.weight",
    _LAYER + r"attention\.in_linear\.(\w+)": r"model.layers.\1.mixer.in_proj.\2",
    _LAYER + r"attention\.short_filter\.(\w+)": r"model.layers.\1.mixer.short_conv.\2",
    _LAYER + r"attention\.out_linear\.(\w+)": r"model.layers.\1.mixer.out_proj.\2",
    _LAYER + r"attention\.layernorm\.(\w+)": r"model.layers.\1.mixer.norm.\2",
    _LAYER + r"mlp\.gated_layers\.(\w+)": r"model.layers.\1.mlp.up_proj.\2",
    _LAYER + r"mlp\.wo\.(\w+)": r"model.layers.\1.mlp.down_proj.\2",
    _LAYER + r"mlp\.layernorm\.(\w+)": r"model.layers.\1.mlp.norm.\2",
    _LAYER + r"attention\.self\.Wqkv\.(\w+)": r"model.layers.\1.mixer.qkv_proj.\2",
    _LAYER + r"attention\.output\.dense\.(\w+)": r"model.layers.\1.mixer.out_proj.\2",
    _LAYER + r"attention\.output\.LayerNorm\.(\w+)": r"model.layers.\1.mixer.norm.\2",
    r"cls\.predictions\.transform\.dense\.(\w+)": r"head.dense.\1",
    r"cls\.predictions\.transform\.LayerNorm\.(\w+)": r"head.norm.\1",
    r"cls\.predictions\.decoder\.(\w+)": r"decoder.\1",
    r"bert\.pooler\.dense\.(\w+)": r"pooler.dense.\1",
    r"classifier\.(\w+)": r"classifier.\1",
}
CONVOLUTIONS = {"long_conv": "filter_fn", "residual_conv": "filter_fn2"}  # ours: theirs
for _ours, _theirs in CONVOLUTIONS.items():
    _from, _to = _LAYER + rf"attention\.{_theirs}\.", rf"model.layers.\1.mixer.{_ours}."
    RENAMES[_from + "bias"] = _to + "skip"
    RENAMES[_from + r"pos_emb\.z"] = _to + "filter.pos_emb"
    # The reference has one sine module at all odd places of both directions' MLPs. Place 1 of the
    # forward MLP is our parameter; the others are derived.
    RENAMES[_from + r"implicit_filter\.1\.freq"] = _to + "filter.freq"
    for _theirs, _ours in (("implicit_filter", "fwd"), ("implicit_filter_rev", "rev")):
        for _i in range(3):
            _layer = rf"{_theirs}\.{2 * _i}\.(\w+)"
            RENAMES[_from + _layer] = _to + rf"filter.{_ours}.layers.{_i}.\2"
        RENAMES[_from + rf"{_theirs}\.6\.weight"] = _to + f"filter.{_ours}.out.weight"

# End of our name → the dimension of size 1 that only the reference's tensor has.
EXTRA_DIM = {"filter.pos_emb": 0, "filter.freq": 0, "short_conv.weight": 1}

# End of our name → allowed numbers of dimensions, for tensors that show a model's sizes.
RANKS: dict[str, tuple[int, ...]] = {
    "word_embeddings.weight": (2,),
    "position_embeddings.weight": (2,),
    "token_type_embeddings.weight": (2,),
    "short_conv.weight": (2,),
    "filter.pos_emb": (2,),
    "filter.freq": (1,),
    ".skip": (1,),
    "up_proj.weight": (2, 3),  # dense, or blocks
    "down_proj.weight": (2, 3),
    "classifier.weight": (2,),
    "classifier.bias": (1,),
}

# Tensors of the reference that our model computes: buffers, and copies of the shared sine module.
DERIVED = re.compile(
    r"bert\.embeddings\.(position_ids|token_type_ids)|"
    + _LAYER
    + r"attention\.filter_fn2?\.(pos_emb\.t|modulation\.deltas|implicit_filter(_rev)?\.[135]\.freq)"
)

# Buffers of FlashFFTConv (twiddle factors and the like), which is how the reference was run.
FLASH_FFT = re.compile(r"(^|\.)flashfftconv")


@dataclass
class Translation:
    """The tensors of a reference state dict, sorted by their role in our model.

    Args:
        weights: Tensors under our names; views of those in the state dict.
        mapped: Reference name → our name.
        derived: Reference names of tensors that our model computes.
        flash_fft: Names of FlashFFTConv's buffers, which no model here has.
        unknown: Names that the reference does not have.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)
    flash_fft: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def translate(state_dict: Mapping[str, Tensor]) -> Translation:
    """Rename the tensors of a reference state dict, and list what happened to each.

    Args:
        state_dict: The state dict of a reference `BertForMaskedLM` or
            `BertForSequenceClassification`. Its names begin with `bert.`, `cls.` or `classifier.`.

    Raises:
        ValueError: If a tensor has a wrong number of dimensions; the message names it.
    """
    result = Translation()
    for name, tensor in state_dict.items():
        ours = our_name(name)
        if ours is not None:
            _check_rank(name, ours, tensor, extra=_extra_dim(ours) is not None)
            result.mapped[name] = ours
            result.weights[ours] = _without_extra_dim(ours, tensor)
        elif DERIVED.fullmatch(name):
            result.derived.append(name)
        elif FLASH_FFT.search(name):
            result.flash_fft.append(name)
        else:
            result.unknown.append(name)
    return result


def our_name(name: str) -> str | None:
    """Return our name of a reference tensor, or None if we have no such tensor."""
    return _renamed(name, RENAMES)


def from_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a reference state dict.

    Args:
        state_dict: See `translate`.

    Returns:
        A state dict for `M2BertForMaskedLM` or `M2BertForSequenceClassification`. Its tensors are
        views of those in `state_dict`.

    Raises:
        ValueError: As in `translate`, or if the reference has no such name; the message names it.
    """
    result = translate(state_dict)
    if result.unknown:
        raise ValueError(f"{result.unknown[0]!r} is no parameter name of the M2 reference")
    return result.weights


def to_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to the reference's names, and add the tensors that only it stores.

    This is the inverse of `from_reference`. Buffers are computed, in the dtype of `pos_emb`.

    Args:
        state_dict: Weights of one of our models; names of the encoder begin with `model.`.

    Returns:
        A state dict of the reference; tensors that it shares between modules share their memory.

    Raises:
        ValueError: If a name has no counterpart in the reference; the message names it.
    """
    attends = any(".mixer.qkv_proj." in name for name in state_dict)
    inverse = _inverse_renames(attends)
    result = {}
    for name, tensor in state_dict.items():
        theirs = _renamed(name, inverse)
        if theirs is None:
            raise ValueError(f"{name!r} has no counterpart in the M2 reference")
        result[theirs] = _with_extra_dim(name, tensor)
    return result | derived_tensors(state_dict)


def derived_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the tensors that only the reference stores: buffers, and copies of shared tensors.

    Args:
        state_dict: Weights under our names.

    Returns:
        The tensors under the reference's names, with the values that its constructors give them.
    """
    result = {}
    words = "model.embeddings.word_embeddings.weight"
    positions = state_dict.get("model.embeddings.position_embeddings.weight")
    if positions is not None:
        ids = torch.arange(len(positions), device=positions.device)
        result["bert.embeddings.position_ids"] = ids[None]
    if "decoder.bias" in state_dict and "decoder.weight" not in state_dict and words in state_dict:
        result["cls.predictions.decoder.weight"] = state_dict[words]
    slowest, fastest = (math.log(DECAY_TARGET) / decay for decay in (SLOWEST_DECAY, FASTEST_DECAY))
    for name, freq in state_dict.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mixer\.(\w+)\.filter\.freq", name)
        if not match:
            continue
        ours = name.removesuffix("freq")
        theirs = f"bert.encoder.layer.{match[1]}.attention.{CONVOLUTIONS[match[2]]}."
        directions = ["", "_rev"] if ours + "rev.out.weight" in state_dict else [""]
        places = [(direction, i) for direction in directions for i in (1, 3, 5)]
        for direction, i in places[1:]:  # the first place is our parameter
            result[f"{theirs}implicit_filter{direction}.{i}.freq"] = freq[None]
        like = state_dict.get(ours + "pos_emb")
        skip = state_dict.get(ours.removesuffix("filter.") + "skip")
        if like is not None and skip is not None:
            t = torch.linspace(0, 1, len(like))[None, :, None]
            deltas = torch.linspace(slowest, fastest, len(skip))[None, None]
            result[theirs + "pos_emb.t"] = t.to(like.dtype)
            result[theirs + "modulation.deltas"] = deltas.to(like.dtype)
    return result


def _renamed(name: str, renames: Mapping[str, str]) -> str | None:
    for pattern, replacement in renames.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _inverse_renames(attends: bool) -> dict[str, str]:
    """Invert RENAMES, for models with attention or for those with a Monarch mixer.

    Both kinds of layer have an `out_proj` and a `norm`, with different names in the reference.
    """
    inverse: dict[str, str] = {}
    for theirs, ours in RENAMES.items():
        of_attention = r"\.self\." in theirs or r"\.output\." in theirs
        of_mixer = r"\.out_linear\." in theirs or r"attention\.layernorm\." in theirs
        if of_mixer if attends else of_attention:
            continue
        groups = re.findall(r"\(\\[dw]\+\)", theirs)
        pattern, replacement = re.escape(ours), theirs.replace(r"\.", ".")
        for i, group in enumerate(groups, 1):
            pattern = pattern.replace(rf"\\{i}", group)
            replacement = replacement.replace(group, rf"\{i}", 1)
        inverse.setdefault(pattern, replacement)
    return inverse


def _extra_dim(ours: str) -> int | None:
    return next((dim for suffix, dim in EXTRA_DIM.items() if ours.endswith(suffix)), None)


def _without_extra_dim(ours: str, tensor: Tensor) -> Tensor:
    dim = _extra_dim(ours)
    return tensor if dim is None else tensor.squeeze(dim)


def _with_extra_dim(ours: str, tensor: Tensor) -> Tensor:
    dim = _extra_dim(ours)
    return tensor if dim is None else tensor.unsqueeze(dim)


def _check_rank(name: str, ours: str, tensor: Tensor, extra: bool = False) -> None:
    ranks = next((ranks for suffix, ranks in RANKS.items() if ours.endswith(suffix)), ())
    if ranks and tensor.ndim - extra not in ranks:
        right = " or ".join(str(rank + extra) for rank in ranks)
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}, but in an M2-BERT it has {right} "
            f"dimensions"
        )


def config_fields(state_dict: Mapping[str, Tensor]) -> dict[str, int | bool | str]:
    """Read the fields of `M2BertConfig` that the names and shapes of weights show.

    Weights do not show dropout, pooling, `mask_padding` and `hyena_w_mod`. If the blocks of a
    Monarch MLP are padded, the sizes returned are multiples of `monarch_mlp_nblocks`.

    Args:
        state_dict: Weights under our names, as `from_reference` returns them.

    Raises:
        ValueError: If a tensor that shows a size is missing or has a wrong number of dimensions;
            the message names it.
    """
    for name, tensor in state_dict.items():
        _check_rank(name, name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def shape(name: str) -> tuple[int, ...]:
        """Return the shape that most tensors with this name have."""
        found = Counter(s for n, s in shapes.items() if n.endswith(f".{name}"))
        if not found:
            raise ValueError(f"there is no {name}, which shows the model's sizes")
        return found.most_common(1)[0][0]

    def has(part: str) -> bool:
        return any(part in name for name in shapes)

    vocab_size, hidden_size = shape("embeddings.word_embeddings.weight")
    layers = {int(m[1]) for name in shapes if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers and max(layers) >= len(layers):
        lost = next(i for i in range(max(layers)) if i not in layers)
        raise ValueError(f"there is a layer {max(layers)}, but no layer {lost}")
    fields: dict[str, int | bool | str] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
        "use_positional_encodings": has("embeddings.position_embeddings.weight"),
    }
    if fields["use_positional_encodings"]:
        fields["max_position_embeddings"] = shape("embeddings.position_embeddings.weight")[0]

    up, down = shape("mlp.up_proj.weight"), shape("mlp.down_proj.weight")
    # The majority decides, so that one tensor with a wrong shape is found to be wrong later.
    maps = [
        s for name, s in shapes.items() if name.endswith(("up_proj.weight", "down_proj.weight"))
    ]
    blocks = Counter(s[0] if len(s) == 3 else None for s in maps).most_common(1)[0][0]
    monarch, nblocks = blocks is not None, blocks or 1
    intermediate_size = nblocks * down[-1]
    fields["use_monarch_mlp"] = monarch
    if monarch:
        fields["monarch_mlp_nblocks"] = nblocks
    fields["intermediate_size"] = intermediate_size
    # The ratio is 1 or 2, or near that if the blocks are padded.
    fields["use_glu_mlp"] = nblocks * up[-2] > 1.5 * intermediate_size

    if has(".mixer.qkv_proj."):
        fields["sequence_mixer"] = "alibi_attention"
        return fields
    fields["long_conv_l_max"], fields["hyena_emb_dim"] = shape("filter.pos_emb")
    fields["hyena_filter_order"] = shape("filter.freq")[0]
    fields["bidirectional"] = has(".filter.rev.")
    fields["residual_long_conv"] = has(".mixer.residual_conv.")
    fields["hyena_training_additions"] = has(".mixer.norm.")
    return fields
