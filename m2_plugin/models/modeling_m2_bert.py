"""M2-BERT: Monarch Mixer encoders (arXiv 2310.12109) as transformers models.

Dimension key: B batch, L sequence, D hidden, V vocabulary.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import cached_file, logging

from m2_plugin.layers.add_norm import add_norm
from m2_plugin.layers.alibi_attention import AlibiAttention
from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.long_conv import FilterLinear, HyenaFilter, LongConv
from m2_plugin.layers.mlp import DenseMLP, MonarchMLP
from m2_plugin.layers.monarch_mixer import MonarchMixer, ShortConv, taps_of_mixers
from m2_plugin.layers.plain import is_plain
from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.sentence_folder import read_modules, write_modules
from m2_plugin.ops.fixed import declare_fixed
from m2_plugin.ops.hyena_filters import TapsKeeper, may_keep
from m2_plugin.ops.linear_cross_entropy import linear_cross_entropy

log = logging.get_logger(__name__)

# Arguments of `from_pretrained` that tell where files of the hub are.
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Most that the taps of several layers, computed at once, may take.
TAPS_BYTES = 256 << 20
IGNORE_INDEX = -100  # label of a position without loss, as in torch's cross_entropy


class M2BertEmbeddings(nn.Module):
    """LayerNorm(word + token type + position), then dropout."""

    sequence_last = False  # whether only a mixer reads the output; see `add_layer_norm`

    def __init__(self, config: M2BertConfig):
        super().__init__()
        width = config.hidden_size
        self.backend = config.backend
        self.word_embeddings = nn.Embedding(
            config.vocab_size, width, padding_idx=config.pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, width)
            if config.use_positional_encodings
            else None
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Map (B, L) token ids, or (B, L, D) word embeddings, to (B, L, D)."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        # All but the words first: usually they are the same in every row of the batch.
        others = _embedded(self.token_type_embeddings, token_type_ids, 1, x.device)
        if self.position_embeddings is not None:
            others = others + _embedded(
                self.position_embeddings, position_ids, x.shape[1], x.device
            )
        return self.dropout(add_norm(self.norm, x, others, self.sequence_last, self.backend))


def _embedded(
    embedding: nn.Embedding, ids: Tensor | None, number: int, device: torch.device
) -> Tensor:
    """Return the embeddings of ids; if None, of 0 … number − 1, (1, number, D)."""
    if ids is not None:
        return embedding(ids)
    if is_plain(embedding, nn.Embedding) and embedding.max_norm is None:
        return embedding.weight.narrow(0, 0, number)[None]  # nothing is copied
    return embedding(torch.arange(number, device=device)[None])


class ExtendedFilter(HyenaFilter):
    """A filter that was extended to longer sequences after training.

    The window is `exp(−s(t)·|δ|)`. Up to the first maximum length, s = t / (length − 1), as before
    the extension. Beyond it the window decays slowly: s grows by half a unit for each extension.
    So the new taps are small at first, but training can use them. (At the first rate they would
    vanish: e^{−48} at position 2,048 of a model that was made for 128.)

    Args:
        channels: D; each has its own filter.
        max_length: H, the longest sequence.
        extended_from: Earlier values of `max_length`, ascending.
        **kwargs: More arguments of `HyenaFilter`.
    """

    def __init__(self, channels: int, max_length: int, extended_from: Sequence[int], **kwargs: Any):
        self.extended_from = list(extended_from)
        super().__init__(channels, max_length, **kwargs)

    def decay_scale(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return s(t), (L,)."""
        t = torch.arange(length, dtype=dtype, device=device)
        s = t / (self.extended_from[0] - 1)
        for i, (before, after) in enumerate(pairwise([*self.extended_from, self.max_length])):
            beyond = 1 + i / 2 + (t - (before - 1)) / (2 * (after - before))
            s = torch.where(t < before, s, beyond)
        return s

    def settings(self) -> tuple[Any, ...]:
        """Return all that the taps depend on beside the parameters."""
        return *super().settings(), *self.extended_from


