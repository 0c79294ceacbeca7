"""Monarch layers for llm-foundry's own models such as MPT, registered in its layer registries.

Dimension key: B batch, L sequence, D hidden, F intermediate, K blocks.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from llmfoundry.models.layers import build_fc
from llmfoundry.models.utils import attn_config_defaults, fc_type_defaults
from torch import Tensor, nn

from m2_plugin.foundry.fsdp import keep_filters_fp32
from m2_plugin.foundry.private import (
    is_residual,
    mark_residual,
    resolve_ffn_hidden_size,
    stacked_param_init_helper,
    summon_dtensor,
)
from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.long_conv import FilterLinear, HyenaFilter, LongConv
from m2_plugin.layers.mlp import call_monarch_mlp
from m2_plugin.layers.monarch_linear import MonarchLinear
from m2_plugin.layers.monarch_mixer import MonarchMixer, ShortConv

__all__ = ["CausalMonarchMixer", "MonarchFFN", "MonarchGLU", "init_monarch_module"]

FILTER_STD = 0.02  # of the weights of the filters' MLPs, as in M2-BERT
GELU = ({"name": "gelu"}, {"name": "gelu", "approximate": "none"})  # the op has only this one

# Arguments of MPT's attention layers that a convolution does not support, and why.
UNSUPPORTED = {
    "rotary_emb_w_meta_info": "it has no queries and keys to rotate: set attn_config.rope to false",
    "alibi_slopes": "it has no scores to bias: set attn_config.alibi to false",
    "prev_layer_key_value": "it keeps no keys and values that another layer could reuse",
    "x_prev": "it keeps no keys and values that another layer could reuse",
    "key_value_states": "it has no cross-attention",
}


class CausalMonarchMixer(nn.Module):
    """Causal gated long convolutions in place of MPT's attention.

    The M2 mixer (arXiv 2310.12109, section 4.1) with causal convolutions; its equation is in
    `m2_plugin.layers.monarch_mixer`. Both projections are llm-foundry's `fc_type`. The input
    projection has no bias, since the short convolution adds one to the same features. Therefore
    padding on the left changes nothing: a prompt gives the same text alone and in a batch.

    The arguments are those of MPT's attention. Values that a convolution cannot support raise an
    error.

    Args:
        d_model: D.
        n_heads: Any number; the mixer has no heads.
        head_dim: Must be None.
        fc_type: llm-foundry's kind of fully connected layer, with its arguments.
        device: The device of the parameters.
        bias: Whether the output projection has a bias.
        attention_bias: Whether the short convolution has a bias.
        attn_pdrop: The probability of dropout after the first gate and before the output
            projection.
        max_seq_len: The longest sequence. MPT does not pass its own value to its layers: set
            `attn_config.max_seq_len` to the same number. The default is MPT's.
        residual_long_conv: Whether to add the second convolution, of the input itself. M2-BERT has
            it because its mixer has no residual connection around it; MPT's block has one.
        filter_order: The width of the filters' MLPs.
        filter_emb_dim: The positional features of the filters, an odd number.
        filter_w: The initial frequency of the filters' sines.
        filter_w_mod: A constant factor on these frequencies.
        backend: `auto`, `torch` or `triton`.
        **attention_only: Other keys of `attn_config`, which must be at their defaults, except
            `attn_impl`.

    Raises:
        ValueError: If a key that has no meaning for a convolution is not at its default.
    """

    reuse_kv_layer_idx = None  # MPT reads these two from each attention layer
    reuse_kv_x_layer_idx = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int | None = None,
        fc_type: dict[str, Any] | None = None,
        device: str | None = None,
        bias: bool = True,
        attention_bias: bool = True,
        attn_pdrop: float = 0.0,
        max_seq_len: int = 2048,
        residual_long_conv: bool = False,
        filter_order: int = 128,
        filter_emb_dim: int = 5,
        filter_w: float = 10.0,
        filter_w_mod: float = 1.0,
        backend: str = "auto",
        **attention_only: Any,
    ):
        super().__init__()
        del n_heads
        self.attn_impl = attention_only.pop("attn_impl", None)
        for key, value in {"head_dim": head_dim, **attention_only}.items():
            if value != attn_config_defaults.get(key):
                raise ValueError(
                    f"attn_config.{key}: {value!r} has no meaning for attn_type monarch_mixer, "
                    "which has no heads, queries or keys: remove it."
                )
        with torch.device(device) if device else nullcontext():
            self.mixer = MonarchMixer(
                d_model,
                max_seq_len,
                bidirectional=False,
                residual_long_conv=residual_long_conv,
                dropout=attn_pdrop,
                filter_order=filter_order,
                filter_emb_dim=filter_emb_dim,
                filter_w=filter_w,
                filter_w_mod=filter_w_mod,
                backend=backend,
            )
        kwargs = {**(fc_type or fc_type_defaults), "device": device}
        name = kwargs["name"]
        self.mixer.in_proj = build_fc(name, d_model, 3 * d_model, {**kwargs, "bias": False})
        self.mixer.out_proj = build_fc(name, d_model, d_model, {**kwargs, "bias": bias})
        mark_residual(self.mixer.out_proj)
        if not attention_bias:
            self.mixer.short_conv.register_parameter("bias", None)
        keep_filters_fp32(self)

    def forward(
        self,
        x: Tensor,
        attn_bias: Tensor | None = None,
        attention_mask: Tensor | None = None,
        is_causal: bool = True,
        needs_weights: bool = False,
        flash_attn_padding_info: dict[str, Tensor] | None = None,
        pos_id_within_seq: Tensor | None = None,
        past_key_value: tuple[Tensor, ...] | None = None,
        **attention_only: Any,
    ) -> tuple[Tensor, None, tuple[Tensor, ...] | None]:
        """Map (B, S, D) to (B, S, D), with None for attention weights, and the cache.

        The cache is the state of `MonarchMixer.resume`, which grows by D values for each position
        (2D with `residual_long_conv`), half of what attention keeps. MPT reads the number L − S of
        positions before x from its first tensor, as (B, D, 1, L − S) with `attn_impl: torch` and
        (B, L − S, D) with others.

        Args:
            x: (B, S, D).
            attn_bias: MPT's bias on its scores, (B or 1, 1, 1, L) for padding.
            attention_mask: (B, L), true at tokens, or None. Padding does not change the result.
            is_causal: Must be true.
            needs_weights: Must be false.
            flash_attn_padding_info: The starts of documents, with `attn_impl: flash`.
            pos_id_within_seq: Not used.
            past_key_value: The cache of the positions before x, an empty tuple to start one, or
                None to have none.
            **attention_only: The arguments in `UNSUPPORTED`; each must be None.

        Raises:
            ValueError: If a convolution does not support an argument, or if the sequence is longer
                than `max_seq_len`.
        """
        del pos_id_within_seq
        for name, value in attention_only.items():
            if value is not None:
                raise _refusal(UNSUPPORTED.get(name, f"it has no argument {name}"))
        if not is_causal:
            raise _refusal("it is causal: set is_causal to true")
        if needs_weights:
            raise _refusal("it has no attention weights: set output_attentions to false")
        if attn_bias is not None and attn_bias.shape[1] > 1:
            raise _refusal(UNSUPPORTED["alibi_slopes"])
        starts = (flash_attn_padding_info or {}).get("cu_seqlens_q")
        if (attn_bias is not None and attn_bias.shape[2] > 1) or (
            starts is not None and len(starts) > len(x) + 1
        ):
            raise _refusal(
                "a convolution cannot separate documents within one sequence: set "
                "attn_config.attn_uses_sequence_id to false"
            )
        past = past_key_value or ()
        if past:
            first = past[0].squeeze(2) if self.attn_impl == "torch" else past[0].transpose(1, 2)
            past = first, *past[1:]
        length = x.shape[1] + (past[0].shape[2] if past else 0)
        if length > (longest := self.mixer.long_conv.filter.max_length):
            raise ValueError(
                f"The sequence has {length} positions, but the filters of monarch_mixer have "
                f"attn_config.max_seq_len = {longest}: set it to the model's max_seq_len."
            )
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :, None].to(x.dtype)
            x = x * mask
        if past_key_value is None:
            return self.mixer(x, mask), None, None
        y, (first, *rest) = self.mixer.resume(x, mask, past)
        first = first.unsqueeze(2) if self.attn_impl == "torch" else first.transpose(1, 2)
        return y, None, (first, *rest)


def _refusal(reason: str) -> ValueError:
    return ValueError(f"attn_type monarch_mixer does not support this: {reason}.")


class MonarchFFN(nn.Module):
    """`W_down · GELU(W_up · x) + b`, both maps block-diagonal (arXiv 2310.12109, section 4.1).

    Args:
        d_model: D.
        expansion_ratio: F / D.
        nblocks: K, the number of blocks of each map.
        fc_type: Not used: both maps are block-diagonal.
        ffn_hidden_size: F, instead of `expansion_ratio`.
        ffn_act_fn: None or `name: gelu`.
        dropout: The probability of dropping an activation.
        device: The device of the parameters.
        bias: Whether to add a bias at the end.
        backend: `auto`, `torch` or `triton`.

    Raises:
        ValueError: If `ffn_act_fn` is another function, or `nblocks` is not between 1 and the
            smaller of the two sizes of a map.
    """

    glu = False

    def __init__(
        self,
        d_model: int,
        expansion_ratio: int | float,
        nblocks: int = 4,
        fc_type: dict[str, Any] | None = None,
        ffn_hidden_size: int | None = None,
        ffn_act_fn: dict[str, Any] | None = None,
        dropout: float = 0.0,
        device: str | None = None,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        del fc_type
        if ffn_act_fn is not None and ffn_act_fn not in GELU:
            raise ValueError(
                "ffn_config.ffn_act_fn must be {name: gelu}, the only activation of the Monarch "
                f"FFNs, got {ffn_act_fn}."
            )
        self.intermediate_size = resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)
        self.dropout = dropout
        self.backend = backend
        up_size = self.intermediate_size * (2 if self.glu else 1)
        self.up_proj = BlockDiagonalLinear(
            d_model, up_size, nblocks, bias=False, backend=backend, device=device
        )
        self.down_proj = BlockDiagonalLinear(
            self.intermediate_size, d_model, nblocks, bias=bias, backend=backend, device=device
        )
        mark_residual(self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        dropout_p = self.dropout if self.training else 0.0
        return call_monarch_mlp(
            self.up_proj, self.down_proj, x, self.glu, dropout_p, backend=self.backend
        )


class MonarchGLU(MonarchFFN):
    """`W_down · (GELU(gate) ⊙ up) + b` with the halves (gate, up) of W_up · x; see `MonarchFFN`.

    The gate comes from the first half of x's blocks, the other branch from the second half.
    """

    glu = True


@summon_dtensor
def _init_blocks(
    module: nn.Module,
    init_fn_: Callable[[Tensor], Any],
    init_div_is_residual: int | float | str | bool,
    div_is_residual: float,
) -> None:
    """Initialise each block like a fully connected layer of its size."""
    if isinstance(module, MonarchLinear):
        nn.init.normal_(module.right, std=module.right.shape[2] ** -0.5)  # keeps the variance
        weight = module.left
    else:
        assert isinstance(module, BlockDiagonalLinear)
        weight = module.weight
    stacked_param_init_helper(weight, init_fn_, stack_dim=0)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    if init_div_is_residual is not False and is_residual(module):
        with torch.no_grad():
            weight.div_(div_is_residual)


@summon_dtensor
def _init_filter_linear(module: FilterLinear) -> None:
    nn.init.normal_(module.weight, std=FILTER_STD)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@summon_dtensor
def _reset(module: HyenaFilter | LongConv | ShortConv) -> None:
    module.reset_parameters()


def init_monarch_module(
    module: nn.Module,
    init_fn_: Callable[[Tensor], Any],
    init_div_is_residual: int | float | str | bool,
    div_is_residual: float,
    **kwargs: Any,
) -> bool:
    """Initialise a module of this package, for llm-foundry's `module_init_fns`.

    Block-diagonal weights follow the model's `init_config`, block by block. So does the outer
    factor of a Monarch matrix; its inner factor keeps the variance. Biases are zero. Filters and
    short convolutions always have M2-BERT's initialisation.

    Args:
        module: A module of the model; llm-foundry passes its children separately.
        init_fn_: The function of `init_config` that fills a weight.
        init_div_is_residual: Whether to scale down layers that write to the residual stream.
        div_is_residual: The divisor for them.
        **kwargs: llm-foundry's arguments for other kinds of modules.

    Returns:
        Whether the module belongs to this package.
    """
    del kwargs
    if isinstance(module, (BlockDiagonalLinear, MonarchLinear)):
        _init_blocks(module, init_fn_, init_div_is_residual, div_is_residual)
    elif isinstance(module, FilterLinear):
        _init_filter_linear(module)
    elif isinstance(module, (HyenaFilter, LongConv, ShortConv)):
        _reset(module)
    else:
        return False
    return True
