"""Count the operations of a training step, for Composer's `speed_monitor` and its MFU.

Dimension key: B sequences, L length, D hidden size, N = 2L.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.long_conv import FilterLinear, LongConv
from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.modeling_m2_bert import IGNORE_INDEX

__all__ = ["FlopCounter"]


class FlopCounter:
    """The operations that a transformers encoder needs in training, two to a multiply-add.

    What counts is what the model's definition needs, whatever computes it:

    * matrix products, with dense and block-diagonal weights, those of the filters' MLPs included;
    * of attention, Q·K and P·V: 4·L·D per token and layer;
    * of a long convolution, real FFTs of length N at 2.5·N·log2(N) and the product of spectra: one
      FFT to and one from, for each sequence and channel, and one of the taps for each batch.

    Elementwise operations (norms, gates, activations, the short convolution, the optimizer) do not.
    The backward pass counts as twice the forward pass. What activation checkpointing computes again
    does not count, so the share of a device's peak is MFU in the sense of PaLM (arXiv 2204.02311).
    Padding counts like tokens, because the device computes it. An M2-BERT with a
    masked-language-model head decodes at the masked positions only, other models at all.

    Sizes are read when the counter is built: sharded models show parts of them only later.

    Args:
        model: The transformers model, with its head.
    """

    def __init__(self, model: Any):
        config = model.config
        is_m2 = isinstance(config, M2BertConfig)
        self.padded_length = config.padded_length if is_m2 else None
        self.decodes_masked = is_m2 and hasattr(model, "decoder")
        self.decodes_all = not is_m2 and model.get_output_embeddings() is not None
        in_layers = {id(m) for lst in _lists(model) for m in lst.modules()}
        layers = [module for module in model.modules() if id(module) in in_layers]
        others = [module for module in model.modules() if id(module) not in in_layers]
        # ALBERT computes each group of layers several times.
        repeats = config.num_hidden_layers / getattr(
            config, "num_hidden_groups", config.num_hidden_layers
        )
        self.of_layers = repeats * sum(map(_product, layers))  # per token
        self.of_head = sum(map(_product, others))  # per masked position, token or sequence
        self.filters = 2 * sum(m.weight.numel() for m in layers if isinstance(m, FilterLinear))
        self.conv_channels = sum(m.filter.channels for m in layers if isinstance(m, LongConv))
        attends = not self.conv_channels
        self.attended = 4 * config.num_hidden_layers * config.hidden_size if attends else 0

    def __call__(self, batch: Mapping[str, Any]) -> float:
        """Count the operations of a training step on a batch.

        Args:
            batch: `input_ids` of any shape (..., L); and the labels, which the masked positions are
                counted from.
        """
        shape = batch["input_ids"].shape
        sequences = math.prod(shape[:-1])
        length = self.padded_length or shape[-1]
        tokens = sequences * length
        forward = tokens * (self.of_layers + length * self.attended)
        forward += length * self.filters
        if self.conv_channels:
            fft = 2.5 * 2 * length * math.log2(2 * length)
            spectra = 6 * (length + 1)  # complex numbers, of a real FFT
            forward += self.conv_channels * (sequences * (2 * fft + spectra) + fft)
        if self.decodes_masked:
            forward += _num_masked(batch) * self.of_head
        else:
            forward += (tokens if self.decodes_all else sequences) * self.of_head
        return 3.0 * forward


def _lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    return (module for module in model.modules() if isinstance(module, nn.ModuleList))


def _product(module: nn.Module) -> int:
    """Operations of a linear map of one vector; 0 for other modules."""
    return 2 * module.weight.numel() if isinstance(module, nn.Linear | BlockDiagonalLinear) else 0


def _num_masked(batch: Mapping[str, Any]) -> int:
    if "loss_generating_tokens" in batch:
        return sum(batch["loss_generating_tokens"])
    return int((batch["labels"] != IGNORE_INDEX).sum())