class M2BertLayer(nn.Module):
    """One layer: mlp(mixer(x)). A Monarch mixer has no residual and no norm around it."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.mixer: MonarchMixer | AlibiAttention
        if config.sequence_mixer == "monarch_mixer":
            self.mixer = mixer = MonarchMixer(
                config.hidden_size,
                max_length=config.long_conv_l_max,
                bidirectional=config.bidirectional,
                residual_long_conv=config.residual_long_conv,
                pre_norm=config.hyena_training_additions,
                dropout=config.mixer_dropout_prob,
                filter_order=config.hyena_filter_order,
                filter_emb_dim=config.hyena_emb_dim,
                filter_w=config.hyena_w,
                filter_w_mod=config.hyena_w_mod,
                backend=config.backend,
            )
            if config.hyena_extended_from:
                _extend_filters(mixer, config)
        else:
            self.mixer = AlibiAttention(
                config.hidden_size,
                config.num_attention_heads,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                layer_norm_eps=config.layer_norm_eps,
            )
        mlp_cls: Callable[..., nn.Module] = DenseMLP
        if config.use_monarch_mlp:
            mlp_cls = partial(MonarchMLP, nblocks=config.monarch_mlp_nblocks)
        self.mlp = mlp_cls(
            config.hidden_size,
            config.intermediate_size,
            glu=config.use_glu_mlp,
            dropout=config.hidden_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
            backend=config.backend,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, *taps: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            x: (B, L, D).
            mask: (B, L, 1), 1 at tokens and 0 at padding, or None.
            *taps: Of a Monarch mixer's filters, if the caller computed them (`taps_of_mixers`).
        """
        return self.mlp(self.mixer(x, mask, *taps))


def _extend_filters(mixer: MonarchMixer, config: M2BertConfig) -> None:
    for conv in (mixer.long_conv, mixer.residual_conv):
        if conv is not None:
            conv.filter = ExtendedFilter(
                config.hidden_size,
                config.long_conv_l_max,
                config.hyena_extended_from or [],
                emb_dim=config.hyena_emb_dim,
                order=config.hyena_filter_order,
                w=config.hyena_w,
                w_mod=config.hyena_w_mod,
                bidirectional=config.bidirectional,
                backend=config.backend,
            )


class M2BertPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, shared by the models."""

    config_class = M2BertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["M2BertLayer"]

    def __init__(self, config: M2BertConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.sequence_mixer == "monarch_mixer":
            # For transformers 5, which casts weights before a filter sees them.
            self._keep_in_fp32_modules_strict = ["filter"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, with the filters' weights at aligned addresses.

        Weights mapped from a file may be unaligned. Matrix products then round differently, and the
        filters' sines amplify the difference a hundredfold. A folder that sentence-transformers
        saved has the pooler beside the encoder; it is read there.
        """
        name, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        for module in model.modules():
            if isinstance(module, HyenaFilter):
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()
        if info and "pooler.dense.weight" in info["missing_keys"]:
            model._read_pooler(name, info, {key: kwargs[key] for key in HUB_KEYS if key in kwargs})
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _read_pooler(self, name: Any, info: dict[str, Any], hub: Mapping[str, Any]) -> None:
        """Take the pooler of sentence-transformers' modules, if there are any that fit."""
        find = partial(
            cached_file,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        width = self.config.hidden_size
        found = None if name is None else read_modules(find, _load_tensors, width)
        if found is None or not (found.weights or isinstance(self, M2BertForTextEmbedding)):
            return
        for key, tensor in found.weights.items():
            self.get_parameter(key).copy_(tensor)
        if not found.weights:
            self.pooler.dense = None
        saved = type(self.config).from_pretrained(name, **hub)
        for key, value in found.fields.items():
            if getattr(self.config, key) == getattr(saved, key):  # else the user has replaced it
                setattr(self.config, key, value)
        self.pooler.pooling = self.config.classifier_pooling
        info["missing_keys"] = [k for k in info["missing_keys"] if not k.startswith("pooler.")]
        log.warning("%s: the pooler was read from sentence-transformers' modules", name)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, with all modules of a hub folder if the code is from one.

        Args:
            save_directory: The folder.
            is_main_process: As in `PreTrainedModel.save_pretrained`; others write nothing.
            *args: As there.
            **kwargs: As there.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and not __name__.startswith("m2_plugin."):
            # transformers 4.51 copies the config's modules only.
            for module in Path(__file__).parent.glob("*.py"):
                if module.name != "__init__.py":
                    shutil.copy(module, save_directory)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the reference does, but draw every layer's values anew."""
        # transformers 5 calls this after loading. It marks loaded parameters, and makes torch's
        # initialisers skip them. Positional features and the padding's embedding are set otherwise,
        # so restore all loaded values.
        parameters = module.parameters(recurse=False)
        loaded = [(p, p.clone()) for p in parameters if getattr(p, "_is_hf_initialized", False)]
        self._draw(module)
        for parameter, value in loaded:
            parameter.copy_(value)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | FilterLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, BlockDiagonalLinear | ShortConv | HyenaFilter | LongConv):
            module.reset_parameters()


