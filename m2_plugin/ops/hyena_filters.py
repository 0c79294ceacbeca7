"""The taps of Hyena filters (arXiv 2302.10866, section 3.3), many filters at once.

Dimension key: G filters, L sequence, D channels, E positional features, O order.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from m2_plugin.ops.backend import use_kernel
from m2_plugin.ops.fixed import declare_fixed
from m2_plugin.ops.gradients import once_differentiable
from m2_plugin.ops.reference.hyena_filters import MAX_ORDER, OP, Sizes, hyena_filters_torch, unpack


class MLPWeights(NamedTuple):
    """The weights of one MLP from positional features to taps."""

    w1: Tensor  # (O, E)
    b1: Tensor  # (O,)
    w2: Tensor  # (O, O)
    b2: Tensor  # (O,)
    w3: Tensor  # (O, O)
    b3: Tensor  # (O,)
    out: Tensor  # (D, O)


class FilterWeights(NamedTuple):
    """The parameters of one filter."""

    z: Tensor  # (H, E), the positional features of H ≥ L positions
    freq: Tensor  # (O,)
    skip: Tensor  # (D,), added to the tap at lag 0
    fwd: MLPWeights  # for lags 0 … L − 1
    rev: MLPWeights | None  # for lags −1 … −L; None for a causal filter

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all parameters."""
        return self.z, self.freq, self.skip, *self.fwd, *(self.rev or ())


def pack(filters: Sequence[FilterWeights], length: int, before: int) -> tuple[Tensor, Sizes]:
    """Copy the weights of filters of equal sizes into one tensor, in the order of `Packed`.

    Args:
        filters: The filters.
        length: L.
        before: Number of negative lags, L − 1 or L.

    Returns:
        The tensor, in one dimension, and what `unpack` needs.
    """
    first = filters[0]
    mlps = [mlp for f in filters for mlp in (f.fwd, f.rev) if mlp is not None]
    channels, order = first.fwd.out.shape
    directions = len(mlps) // len(filters)
    sizes = Sizes(len(filters), directions, length, channels, first.z.shape[1], order, before)
    w1, b1, w2, b2, w3, b3, out = zip(*mlps, strict=True)
    parts = *w2, *w3, *out, *w1, *b1, *b2, *b3, *(f.freq for f in filters)
    parts = *parts, *(f.skip for f in filters), *(f.z for f in filters)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.cat([t.reshape(-1) for t in _shortened(parts, sizes)]), sizes
    if not torch.is_grad_enabled():
        packed: Tensor = _flatten_dense_tensors(_shortened(parts, sizes))
        return packed, sizes
    return _Pack.apply(sizes, *parts), sizes


