"""Runs a model on a GPU that is not there, and records every launch.

Tensors are fake: they have a shape, strides, a dtype and the device `cuda`, and no values. So the
model takes the paths that it takes on a GPU, under CUDA's autocast, with autograd, at any size.
PyTorch's own ops are recorded as they are dispatched. A custom op's Python body is run on the fake
tensors in turn, and its Triton kernels are compiled for the named GPU and not launched.

PyTorch's autograd asks the CUDA runtime for the device and its streams, even for fake tensors. So
the process runs with the library of `null_gpu.py`, which answers (`in_fake_process`).
"""

import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import null_gpu

# Kernels as they are without measurements on a GPU.
ENVIRONMENT = {"M2_PLUGIN_AUTOTUNE": "0", "M2_PLUGIN_KERNEL_CHECK": "0"}


def in_fake_process() -> None:
    """Start this script again with `null_gpu`, unless it has been; do not return then."""
    null_gpu.in_null_process(ENVIRONMENT)


if os.environ.get(null_gpu.LOADED):
    import torch
    import triton
    from torch import Tensor
    from torch._library.custom_ops import OPDEFS
    from torch._subclasses import fake_tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from m2_plugin.ops.backend import capability
    from m2_plugin.ops.kernels import launch
    from m2_plugin.ops.kernels.compilation import NamedTarget