class M2BertModel(M2BertPreTrainedModel):
    """The bare encoder: embeddings and layers, without a head.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.embeddings = M2BertEmbeddings(config)
        self.layers = nn.ModuleList(M2BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self._looked_for_padding = False
        if config.sequence_mixer == "monarch_mixer" and not config.hyena_training_additions:
            # Only the mixer of the next layer reads these. What leaves the encoder is as ever.
            for module in (self.embeddings, *(layer.mlp for layer in self.layers[:-1])):
                module.sequence_last = True
        self._keeper = TapsKeeper()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def _mask(self, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the mixers' mask (B, L, 1) in `dtype`, or None if they need no mask."""
        attends = self.config.sequence_mixer == "alibi_attention"
        if attention_mask is None or not (attends or self.config.mask_padding):
            return None
        return attention_mask.to(dtype).unsqueeze(-1)

    def _check_inputs(
        self, given: Tensor, embedded: bool, mask: Tensor | None, *ids: Tensor | None
    ) -> None:
        """Raise an error for inputs that torch would refuse too, but without their names.

        Args:
            given: The `input_ids`, or the `inputs_embeds`.
            embedded: Whether they are embeddings.
            mask: The `attention_mask`.
            *ids: The `token_type_ids` and the `position_ids`.
        """
        name, shape = "inputs_embeds" if embedded else "input_ids", tuple(given.shape)
        if len(shape) != 2 + embedded:
            wanted = "(batch, length, hidden_size)" if embedded else "(batch, length)"
            raise ValueError(f"{name} must be {wanted}, not {shape}")
        if 0 in shape[:2]:
            raise ValueError(f"{name} {shape} hold no token: give at least one text of one token")
        if not embedded:
            self._check_ids(name, given, "vocab_size")
        fields = ("type_vocab_size", "max_position_embeddings")
        for what, tensor, field in zip(
            ("token_type_ids", "position_ids"), ids, fields, strict=True
        ):
            if tensor is None:
                continue
            if tuple(tensor.shape) not in (shape[:2], (1, shape[1])):
                raise ValueError(f"{what} {tuple(tensor.shape)} must be {shape[:2]}, as {name}")
            if self.config.use_positional_encodings or what == "token_type_ids":
                self._check_ids(what, tensor, field)
        if mask is not None and mask.shape != shape[:2]:
            raise ValueError(f"attention_mask {tuple(mask.shape)} must be {shape[:2]}, as {name}")

    def _check_ids(self, name: str, ids: Tensor, field: str) -> None:
        """Check that ids have embeddings, on a CPU: elsewhere the host would wait for them."""
        if ids.device.type != "cpu" or type(ids) is not Tensor:  # a fake tensor has no values
            return
        low, high = (int(value) for value in ids.aminmax())
        size = getattr(self.config, field)
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} must be from 0 to {size - 1} ({field} is {size}), but hold "
                f"{low if low < 0 else high}"
            )

    def _warn_of_padding(self, input_ids: Tensor) -> None:
        """Warn once if ids begin or end with padding. transformers' own needs more of a config.

        On other devices than a CPU the host would wait for the ids: there it looks at those of a
        model's first call only, and not while a CUDA graph is captured.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or not input_ids.numel():
            return
        if input_ids.device.type != "cpu":
            capturing = input_ids.is_cuda and torch.cuda.is_current_stream_capturing()
            if self._looked_for_padding or capturing:
                return
            self._looked_for_padding = True
        if self.config.pad_token_id in input_ids[:, [0, -1]]:
            log.warning_once(
                "The input_ids hold padding and there is no attention_mask: pass the one that the "
                "tokenizer returns, so that poolers and mask_padding leave padding out."
            )

    def _encode(self, x: Tensor, mask: Tensor | None, keeper: TapsKeeper | None) -> list[Tensor]:
        """Return x and the outputs of all layers, (B, L, D); `keeper` as in `_taps`."""
        states = [x]
        checkpointing = self.gradient_checkpointing and self.training
        ready: list[Sequence[Tensor]] = []
        for i, layer in enumerate(self.layers):
            ready = ready or self._taps(i, x, checkpointing, keeper)
            taps = ready.pop(0)
            if checkpointing:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask, *taps)
            else:
                x = layer(x, mask, *taps)
            states.append(x)
        return states

    def _taps(
        self, first: int, x: Tensor, checkpointing: bool, keeper: TapsKeeper | None
    ) -> list[Sequence[Tensor]]:
        """Compute the taps of many layers at once.

        Args:
            first: Index of the first layer.
            x: (B, L, D), its input.
            checkpointing: Whether layers will be computed again. Taps that a layer computes itself
                take memory only while it is.
            keeper: Where taps are kept between passes, if they may be.

        Returns:
            Arguments for calls of layer `first` and some after it. () for a layer that computes its
            own.
        """
        config, count = self.config, len(self.layers)
        size = 8 * x.shape[2] * (2 * x.shape[1] - 1)  # two filters of a layer
        alone: list[Sequence[Tensor]] = [()] * (count - first)
        if config.sequence_mixer != "monarch_mixer":
            return alone
        if checkpointing and count * size > TAPS_BYTES:
            return alone
        number = max(1, -(-count // -(-count * size // TAPS_BYTES)))
        if keeper is not None and keeper.fits(count * size, x.device):
            number = count  # all stay anyway, and one comparison is quicker than many
        group = self.layers[first : first + number]
        if not all(is_plain(layer, M2BertLayer) for layer in group):
            return alone
        taps = taps_of_mixers([layer.mixer for layer in group], x, keeper, first)
        if taps is None:
            return alone[: len(group)]
        if not checkpointing and _keeps_spectra(count * size, x.device):
            declare_fixed(*chain.from_iterable(taps), reused=False)
        return [*taps]

    def train(self, mode: bool = True) -> "M2BertModel":
        """Set the mode; in training no taps are kept."""
        if mode:
            self._keeper.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._keeper.clear()
        return super()._apply(*args, **kwargs)

    def _padded(
        self,
        length: int,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Append padding to (B, L) inputs as a tokenizer does: types of 0, positions that go on."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        missing = given.shape[0], length - given.shape[1]
        padding = torch.full(
            missing, self.config.pad_token_id, dtype=torch.int64, device=given.device
        )
        positions = torch.arange(given.shape[1], length, device=given.device)[None]
        if position_ids is not None:
            positions = positions.expand(position_ids.shape[0], -1)  # which may be 1
        embeddings = None if inputs_embeds is None else self.embeddings.word_embeddings(padding)

        def followed_by(end: Tensor | None, rows: Tensor | None) -> Tensor | None:
            if rows is None or end is None:
                return rows
            return torch.cat([rows, end.to(rows.dtype)], dim=1)

        return (
            followed_by(padding, input_ids),
            followed_by(torch.zeros_like(padding), token_type_ids),
            followed_by(positions, position_ids),
            followed_by(embeddings, inputs_embeds),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Encode a batch.

        Args:
            input_ids: (B, L) int64 token ids. Give either these or `inputs_embeds`.
            attention_mask: (B, L), 1 at tokens and 0 at padding. Only `alibi_attention` and
                `mask_padding: true` use it.
            token_type_ids: (B, L) int64, all 0 by default.
            position_ids: (B, L) or (1, L) int64, 0 … L−1 by default.
            inputs_embeds: (B, L, D) word embeddings.
            output_attentions: For callers that pass it to every model; there are no attention
                weights to return.
            output_hidden_states: Whether to return the embeddings and every layer's output too.
            return_dict: Whether to return a `BaseModelOutput` (the default) and not a tuple.

        Returns:
            `last_hidden_state` (B, L, D), and `hidden_states` if `output_hidden_states`.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given; if the
                sequence is longer than the model's filters or position embeddings; if there is no
                token; if a shape is wrong; or, on a CPU, if an id has no embedding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            embedded = inputs_embeds is not None
            self._check_inputs(given, embedded, attention_mask, token_type_ids, position_ids)
        length = given.shape[1]
        limit = self.config.max_sequence_length
        if limit is not None and length > limit:
            raise ValueError(
                f"the sequence has {length} positions, but this model takes at most {limit} "
                f"(long_conv_l_max = {self.config.long_conv_l_max}, "
                f"max_position_embeddings = {self.config.max_position_embeddings})"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if input_ids is not None and attention_mask is None:
            self._warn_of_padding(input_ids)

        if (full := self.config.padded_length) is not None:
            # No mask is needed: the mixers read one only where padding changes nothing.
            input_ids, token_type_ids, position_ids, inputs_embeds = self._padded(
                full, input_ids, token_type_ids, position_ids, inputs_embeds
            )
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = self._mask(attention_mask, x.dtype)
        keeper = None if self.training or not may_keep(x) else self._keeper
        hidden_states = self._encode(x, mask, keeper)
        if keeper is not None and keeper.outdated():  # weights have changed, which is rare
            hidden_states = self._encode(x, mask, keeper)
        x = hidden_states[-1]
        if mask is not None and self.config.sequence_mixer == "alibi_attention":
            x = x * mask  # the reference removes padding before the encoder, then fills in zeros
        x = x.contiguous()  # it is, unless the last layers were removed
        if full is not None:
            x, hidden_states = x[:, :length], [states[:, :length] for states in hidden_states]
        output = BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class M2BertHead(nn.Module):
    """BERT's transform before the decoder: LayerNorm(GELU(dense(x)))."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.norm(F.gelu(self.dense(x)))


