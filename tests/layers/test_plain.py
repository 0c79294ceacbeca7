"""Decisions of layers that hold while their modules stay as they are."""

import copy

import pytest
import torch
from torch import nn

from m2_plugin.layers import long_conv
from m2_plugin.layers.long_conv import LongConv, batched_taps
from m2_plugin.layers.plain import Watch
from tests.utils import KERNEL_DEVICE


def convs():
    return [LongConv(8, 16, order=16, backend="triton").to(KERNEL_DEVICE) for _ in range(2)]


class Linear(nn.Linear):
    pass


def hook(*_):
    return None


def replace_class(module):
    module.__class__ = Linear


# What changes a filter's layer, or how it is called.
CHANGES = {
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().clone())),
    "no parameter": lambda m: m.register_parameter("new", None),
    "data of another shape": lambda m: setattr(m.weight, "data", m.weight.data[:1]),
    "data of another dtype": lambda m: setattr(m.weight, "data", m.weight.data.double()),
    "part": lambda m: m.add_module("part", nn.Identity()),
    "class": replace_class,
    "forward": lambda m: setattr(m, "forward", hook),
    "attribute": lambda m: setattr(m, "decay", hook),
    "pre-hook": lambda m: m.register_forward_pre_hook(hook),
    "hook": lambda m: m.register_forward_hook(hook),
    "backward hook": lambda m: m.register_full_backward_hook(hook),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(hook),
    "dictionary": lambda m: setattr(m, "_parameters", dict(m._parameters)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_watch_sees_a_change(change):
    modules = convs()
    watch = Watch(modules)
    assert watch.holds_for(modules)
    CHANGES[change](modules[1].filter.rev.layers[2])
    assert not watch.holds_for(modules)


def test_a_watch_is_for_its_modules():
    modules = convs()
    watch = Watch(modules)
    assert not watch.holds_for(modules[:1])
    assert not watch.holds_for(modules[::-1])
    modules[0].filter.rev.layers = copy.deepcopy(modules[0].filter.rev.layers)
    assert not watch.holds_for(modules)


def test_a_watch_sees_hooks_of_all_modules():
    modules = convs()
    watch = Watch(modules)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert not watch.holds_for(modules)
    finally:
        handle.remove()
    assert watch.holds_for(modules)


def test_new_values_are_no_change():
    modules = convs()
    watch = Watch(modules)
    with torch.no_grad():
        for parameter in modules[0].parameters():
            parameter.add_(1)
    assert watch.holds_for(modules)


def test_filters_are_examined_once_until_something_is_replaced(monkeypatch):
    modules = convs()
    examined = []
    usual = LongConv.weights
    monkeypatch.setattr(LongConv, "weights", lambda conv: examined.append(conv) or usual(conv))
    expected = batched_taps(modules, 16)
    assert len(examined) == 2
    for one, other in zip(expected, batched_taps(modules, 16), strict=True):
        assert torch.equal(one, other)
    assert len(examined) == 2
    layer = modules[1].filter.fwd.layers[0]
    layer.weight = nn.Parameter(layer.weight.detach() + 1)
    taps = batched_taps(modules, 16)
    assert len(examined) == 4
    assert torch.equal(taps[0], expected[0]) and not torch.equal(taps[1], expected[1])
    handle = layer.register_forward_hook(hook)
    assert batched_taps(modules, 16) is None  # the hook wants its module to be called
    handle.remove()
    assert modules[0].examined is None


def test_a_copy_examines_its_own_filters():
    modules = convs()
    batched_taps(modules, 16)
    copies = copy.deepcopy(modules)
    assert copies[0].examined is None
    with torch.no_grad():
        copies[1].skip.add_(1)
    assert not torch.equal(batched_taps(copies, 16)[1], batched_taps(modules, 16)[1])


def test_parameters_that_lie_elsewhere_are_read_anew():
    """FSDP puts views of its flat parameter in the place of parameters, new ones in each pass."""
    modules = convs()
    layer = modules[0].filter.fwd.layers[0]
    weight = layer._parameters.pop("weight")
    layer.weight = weight.detach().clone()
    first = batched_taps(modules, 16)
    assert modules[0].examined is None
    layer.weight = layer.weight + 1
    assert not torch.equal(batched_taps(modules, 16)[0], first[0])


def test_nothing_is_kept_while_a_graph_is_traced(monkeypatch):
    modules = convs()
    monkeypatch.setattr(long_conv.torch.compiler, "is_compiling", lambda: True)
    assert long_conv._all_weights(modules) is not None
    assert modules[0].examined is None
