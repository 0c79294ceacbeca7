"""Makes a function an op of torch.library that is quick to call in eager mode.

`torch.compile` needs ops: it cannot look into a kernel's launch. But a call of an op takes 50 to
100 µs of the host's time, as long as the kernel runs. Outside of tracing, the function is called
itself, by way of an `autograd.Function` if a gradient is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from m2_plugin.ops.gradients import once_differentiable


class Op:
    """An op; `kernel_op` makes one.

    Args:
        name: The op's name, with its namespace.
        function: What computes it. Its annotations are the op's schema.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.function = function
        self.custom = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.custom.register_fake
        self.differentiable: type[torch.autograd.Function] | None = None

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Register a gradient, as `torch.library.register_autograd` does."""
        self.custom.register_autograd(backward, setup_context=setup_context)

        # PyTorch inspects the signature in every call of a Function with a `setup_context`.
        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {
            "forward": staticmethod(forward),
            "backward": staticmethod(once_differentiable(backward)),
        }
        name = f"{self.function.__name__}_function"
        self.differentiable = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """Call the op."""
        if _is_traced(args):
            return self.custom(*args)
        if self.differentiable is not None and torch.is_grad_enabled():
            return self.differentiable.apply(*args)
        return self.function(*args)


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Return a decorator that makes a function an op, with its namespace in `name`."""
    return lambda function: Op(name, function)


def _is_traced(args: tuple[Any, ...]) -> bool:
    """Return whether a compiler or a mode of dispatch sees the call, or a class of tensors does."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for arg in args:
        kind = type(arg)
        if kind not in _PLAIN and isinstance(arg, Tensor):
            return True
    return False


_PLAIN = (Tensor, nn.Parameter, type(None), bool, int, float)
