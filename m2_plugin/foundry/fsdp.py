"""What the host's FSDP is told of a model: its units, their precision, its initial weights."""

import os
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecision
from torch.distributed.tensor import DTensor, distribute_tensor

from m2_plugin.foundry.private import FSDP_SETTINGS
from m2_plugin.layers.long_conv import HyenaFilter

__all__ = ["MetaInitializer", "keep_filters_fp32", "prepare_for_fsdp"]


def _layer_class(model: nn.Module) -> type[nn.Module]:
    """Class of the encoder's layers: the element type of the largest list of equal modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if len({type(layer) for layer in m}) == 1]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of layers to shard by.")
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return type(largest[0])


def prepare_for_fsdp(model: Any) -> None:
    """Tell Composer what to shard and checkpoint: one unit per encoder layer and filter.

    Embeddings and heads stay in the root unit, so that tied weights share one. The host's
    function of this purpose knows decoders only.
    """
    layer_class = _layer_class(model)

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, layer_class)

    def unit(module: nn.Module) -> bool | dict[str, Any]:
        return getattr(module, FSDP_SETTINGS, is_layer(module))

    keep_filters_fp32(model)
    model.fsdp_wrap_fn = unit
    model.activation_checkpointing_fn = is_layer


def keep_filters_fp32(model: nn.Module) -> None:
    """Let no `mixed_precision` of the host round the parameters of long convolutions' filters.

    FSDP casts a unit's parameters before its forward pass, with Composer's default too, and bf16
    has 8 bits for a position among thousands. So each filter is a unit of its own: of FSDP1 one
    that casts nothing; of FSDP2, where Composer has one precision for all, one that refuses.

    Args:
        model: Its filters get the attribute by which the host's MPT, and `prepare_for_fsdp`, tell
            the units with settings of their own.
    """
    version = os.environ.get("FSDP_VERSION", "1")  # as Composer decides
    for module in model.modules():
        if isinstance(module, HyenaFilter):
            fsdp1, fsdp2 = {"mixed_precision": MixedPrecision()}, {"reshard_after_forward": True}
            setattr(module, FSDP_SETTINGS, fsdp2 if version == "2" else fsdp1)
            module.register_forward_pre_hook(_refuse_rounded)


def _refuse_rounded(module: nn.Module, _: Any) -> None:
    dtype = next(module.parameters()).dtype
    if isinstance(module, FSDPModule) and dtype.itemsize < 4:
        raise ValueError(
            "fsdp_config.mixed_precision rounds the parameters of the long convolutions' filters "
            f"to {dtype}, too coarse for positions. Under FSDP2 set it to FULL, or to "
            "{reduce_dtype: bf16} if gradients may travel rounded; products are in the trainer's "
            "precision all the same. FSDP1 takes any setting: it leaves filters in fp32."
        )


class MetaInitializer:
    """What FSDP calls on each module after giving its meta parameters storage.

    Parameters and buffers get what the CPU would have drawn from the same seed: the model is built
    once more, there, from the random state that its building on the meta device began with. Each
    rank has it in memory until the last module is filled; `init_device: mixed` costs one rank that.

    Args:
        model: The model on the meta device, complete.
        build: Builds it on the CPU.
        rng_state: torch's random state to build from.
    """

    def __init__(self, model: nn.Module, build: Any, rng_state: Tensor):
        self.build = build
        self.rng_state = rng_state
        self.names = {module: name for name, module in model.named_modules()}
        self.source: nn.Module | None = None
        self.waiting: set[nn.Module] = set()
        seen: set[int] = set()
        for module in model.modules():
            new = {id(tensor) for tensor in _own_tensors(module) if tensor.is_meta} - seen
            if new:  # what is tied to a module before it comes with that one
                self.waiting.add(module)
            seen |= new

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Fill a module's own parameters and buffers, which have storage: whole, or DTensors."""
        if module not in self.names:
            raise ValueError(
                f"{type(module).__name__} was put into the model after it was built on the meta "
                "device, and has no initial values: set model.init_device to cpu or mixed."
            )
        if self.source is None:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.rng_state)
                self.source = self.build()
        source = self.source.get_submodule(self.names[module])
        for target, value in zip(_own_tensors(module), _own_tensors(source), strict=True):
            if isinstance(target, DTensor):
                value = distribute_tensor(
                    value.to(target.device),
                    target.device_mesh,
                    target.placements,
                    src_data_rank=None,  # every rank has it: nothing to send
                )
            target.copy_(value)
        self.waiting.discard(module)
        if not self.waiting:
            self.source = None


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
