"""Names of the released checkpoints (HazyResearch/m2, ``bert/``) and ours, in one table."""

import re
from collections.abc import Mapping

from torch import Tensor

_LAYER = r"bert\.encoder\.layer\.(\d+)\."

# Reference name → ours. The first pattern that matches a whole name counts; \1 is its first group.
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
for _theirs, _ours in (("filter_fn", "long_conv"), ("filter_fn2", "residual_conv")):
    _from, _to = _LAYER + rf"attention\.{_theirs}\.", rf"model.layers.\1.mixer.{_ours}."
    RENAMES[_from + "bias"] = _to + "skip"
    RENAMES[_from + r"pos_emb\.z"] = _to + "filter.pos_emb"
    # One sine module stands at the odd places of both directions' MLPs; this is the first of them.
    RENAMES[_from + r"implicit_filter\.1\.freq"] = _to + "filter.freq"
    for _theirs, _ours in (("implicit_filter", "fwd"), ("implicit_filter_rev", "rev")):
        for _i in range(3):
            _layer = rf"{_theirs}\.{2 * _i}\.(\w+)"
            RENAMES[_from + _layer] = _to + rf"filter.{_ours}.layers.{_i}.\2"
        RENAMES[_from + rf"{_theirs}\.6\.weight"] = _to + f"filter.{_ours}.out.weight"

# The dimension of size 1 that the reference's tensor has and ours has not, by the end of our name.
EXTRA_DIM = {"filter.pos_emb": 0, "filter.freq": 0, "short_conv.weight": 1}

# Reference tensors that ours computes: buffers, and the other places of the shared sine module.
DERIVED = re.compile(
    r"bert\.embeddings\.(position_ids|token_type_ids)|"
    + _LAYER
    + r"attention\.filter_fn2?\.(pos_emb\.t|modulation\.deltas|implicit_filter(_rev)?\.[135]\.freq)"
)


def from_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the reference's state dict to ours.

    Args:
        state_dict: of a reference ``BertForMaskedLM`` or ``BertForSequenceClassification``, names
            beginning with ``bert.``, ``cls.`` or ``classifier.``.

    Returns:
        Names and tensors for ``M2BertForMaskedLM`` or ``M2BertForSequenceClassification``; the
        tensors are views of those given.

    Raises:
        ValueError: if a name is not one of the reference's; the message names it.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        ours = _our_name(name)
        if ours is not None:
            for suffix, dim in EXTRA_DIM.items():
                if ours.endswith(suffix):
                    tensor = tensor.squeeze(dim)
            renamed[ours] = tensor
    return renamed


def _our_name(name: str) -> str | None:
    """Returns our name of a reference tensor, or None for one that ours computes."""
    for pattern, ours in RENAMES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    if DERIVED.fullmatch(name):
        return None
    raise ValueError(f"{name!r} is no parameter name of the M2 reference")


def config_fields(state_dict: Mapping[str, Tensor]) -> dict[str, int | bool | str]:
    """The fields of ``M2BertConfig`` that the weights' names and shapes tell.

    Not among them are dropout, pooling, ``mask_padding`` and ``hyena_w_mod``. Where a Monarch MLP's
    blocks are padded, its sizes come out as multiples of ``monarch_mlp_nblocks``.

    Args:
        state_dict: weights under our names, as ``from_reference`` gives them.
    """
    shape = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    vocab_size, hidden_size = shape["model.embeddings.word_embeddings.weight"]
    layers = {m[1] for name in shape if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    fields: dict[str, int | bool | str] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "type_vocab_size": shape["model.embeddings.token_type_embeddings.weight"][0],
    }
    positions = shape.get("model.embeddings.position_embeddings.weight")
    fields["use_positional_encodings"] = positions is not None
    if positions is not None:
        fields["max_position_embeddings"] = positions[0]

    up = shape["model.layers.0.mlp.up_proj.weight"]
    down = shape["model.layers.0.mlp.down_proj.weight"]
    monarch = len(down) == 3
    nblocks = down[0] if monarch else 1
    intermediate_size = nblocks * down[-1]
    fields["use_monarch_mlp"] = monarch
    if monarch:
        fields["monarch_mlp_nblocks"] = nblocks
    fields["intermediate_size"] = intermediate_size
    fields["use_glu_mlp"] = nblocks * up[-2] > 1.5 * intermediate_size  # 2, if not padded

    mixer = "model.layers.0.mixer."
    if mixer + "qkv_proj.weight" in shape:
        fields["sequence_mixer"] = "alibi_attention"
        return fields
    filters = mixer + "long_conv.filter."
    fields["long_conv_l_max"], fields["hyena_emb_dim"] = shape[filters + "pos_emb"]
    fields["hyena_filter_order"] = shape[filters + "freq"][0]
    fields["bidirectional"] = filters + "rev.out.weight" in shape
    fields["residual_long_conv"] = mixer + "residual_conv.skip" in shape
    fields["hyena_training_additions"] = mixer + "norm.weight" in shape
    return fields