@dataclass(frozen=True)
class Operand:
    """A tensor that a launch reads or writes: what decides its cost."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    width: int

    @property
    def elements(self) -> int:
        """Elements in memory: those of a broadcast dimension count once."""
        pairs = zip(self.shape, self.stride, strict=True)
        return math.prod(size if stride else 1 for size, stride in pairs)

    @property
    def bytes(self) -> int:
        return self.width * self.elements


@dataclass
class Launch:
    """One op of PyTorch, or one launch of a Triton kernel."""

    name: str
    within: str  # the custom op that launched it, or nothing
    inputs: list[Operand] = field(default_factory=list)
    outputs: list[Operand] = field(default_factory=list)
    arguments: tuple[Any, ...] = ()  # numbers of an op of PyTorch
    kernel: Any = None  # Triton's, compiled
    values: dict[str, Any] = field(default_factory=dict)  # a kernel's arguments by name
    grid: tuple[int, int, int] = (1, 1, 1)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the kernel's tensors


class Pointer:
    """A tensor as Triton sees it when it compiles: a dtype and an address."""

    def __init__(self, tensor: Any):
        self.dtype = tensor.dtype
        # An allocation begins at a multiple of 256; a view may begin anywhere in it.
        self.address = tensor.storage_offset() * tensor.element_size()
        self.operand = operand(tensor)

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


def operand(tensor: Any) -> Operand:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Operand(tuple(tensor.shape), tuple(tensor.stride()), dtype, tensor.element_size())


# Ops that launch nothing.
VIEWS = """view _unsafe_view _reshape_alias t transpose permute slice select unsqueeze squeeze
expand detach alias as_strided split split_with_sizes chunk unbind diagonal unfold view_as_real
view_as_complex empty empty_like new_empty empty_strided new_empty_strided lift_fresh narrow movedim
swapaxes set_ resize_ is_same_size sym_size device layout"""
NOTHING = frozenset(VIEWS.split())


def recorder(capability: int) -> "Recorder":
    """Make a recorder of what a GPU of this compute capability would launch."""
    return Recorder(capability)


if os.environ.get(null_gpu.LOADED):

    class Recorder(TorchDispatchMode):
        """Records launches while it is entered, within `fake_gpu`."""

        def __init__(self, capability: int):
            super().__init__()
            self.capability = capability
            self.launches: list[Launch] = []
            self.within = ""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = kwargs or {}
            space, _, name = func._schema.name.partition("::")
            if name in ("_local_scalar_dense", "is_nonzero", "item"):
                return True  # whatever is asked of values: `all(mask == 1)` and the like
            if name == "equal":
                self.launches.append(Launch(name, self.within, [operand(t) for t in args], []))
                return True
            if name == "nonzero":
                return self.positions(args[0])
            definition = OPDEFS.get(func._schema.name)
            if definition is not None:
                return self.body(definition, args, kwargs)
            if space == "aten":  # an op that is made of others, as `contiguous` is
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            out = func(*args, **kwargs)
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            on_gpu = any(t.device.type == "cuda" for t in inputs + outputs)
            if space == "prim" or name in NOTHING or not on_gpu:
                return out
            numbers = tuple(a for a in args if isinstance(a, int | float | bool))
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write and not outputs:
                    outputs = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            inputs = [t for t in inputs if t.device.type == "cuda"]
            outputs = [t for t in outputs if t.device.type == "cuda"]
            self.launches.append(
                Launch(
                    name, self.within, [operand(t) for t in inputs], [operand(t) for t in outputs],
                    numbers,
                )
            )  # fmt: skip
            return out

        chosen = 0.15  # of the labels of a batch that are not ignored

        def positions(self, mask: Any) -> Any:
            """What `nonzero` of a mask of labels would find: so many positions."""
            self.launches.append(Launch("nonzero", self.within, [operand(mask)], []))
            count = round(self.chosen * mask.numel())
            return mask.new_empty((count, mask.dim()), dtype=torch.int64)

        def body(self, definition: Any, args: Any, kwargs: Any) -> Any:
            """Run a custom op's own function, of which every launch is recorded."""
            outer, self.within = self.within, definition._qualname.partition("::")[2]
            function = definition._backend_fns.get("cuda", definition._init_fn)
            try:
                with self:
                    return function(*args, **kwargs)
            finally:
                self.within = outer

        def launch(self, function: Any, grid: Any, args: Any, kwargs: Any) -> Any:
            """Compile a Triton kernel, and record the launch."""
            given = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            named = {k: Pointer(a) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
            kernel = function.run(*given, grid=grid, warmup=True, **named)
            names = [p.name for p in function.params]
            values = {p.name: p.default for p in function.params if p.has_default}
            values |= dict(zip(names, given, strict=False)) | named
            size = grid(values) if callable(grid) else grid
            sizes = {k: v.operand.bytes for k, v in values.items() if isinstance(v, Pointer)}
            # Only the kernel says which of them it writes.
            self.launches.append(
                Launch(
                    function.fn.__name__, self.within, kernel=kernel, values=values,
                    grid=(*size, *(1,) * (3 - len(size))), sizes=sizes,
                )
            )  # fmt: skip
            return kernel

    def flash(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **_: Any
    ) -> Any:
        """SDPA without its choice of an algorithm, which asks the device: here the fast one."""
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False)[0]

    def at_once(pool: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run in this thread what is for another, which would not know that tensors are fake."""
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future

    def kind(x: Any, *of_a_new_class: Any) -> Any:
        """The class of an object; a fake tensor passes for a real one, a parameter for a parameter.

        The layers run their kernels only where every weight is an `nn.Parameter`, nothing else.
        """
        if of_a_new_class:
            return type(x, *of_a_new_class)
        if isinstance(x, fake_tensor.FakeTensor):
            return torch.nn.Parameter if isinstance(x, torch.nn.Parameter) else Tensor
        return type(x)

    @contextmanager
    def fake_gpu(recorder: Recorder) -> Iterator[None]:
        """Within, tensors made under `torch.device("cuda")` are fake, and launches are recorded."""
        major, minor = divmod(recorder.capability, 10)
        properties = types.SimpleNamespace(
            major=major, minor=minor, name="a GPU that is not there", total_memory=80 << 30,
            multi_processor_count=132, L2_cache_size=50 << 20, warp_size=32,
            shared_memory_per_block_optin=227 << 10, max_threads_per_multi_processor=2048,
        )  # fmt: skip
        attention = torch.nn.functional.scaled_dot_product_attention
        answers: dict[str, Callable[..., Any]] = {
            "get_device_capability": lambda *_: (major, minor),
            "get_device_name": lambda *_: properties.name,
            "get_device_properties": lambda *_: properties,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: False,
            "current_device": lambda: 0,
            "synchronize": lambda *_: None,
            "_lazy_init": lambda: None,
        }
        usual = {name: getattr(torch.cuda, name) for name in answers}
        triton.runtime.driver.set_active(NamedTarget(recorder.capability))
        usual_launch = launch._launch
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        capability.cache_clear()
        launch._launch = recorder.launch
        submit = ThreadPoolExecutor.submit
        ThreadPoolExecutor.submit = at_once  # type: ignore[assignment]
        torch.nn.functional.scaled_dot_product_attention = flash
        modules = [m for name, m in sys.modules.items() if name.startswith("m2_plugin")]
        for module in modules:  # a name in a module hides the builtin one
            module.type = kind  # type: ignore[attr-defined]
        try:
            with FAKE:
                yield
        finally:
            launch._launch = usual_launch
            ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
            torch.nn.functional.scaled_dot_product_attention = attention
            for module in modules:
                del module.type  # type: ignore[attr-defined]
            for name, function in usual.items():
                setattr(torch.cuda, name, function)
            capability.cache_clear()

    fake_tensor.init_gpu_context = lambda device: None  # it would allocate on the device
    FAKE = fake_tensor.FakeTensorMode(
        allow_non_fake_inputs=True
    )  # one: tensors that are kept stay valid
