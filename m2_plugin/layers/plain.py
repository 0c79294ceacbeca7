"""When a layer may compute with a module's weights itself, rather than call the module."""

from torch import Tensor, nn
from torch.nn.modules import module as _module


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of the module would compute the forward of `kind`, and nothing else.

    A kernel takes the weights of several modules at once, and a transposed product is faster than
    the usual one. Such a computation passes by whatever belongs to the call: hooks (offloading,
    pruning), another class or `forward` (adapters), weights of a tensor class (quantisation).

    Args:
        module: The module.
        kind: The class that it must have; a subclass is something else.
    """
    own = module.__dict__
    if type(module) is not kind or "forward" in own or has_hooks(module):
        return False
    for parameter in own["_parameters"].values():  # noqa: SIM110, `all` takes twice the time
        if type(parameter) not in _ORDINARY:
            return False
    return True


_ORDINARY = (nn.Parameter, Tensor, type(None))


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether hooks would run in calls of the modules: their own, or those of all."""
    for module in modules:
        own = module.__dict__  # quicker than attributes; a model asks some hundred times in a pass
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
        ):
            return True
    return bool(
        _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_pre_hooks
        or _module._global_backward_hooks
    )