class M2BertForMaskedLM(M2BertPreTrainedModel):
    """The encoder with a masked-language-model head, its decoder tied to the word embeddings.

    Args:
        config: The model's configuration.
    """

    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.head = M2BertHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the decoder."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        self.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        masked_logits_only: bool = False,
        loss_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predict masked tokens.

        Args:
            input_ids: See `M2BertModel.forward`, also for the other inputs.
            labels: (B, L) int64 token ids, −100 at positions without loss.
            masked_logits_only: Whether to decode only the M positions that have a label. Then
                `logits` are (M, V), in the order of `labels[labels != -100]`. At 15% masking this
                saves most of the decoder's work. M depends on the data, so `torch.compile` makes
                two graphs. Without labels this has no effect.
            loss_only: Whether `logits` may be None. Then a GPU does not keep them: with their
                gradients they take 300 KB for each labelled position. This implies
                `masked_logits_only`; it has no effect without labels, or if a call of the decoder
                does more than its product (hooks, adapters).

        Returns:
            `loss`, the mean cross-entropy in nats over the labelled positions (0 if there are
            none), and `logits`, (B, L, V) unless `masked_logits_only` or `loss_only`.
        """
        labelled = None
        if labels is not None and (masked_logits_only or loss_only):
            # Compute the indices once, and before the encoder: on a GPU the host waits for their
            # number, and after the encoder it would wait for all that runs until then.
            labelled = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)  # (M,)
            labels = labels.flatten()[labelled]
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = encoded.last_hidden_state
        if labelled is not None:
            x = x.flatten(0, 1).index_select(0, labelled)
        x, logits, loss = self.head(x), None, None
        if labels is not None and loss_only and is_plain(self.decoder, nn.Linear):
            loss = linear_cross_entropy(
                x, self.decoder.weight, self.decoder.bias, labels, self.config.backend
            )
        else:
            logits = self.decoder(x)
            loss = None if labels is None else _mean_cross_entropy(logits, labels)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class M2BertPooler(nn.Module):
    """tanh(dense(·)) of the first token, or of the mean over the tokens that are not padding.

    Args:
        config: The model's configuration.
        dense: Whether there are the dense layer and the tanh.
    """

    def __init__(self, config: M2BertConfig, dense: bool = True):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if dense else None

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Map (B, L, D), with a mask (B, L) or None, to (B, D)."""
        if self.pooling == "cls":
            pooled = x.select(1, 0)
        elif attention_mask is None:
            pooled = x.mean(dim=1)
        else:
            mask = attention_mask.to(x.dtype).unsqueeze(-1)
            pooled = (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # 0 without a token
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))


