"""Settings of a model for Composer's FSDP: its units, their precision and initial weights."""

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
    """Return the class of the encoder's layers: the elements of the largest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if len({type(layer) for layer in m}) == 1]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no list of equal layers, which FSDP needs to shard it."
        )
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return type(largest[0])


def prepare_for_fsdp(model: Any) -> None:
    """Tell Composer what to shard and checkpoint: one unit per encoder layer and per filter.

    Embeddings and heads stay in the root unit, so that tied weights share one. llm-foundry's own
    function for this purpose supports decoders only.
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
    """Keep the parameters of the long convolutions' filters in fp32 under FSDP.

    FSDP casts the parameters of a unit before its forward pass, also by Composer's default. The 8
    bits of bf16 cannot tell thousands of positions apart. So each filter is a separate unit. Under
    FSDP1 this unit casts nothing. Under FSDP2 Composer has one precision for all units, so the
    filter raises an error if its parameters were rounded.

    Args:
        model: A model; its filters get the attribute that MPT and `prepare_for_fsdp` read.
    """
    version = os.environ.get("FSDP_VERSION", "1")  # as Composer decides
    for module in model.modules():
        if isinstance(module, HyenaFilter):
            fsdp1, fsdp2 = {"mixed_precision": MixedPrecision()}, {"reshard_after_forward": True}
            setattr(module, FSDP_SETTINGS, fsdp2 if version == "2" else fsdp1)
            if version == "2":  # not for others: hooks keep a filter from computing its taps once
                module.register_forward_pre_hook(_refuse_rounded)


def _refuse_rounded(module: nn.Module, _: Any) -> None:
    dtype = next(module.parameters()).dtype
    if isinstance(module, FSDPModule) and dtype.itemsize < 4:
        raise ValueError(
            f"fsdp_config.mixed_precision rounds the long convolutions' filters to {dtype}, which "
            "is too coarse for positions. With FSDP2 set it to FULL, or to {reduce_dtype: bf16} to "
            "reduce gradients in bf16; matrix products keep the trainer's precision. With FSDP1 "
            "any setting works."
        )


class MetaInitializer:
    """The function that FSDP calls on each module once its meta parameters have storage.

    Parameters and buffers get the values that the CPU would draw from the same seed: the model is
    built again on the CPU, from the random state before it was built on the meta device. Every rank
    holds this copy until the last module is filled; with `init_device: mixed` only one rank does.

    Args:
        model: The complete model on the meta device.
        build: A function that builds it on the CPU.
        rng_state: torch's random state to start from.
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
            if new:  # tensors tied to an earlier module are filled with that one
                self.waiting.add(module)
            seen |= new

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Fill a module's own parameters and buffers: plain tensors or DTensors with storage."""
        if module not in self.names:
            raise ValueError(
                f"{type(module).__name__} was added after the model was built on the meta device, "
                "so it has no initial values: set model.init_device to cpu or mixed."
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
                    src_data_rank=None,  # every rank has the values: nothing is sent
                )
            target.copy_(value)
        self.waiting.discard(module)
        if not self.waiting:
            self.source = None


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
