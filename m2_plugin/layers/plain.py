"""When a layer may compute with a module's weights itself, rather than call the module."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, getitem, is_

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


HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


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
    return _has_global_hooks()


def _has_global_hooks() -> bool:
    return bool(
        _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_pre_hooks
        or _module._global_backward_hooks
    )


class Watch:
    """Tells whether modules still are what they were, so that they need not be examined anew.

    It sees other parameters, parts, classes and attributes, shapes and dtypes of parameters, and
    any hook; not new values of parameters and attributes. For the 24 filters of a base model this
    takes a fifth of the time of an examination, because no line of Python runs for each module.

    Args:
        modules: Modules without hooks.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.roots = list(modules)
        self._modules = [part for module in modules for part in module.modules()]
        self._owns = [module.__dict__ for module in self._modules]
        self._classes = list(map(type, self._modules))
        self._sizes = list(map(len, self._owns))
        self._hooks = [own[name] for own in self._owns for name in HOOKS]
        self._parameters = list(map(getitem, self._owns, repeat("_parameters")))
        self._parts = list(map(getitem, self._owns, repeat("_modules")))
        self._found = self._all_found()
        self._tensors = [found for found in self._found if isinstance(found, Tensor)]
        self._kinds = self._all_kinds()

    def holds_for(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether these are the modules, and they are as they were."""
        found = self._all_found()
        return (
            len(modules) == len(self.roots)
            and all(map(is_, modules, self.roots))
            and len(found) == len(self._found)
            and all(map(is_, found, self._found))
            and all(map(is_, map(getitem, self._owns, repeat("_parameters")), self._parameters))
            and all(map(is_, map(getitem, self._owns, repeat("_modules")), self._parts))
            and all(map(is_, map(type, self._modules), self._classes))
            and list(map(len, self._owns)) == self._sizes
            and not any(map(contains, self._owns, repeat("forward")))
            and not any(self._hooks)
            and not _has_global_hooks()
            and self._all_kinds() == self._kinds
        )

    def sees(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether all are parameters where a module registers them; FSDP moves them."""
        seen = set(map(id, self._tensors))
        return all(id(tensor) in seen for tensor in tensors)

    def _all_found(self) -> list[object]:
        dictionaries = chain(self._parameters, self._parts)
        return list(chain.from_iterable(map(dict.values, dictionaries)))

    def _all_kinds(self) -> list[object]:
        return list(map(_KIND, self._tensors))


_KIND = attrgetter("shape", "dtype")