def _shortened(parts: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """Return the parts with the features of the first L positions only."""
    if len(parts[-1]) == sizes.length:
        return list(parts)
    return [*parts[: -sizes.filters], *(z[: sizes.length] for z in parts[-sizes.filters :])]


class _Pack(torch.autograd.Function):
    """A cat of flattened tensors. As single views, hundreds of weights would keep the host busy."""

    @staticmethod
    def forward(ctx: Any, sizes: Sizes, *parts: Tensor) -> Tensor:
        ctx.sizes, ctx.positions = sizes, len(parts[-1])
        packed: Tensor = _flatten_dense_tensors(_shortened(parts, sizes))
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *kinds, z = unpack(grad, ctx.sizes)
        if ctx.sizes.length < ctx.positions:
            z = F.pad(z, (0, 0, 0, ctx.positions - ctx.sizes.length))
        return None, *(one for kind in (*kinds, z) for one in kind.unbind(0))


class KeptTaps(NamedTuple):
    """Taps between calls, and the values that they were computed from."""

    packed: Tensor
    taps: tuple[Tensor, ...]
    nbytes: int  # of taps and spectra


class TapsKeeper:
    """Keeps taps between passes, in evaluation on a GPU, as long as their weights' values stay.

    Values are compared in every pass: an address or a version counter does not tell whether
    somebody wrote through `.data`. The answer comes from the GPU. If the host waited for it at
    once, the GPU would wait for the host afterwards. So kept taps are returned as if they held, and
    whoever has used them asks `outdated` at last. Kept taps are fixed (`fixed.py`): their spectra
    are kept, too. Copies and pickles of a keeper are empty.

    Args:
        limit: Most bytes to keep; by default an eighth of the GPU's memory, but 1 GiB at least (the
            12 layers of a base model at 32,768 positions take 9 GiB). If it is reached, groups of
            another length give way.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.kept: dict[Hashable, KeptTaps] = {}
        self._asked = threading.local()  # comparisons of this thread's pass

    def __reduce__(self) -> tuple[type["TapsKeeper"], tuple[int | None]]:
        return TapsKeeper, (self.limit,)

    def clear(self) -> None:
        """Let go of all taps."""
        with _LOCK:
            self.kept.clear()

    def taps(
        self, key: Hashable, packed: Tensor, sizes: Sizes, compute: Callable[[], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the taps of packed weights, for `key` and the current stream.

        They hold unless `outdated` is true in the end. Other streams have taps of their own,
        because nothing would order their kernels.
        """
        device = packed.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        where = sizes, stream, device, key
        with _LOCK:
            kept = self.kept.get(where)
            if kept is not None:
                # As integers: NaNs are equal to themselves.
                same = (packed.view(torch.int32) == kept.packed.view(torch.int32)).all()
                self._comparisons().append((where, _Answer(same)))
                return kept.taps
            together = compute()
            taps = together.unbind(0)
            size = _with_spectra(together.nbytes)
            if self._make_room(size, sizes.length, device):
                declare_fixed(*taps)
                self.kept[where] = KeptTaps(packed, taps, size)
            return taps

    def outdated(self) -> bool:
        """Return whether some of the taps that this thread got since the last call do not hold.

        They are no longer kept then: `taps` computes them.
        """
        asked, self._asked.comparisons = self._comparisons(), []
        wrong = [where for where, answer in asked if not answer.read()]
        with _LOCK:
            for where in wrong:
                self.kept.pop(where, None)
        return bool(wrong)

    def _comparisons(self) -> list[tuple[Hashable, "_Answer"]]:
        if not hasattr(self._asked, "comparisons"):
            self._asked.comparisons = []
        found: list[tuple[Hashable, _Answer]] = self._asked.comparisons
        return found

    def fits(self, taps_bytes: int, device: torch.device) -> bool:
        """Return whether so many bytes of taps may stay on a device, with their spectra."""
        return _with_spectra(taps_bytes) <= self._most(device)

    def _most(self, device: torch.device) -> int:
        if self.limit is not None:
            return self.limit
        if device.type != "cuda":
            return 1 << 30
        return max(1 << 30, torch.cuda.get_device_properties(device).total_memory // 8)

    def _make_room(self, size: int, length: int, device: torch.device) -> bool:
        most = self._most(device)
        others = [where for where in self.kept if where[0].length != length]  # type: ignore[index]
        while (full := sum(k.nbytes for k in self.kept.values()) + size > most) and others:
            del self.kept[others.pop(0)]
        return not full


class _Answer:
    """A number of the GPU that comes to the host as soon as the GPU has it, and not later."""

    def __init__(self, value: Tensor):
        self.value, self.there = value, None
        if value.is_cuda:
            # A plain read would come after all that is launched until then.
            self.value = torch.empty_like(value, device="cpu", pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record(torch.cuda.current_stream(value.device))

    def read(self) -> Any:
        """Wait for it and return it."""
        if self.there is not None:
            self.there.synchronize()
        return self.value.item()


def _with_spectra(taps_bytes: int) -> int:
    """Return the bytes of taps and of their spectra, which are about as large."""
    return 2 * taps_bytes


_LOCK = threading.Lock()


def hyena_filters(
    filters: Sequence[FilterWeights],
    scale: Tensor,
    rates: Tensor,
    w_mod: float = 1.0,
    before: int | None = None,
    backend: str = "auto",
    keeper: TapsKeeper | None = None,
    key: Hashable = None,
) -> tuple[Tensor, ...]:
    """Compute the taps of filters of equal sizes, ordered by lag, with the skip at lag 0.

    With h = z, and three times h ← sin(w_mod · freq · (W·h + b)), the tap at lag t ≥ 0 of channel
    d is `(out · h[t])[d] · exp(−scale[t] · rates[d])`; the one at lag −t − 1 likewise, from the
    reverse MLP. The kernel computes in fp32 whatever PyTorch's settings for TF32 are.

    Args:
        filters: G filters, each with its own weights, all fp32 (or fp64 in PyTorch).
        scale: (L,), the window's exponent by position.
        rates: (D,), the window's exponent by channel.
        w_mod: Constant factor on the frequencies.
        before: Number of negative lags: L − 1, the default, is what a convolution needs.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.
        keeper: Where a kernel's taps are kept, for calls without gradients. Nothing may write to
            the result, which holds unless `keeper.outdated()` is true afterwards.
        key: Tells these filters, and their `scale`, `rates` and `w_mod`, from others of `keeper`.

    Returns:
        G times (D, before + L), lags −before … L − 1; zeros at the negative lags of a causal
        filter.

    Raises:
        RuntimeError: If `backend` is `triton` and it cannot run on these weights.
    """
    length = len(scale)
    packed, sizes = pack(filters, length, length - 1 if before is None else before)
    if sizes.order > MAX_ORDER:
        if backend == "triton":
            raise RuntimeError(
                f"backend 'triton' cannot run {OP}: the order is {sizes.order}, and the kernel "
                f"takes at most {MAX_ORDER}"
            )
    elif use_kernel(backend, OP, packed):
        from m2_plugin.ops.kernels.hyena_filters import hyena_filters_op

        def compute() -> Tensor:
            taps: Tensor = hyena_filters_op(
                packed, scale, rates, list(sizes), w_mod, backend == "triton"
            )
            return taps

        if keeper is not None and may_keep(packed):
            return keeper.taps(key, packed, sizes, compute)
        return compute().unbind(0)
    return hyena_filters_torch(packed, scale, rates, sizes, w_mod).unbind(0)


def may_keep(x: Tensor) -> bool:
    """Return whether taps may outlive a call with x: not where a graph would refer to them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or type(x) is not Tensor  # a fake tensor has no values
        or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
