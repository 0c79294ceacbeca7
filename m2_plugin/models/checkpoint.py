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