@dataclass
class M2BertEmbeddingOutput(BaseModelOutputWithPooling):
    """Output of `M2BertForTextEmbedding`.

    Args:
        sentence_embedding: (B, D), the embeddings: `pooler_output`, scaled to length 1 if the
            config has `normalize_embeddings: true`.
    """

    sentence_embedding: Tensor | None = None


class M2BertForTextEmbedding(M2BertPreTrainedModel):
    """The encoder with a pooler, as in the released retrieval models (arXiv 2402.07440).

    Args:
        config: The model's configuration; `classifier_pooling`, `embedding_pooler` and
            `normalize_embeddings` define the embedding.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.pooler = M2BertPooler(config, dense=config.embedding_pooler)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> M2BertEmbeddingOutput | tuple[Tensor, ...]:
        """Embed texts.

        Args:
            input_ids: See `M2BertModel.forward`, also for the other inputs.
            attention_mask: (B, L), 1 at tokens and 0 at padding. `mean` pooling uses it too.

        Returns:
            `sentence_embedding` (B, D); `pooler_output` (B, D), the same before any scaling; and
            `last_hidden_state` (B, L, D).
        """
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = self.pooler(encoded.last_hidden_state, attention_mask)
        output = M2BertEmbeddingOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
            sentence_embedding=(
                F.normalize(pooled, dim=-1) if self.config.normalize_embeddings else pooled
            ),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save the model as transformers does, and the files that sentence-transformers reads.

        Args:
            save_directory: The folder to write to.
            is_main_process: Whether this process writes the files, as in `PreTrainedModel`.
        """
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if is_main_process:
            write_modules(save_directory, self.config, state_dict or self.state_dict())


class M2BertForSequenceClassification(M2BertPreTrainedModel):
    """The encoder with a pooler and a linear classifier or regressor, e.g. for GLUE.

    Args:
        config: The model's configuration; `num_labels`, `problem_type`, `classifier_pooling`
            and `classifier_dropout` shape the head.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.pooler = M2BertPooler(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classify sequences.

        Args:
            input_ids: See `M2BertModel.forward`, also for the other inputs.
            attention_mask: (B, L), 1 at tokens and 0 at padding. `mean` pooling uses it too.
            labels: (B,) int64 class ids; (B,) or (B, num_labels) numbers for regression; or
                (B, num_labels) zeros and ones for multi-label classification.
                `config.problem_type` decides which. If it is None, `num_labels` and the dtype of
                the labels decide, as in transformers' BERT.

        Returns:
            `loss` if labels are given, and `logits` (B, num_labels).
        """
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = self.pooler(encoded.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            if self.config.num_labels == 1:
                problem = "regression"
            elif labels.is_floating_point():
                problem = "multi_label_classification"
            else:
                problem = "single_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.reshape(labels.shape).float(), labels.float())
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


class M2BertForTokenClassification(M2BertPreTrainedModel):
    """The encoder with a linear classifier of each token, e.g. for named entities.

    Args:
        config: The model's configuration; `num_labels` and `classifier_dropout` shape the head.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Classify tokens.

        Args:
            input_ids: As in `M2BertModel.forward`, like the other inputs not named here.
            labels: (B, L) class ids, −100 at positions without loss.

        Returns:
            `loss` if labels are given (0 if all are −100), and `logits` (B, L, num_labels).
        """
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else _mean_cross_entropy(logits, labels)
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class M2BertForQuestionAnswering(M2BertPreTrainedModel):
    """The encoder with scores of where in the text an answer starts and ends, as for SQuAD.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """Score each position as the start and as the end of the answer.

        Args:
            input_ids: As in `M2BertModel.forward`, like the other inputs not named here.
            start_positions: (B,) positions of the answers' first tokens. A position outside of the
                sequence, as of an answer that was cut off, has no loss.
            end_positions: (B,) those of their last tokens.

        Returns:
            `loss` if positions are given, the mean of the two cross-entropies; `start_logits` and
            `end_logits`, (B, L) each.
        """
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = _position_loss(start_logits, start_positions)
            loss = (loss + _position_loss(end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=encoded.hidden_states,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class M2BertForMultipleChoice(M2BertPreTrainedModel):
    """The encoder with a pooler and a score for each of several texts, as for SWAG.

    Args:
        config: The model's configuration; `classifier_pooling` and `classifier_dropout` shape the
            head.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.model = M2BertModel(config)
        self.pooler = M2BertPooler(config)
        self.dropout = _classifier_dropout(config)
        self.choice_scorer = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """Score choices.

        Args:
            input_ids: (B, C, L) token ids: C texts to choose from. The other inputs have a
                dimension of choices too, and are otherwise as in `M2BertModel.forward`.
            labels: (B,) indices of the right choices.

        Returns:
            `loss` if labels are given, and `logits` (B, C).
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.ndim != (3 if inputs_embeds is None else 4):
            raise ValueError(
                "M2BertForMultipleChoice needs input_ids (batch, choices, length) or "
                "inputs_embeds (batch, choices, length, hidden_size), not "
                f"{None if given is None else tuple(given.shape)}"
            )
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = self.pooler(encoded.last_hidden_state, attention_mask)
        logits = self.choice_scorer(self.dropout(pooled)).view(-1, given.shape[1])
        output = MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _load_tensors(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _keeps_spectra(nbytes: int, device: torch.device) -> bool:
    """Return whether the spectra of all filters stay from a forward pass to its backward pass.

    To transform the filters once more takes longer than to read what is there, but no memory.

    Args:
        nbytes: What the spectra take, as much as the taps.
        device: Where they are.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if device.type != "cuda":
        return nbytes <= 1 << 30
    return nbytes <= torch.cuda.get_device_properties(device).total_memory // 16


def _classifier_dropout(config: M2BertConfig) -> nn.Dropout:
    dropout = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy of (B, L) logits; positions (B,) or (B, 1) outside have none."""
    positions = positions.flatten()
    inside = (positions >= 0) & (positions < logits.shape[1])
    return _mean_cross_entropy(logits, positions.where(inside, IGNORE_INDEX))


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of (..., V) logits; 0, with gradients, if there are no labels.

    Labelled positions are not indexed: their number would break the graph of `torch.compile`.
    """
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _wants_dict(return_dict: bool | None, config: Any) -> bool:
    # `use_return_dict` says the same, with a warning in transformers 5.
    default = config.return_dict and not getattr(config, "torchscript", False)
    return default if return_dict is None else return_dict
