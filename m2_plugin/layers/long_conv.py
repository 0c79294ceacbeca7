"""Long convolution with an implicit filter.

Dimension key: B batch, L sequence, D channels, H maximum length, E positional features, O order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2_plugin.layers.plain import Watch, has_hooks
from m2_plugin.ops.backend import check_backend, use_kernel
from m2_plugin.ops.fft_conv import fft_conv, filter_spectrum, spectral_conv
from m2_plugin.ops.gated_long_conv import two_sided_taps
from m2_plugin.ops.hyena_filters import FilterWeights, MLPWeights, TapsKeeper, hyena_filters
from m2_plugin.ops.reference.hyena_filters import OP as HYENA_FILTERS

# The decay window falls to 1% of its height after 0.3 to 1.5 times the maximum length, by channel.
DECAY_TARGET = 0.01
SLOWEST_DECAY = 1.5
FASTEST_DECAY = 0.3

# Largest spectrum that a convolution keeps for inference. To compute a larger one costs little
# compared with the rest of the layer.
KEPT_SPECTRUM_BYTES = 4 << 20


def positional_features(length: int, emb_dim: int, device: torch.device | None = None) -> Tensor:
    """Return the features z of the positions: `[t, Re e^{-ifw}, Im e^{-ifw}]` (Hyena, appendix).

    Args:
        length: H, the number of positions; w = 2π·arange(H)/H and t = linspace(0, 1, H).
        emb_dim: E, odd: one linear feature, and a cosine and a sine of each of bands = (E − 1)/2
            frequencies f = linspace(1e-4, bands − 1, bands).

    Returns:
        (H, E) in fp32.

    Raises:
        ValueError: If `emb_dim` is even or less than 3.
    """
    _check_emb_dim(emb_dim)
    bands = (emb_dim - 1) // 2
    t = torch.linspace(0, 1, length, device=device)[:, None]
    w = 2 * math.pi * torch.arange(length, device=device)[:, None] / length
    f = torch.linspace(1e-4, bands - 1, bands, device=device)[None]
    return torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], dim=1)


def _check_emb_dim(emb_dim: int) -> None:
    if emb_dim < 3 or emb_dim % 2 == 0:
        raise ValueError(
            f"emb_dim must be odd and at least 3, not {emb_dim}: the features are time, and a "
            "cosine and a sine of each frequency"
        )


class FilterLinear(nn.Module):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights.

    It is no `nn.Linear`, so that adapters and quantisation for all linear layers leave filters out:
    they say how a tap depends on its lag, and small errors in them change all taps.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether to add a bias.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(±1/√in_features), as nn.Linear does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; one that is there stays if the new one is None.

        llm-foundry's `no_bias` removes the biases of all layers but nn.Linear. Those of filters are
        not meant: they shift the sines.
        """
        if param is not None or self._parameters.get(name) is None:
            super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class FilterMLP(nn.Module):
    """The MLP from positional features to taps: three hidden sine layers and a linear map.

    All layers, and both directions of a bidirectional filter, share the sine's frequencies.
    Therefore they are an argument and not a parameter here.
    """

    def __init__(self, emb_dim: int, order: int, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [FilterLinear(emb_dim, order), FilterLinear(order, order), FilterLinear(order, order)]
        )
        self.out = FilterLinear(order, channels, bias=False)

    def forward(self, z: Tensor, freq: Tensor) -> Tensor:
        """Map (L, E) with frequencies (O,) to (L, D), in the dtype of z."""
        for layer in self.layers:
            z = torch.sin(freq * layer(z))
        return self.out(z)


class HyenaFilter(nn.Module):
    """Taps of a convolution as a function of the lag (Hyena, arXiv 2302.10866, section 3.3).

    `k[t] = MLP(z[t]) · exp(−t·|δ|)` with sine activations `sin(w_mod · freq · x)`. A sequence that
    is shorter than the maximum uses the first taps; taps do not depend on the length. They are
    computed in fp32 (fp64 if the parameters are fp64), also under autocast.

    The parameters are fp32 or fp64, whatever the model's dtype is, because half precision cannot
    tell thousands of positions apart. `.half()`, `.bfloat16()` and `.to(dtype)` leave them in fp32;
    torch's default dtype and checkpoints in half precision do not change this.

    Args:
        channels: D; each has its own filter.
        max_length: H, the longest sequence.
        emb_dim: E, number of positional features, odd.
        order: O, width of the MLP.
        w: Initial frequency of the sines.
        w_mod: Constant factor on the frequencies.
        bidirectional: Whether a second MLP generates taps for negative lags.
        backend: `auto` (a Triton kernel on CUDA, else PyTorch), `torch` or `triton`.

    Raises:
        ValueError: If `emb_dim` is even or less than 3, or `backend` unknown.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        emb_dim: int = 5,
        order: int = 128,
        w: float = 10.0,
        w_mod: float = 1.0,
        bidirectional: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_backend(backend)
        self.channels = channels
        self.max_length = max_length
        self.emb_dim = emb_dim
        self.w = w
        self.w_mod = w_mod
        self.backend = backend
        _check_emb_dim(emb_dim)
        self.pos_emb = nn.Parameter(torch.empty(max_length, emb_dim))
        self.freq = nn.Parameter(torch.empty(order))
        self.fwd = FilterMLP(emb_dim, order, channels)
        self.rev = FilterMLP(emb_dim, order, channels) if bidirectional else None
        self.register_load_state_dict_pre_hook(_widen_state)
        self._apply(_unchanged)  # where torch's default dtype is a half precision
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the positional features and the frequencies; the MLPs' layers reset themselves."""
        if not self.pos_emb.is_meta:
            features = positional_features(self.max_length, self.emb_dim, self.pos_emb.device)
            with torch.no_grad():
                self.pos_emb.copy_(features)
        nn.init.constant_(self.freq, self.w)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyenaFilter":
        """Apply what moves or casts the model, but not a cast to less than fp32."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device, torch.float32) if _is_half(moved) else moved

        super()._apply(move, recurse)
        return self

    def decay(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the window `exp(−s(t)·|δ|)`, (L, D).

        It is not a buffer, which would have no values after initialisation on the meta device.
        """
        scale = self.decay_scale(length, dtype, device).unsqueeze(1)
        return torch.exp(-scale * self.decay_rates(dtype, device))

    def decay_scale(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return s(t) = t / (H − 1), (L,)."""
        return torch.linspace(0, 1, self.max_length, dtype=dtype, device=device)[:length]

    def decay_rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return `|δ|`, (D,)."""
        slowest = abs(math.log(DECAY_TARGET)) / SLOWEST_DECAY
        fastest = abs(math.log(DECAY_TARGET)) / FASTEST_DECAY
        return torch.linspace(slowest, fastest, self.channels, dtype=dtype, device=device)

    def forward(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Return the taps at lags 0 … L−1, and at −1 … −L or None, each (L, D)."""
        if self.wants_kernel() and (weights := self.weights(None)) is not None:
            taps = taps_of_filters([self], [weights], length, length)[0]  # lags −L … L−1
            k_rev = None if self.rev is None else taps[:, :length].flip(1).t()
            return taps[:, length:].t(), k_rev
        wide = dtype = torch.promote_types(self.pos_emb.dtype, torch.float32)
        if self.pos_emb.device.type == "cuda":
            wide = torch.float64  # PyTorch may multiply fp32 in TF32, which the sines amplify
        with torch.autocast(self.pos_emb.device.type, enabled=False):
            z = self.pos_emb.narrow(0, 0, length).to(wide)
            freq = self.w_mod * self.freq.to(wide)
            decay = self.decay(length, wide, z.device)
            k_fwd = (self.fwd(z, freq) * decay).to(dtype)
            k_rev = None if self.rev is None else (self.rev(z, freq) * decay).to(dtype)
        return k_fwd, k_rev

    def wants_kernel(self) -> bool:
        """Return whether a kernel shall compute the taps, if nothing speaks against it."""
        return use_kernel(self.backend, HYENA_FILTERS, self.pos_emb)

    def settings(self) -> tuple[Any, ...]:
        """Return all that the taps depend on beside the parameters."""
        sizes = self.channels, self.max_length, self.emb_dim, self.rev is None
        return type(self), *sizes, self.w_mod, self.backend

    def weights(self, skip: Tensor | None) -> FilterWeights | None:
        """Return the parameters for a kernel, or None if it must not read them.

        A kernel calls no modules. Nothing but parameters may have a part in the taps: no hook of a
        part of this filter, no other class. And all must be here, not sharded. Hooks of the filter
        itself are its caller's business.

        Args:
            skip: (D,) in fp32, to be added at lag 0; zeros if None.
        """
        if "decay" in self.__dict__ or type(self).decay is not HyenaFilter.decay:
            return None
        pos_emb, freq = self.pos_emb, self.freq
        fwd, rev = self.fwd, self.rev
        if skip is None:
            skip = freq.new_zeros(self.channels)
        order = freq.shape[0]
        mlps = [
            None if mlp is None else _mlp_weights(mlp, self.emb_dim, order, self.channels)
            for mlp in (fwd, rev)
        ]
        if (
            mlps[0] is None
            or (mlps[1] is None and rev is not None)
            or not _all_here((pos_emb, freq, skip))
            or pos_emb.shape != (self.max_length, self.emb_dim)
            or skip.shape != (self.channels,)
        ):
            return None
        return FilterWeights(pos_emb, freq, skip, mlps[0], mlps[1])


def _mlp_weights(mlp: nn.Module, emb_dim: int, order: int, channels: int) -> MLPWeights | None:
    """Return the weights of a `FilterMLP` that is nothing else."""
    if type(mlp) is not FilterMLP or "forward" in mlp.__dict__:
        return None
    # Dictionaries are quicker than attributes, and a model reads 384 weights of filters in a pass.
    layers = mlp._modules["layers"]
    if type(layers) is not nn.ModuleList:
        return None
    linears = [*layers._modules.values(), mlp._modules["out"]]
    if has_hooks(mlp, layers, *linears):  # type: ignore[arg-type]
        return None
    found: list[Tensor | None] = []
    for layer in linears:
        if type(layer) is not FilterLinear or "forward" in layer.__dict__:
            return None
        own = layer._parameters
        if "weight" in own and "bias" in own:
            found += own["weight"], own["bias"]
        else:  # attributes, as FSDP makes them
            found += layer.weight, layer.bias
    vector, square = (order,), (order, order)
    shapes = [(order, emb_dim), vector, square, vector, square, vector, (channels, order)]
    if len(found) != 8 or found.pop() is not None or not _all_here(found):
        return None
    if [t.shape for t in found] != shapes:  # type: ignore[union-attr]
        return None
    return MLPWeights(*found)  # type: ignore[arg-type]


def _all_here(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether all are ordinary tensors in fp32: not missing, quantised or sharded."""
    for t in tensors:  # noqa: SIM110, `all` takes twice the time
        if type(t) not in _ORDINARY or t.dtype is not torch.float32:  # type: ignore[union-attr]
            return False
    return True


_ORDINARY = (nn.Parameter, Tensor)


def taps_of_filters(
    filters: Sequence[HyenaFilter],
    weights: Sequence[FilterWeights],
    length: int,
    before: int,
    keeper: TapsKeeper | None = None,
    group: int = 0,
) -> tuple[Tensor, ...]:
    """Compute taps of filters of equal settings from their weights, each (D, before + L)."""
    first, z = filters[0], weights[0].z
    dtype, device = z.dtype, z.device
    scale, rates = first.decay_scale(length, dtype, device), first.decay_rates(dtype, device)
    key = group, *first.settings()
    return hyena_filters(weights, scale, rates, first.w_mod, before, first.backend, keeper, key)


def _is_half(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4


def _unchanged(t: Tensor) -> Tensor:
    return t


def _widen_state(module: HyenaFilter, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Make weights fp32 before they are loaded: with `assign=True` they replace the parameters."""
    for name, value in state_dict.items():
        if name.startswith(prefix) and isinstance(value, Tensor) and _is_half(value):
            state_dict[name] = value.float()


class Kept:
    """A filter's spectrum or taps, and the values of the parameters that it was computed from."""

    def __init__(self, value: Tensor, length: int, parameters: Sequence[Tensor]):
        self.value = value
        self.length = length
        self.values = [p.detach().clone() for p in parameters]

    def holds_for(self, length: int, parameters: Sequence[Tensor]) -> bool:
        """Return whether the length and every value are still the same.

        Values are compared, because an address or a version counter does not tell whether somebody
        wrote through `.data`. It takes a few percent of the time of computing a filter.
        """
        return length == self.length and all(
            p.dtype == value.dtype and torch.equal(p, value)
            for p, value in zip(parameters, self.values, strict=True)
        )


class LongConv(nn.Module):
    """Convolves each channel with its own filter as long as the sequence, and adds a skip.

    `y = conv(u, k) + skip · u` (arXiv 2310.12109, section 4.1). On a CPU, in evaluation mode and
    without gradients, the filter's spectrum is kept between calls as long as all parameters have
    the same values and no hook, adapter or other module has a part in the filter.

    Args:
        channels: D.
        max_length: H, the longest sequence.
        **filter_kwargs: More arguments of `HyenaFilter`.
    """

    def __init__(self, channels: int, max_length: int, **filter_kwargs: float | int | bool | str):
        super().__init__()
        self.filter = HyenaFilter(channels, max_length, **filter_kwargs)  # type: ignore[arg-type]
        self.skip = nn.Parameter(torch.empty(channels))
        self.kept: Kept | None = None  # the spectrum
        self.kept_taps: Kept | None = None
        self.examined: tuple[Watch, list[FilterWeights]] | None = None  # see `_all_weights`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the skip from the standard normal."""
        nn.init.normal_(self.skip)

    def forward(self, u: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D), L ≤ max_length.

        Raises:
            ValueError: If the sequence is longer than the filter.
        """
        length = u.shape[1]
        self._check_length(length)
        if self._can_keep_spectrum(u) and (parameters := self._parameters_alone()) is not None:
            return spectral_conv(u.float(), self._kept_spectrum(length, parameters)).to(u.dtype)
        self.kept = None
        k_fwd, k_rev = self.filter(length)
        return fft_conv(u, k_fwd, k_rev, self.skip)

    def last(self, u: Tensor) -> Tensor:
        """Return what a causal filter gives at the last position, (B, D, L) to (B, D).

        It is a sum over the lags, in fp32 or wider: O(L·D) for each row, without an FFT. On a CPU
        the taps are kept like the spectrum. Others compute them in each call: with a kernel this
        takes less time than to compare the parameters.

        Raises:
            ValueError: If the sequence is longer than the filter.
        """
        length = u.shape[-1]
        self._check_length(length)
        parameters = None
        if u.device.type == "cpu" and self._may_keep():
            parameters = self._parameters_alone()
        if parameters is None:
            self.kept_taps = None
            taps = self._reversed_taps(length)
        else:
            # A power of two, so that a text that grows needs new taps only when it has doubled.
            number = min(1 << (length - 1).bit_length(), self.filter.max_length)
            kept = self.kept_taps
            if kept is None or not kept.holds_for(number, parameters):
                self.kept_taps = kept = Kept(self._reversed_taps(number), number, parameters)
            taps = kept.value
        return (u * taps[:, -length:]).sum(-1).to(u.dtype)

    def _reversed_taps(self, length: int) -> Tensor:
        """Return the taps at lags L − 1 … 0, with the skip at lag 0, (D, L)."""
        k_fwd, _ = self.filter(length)
        taps = k_fwd.t().flip(1)
        return torch.cat([taps[:, :-1], taps[:, -1:] + self.skip.to(taps.dtype)[:, None]], dim=1)

    def taps(self, length: int) -> Tensor:
        """Return the taps with the skip, ordered by lag from −(L − 1) to L − 1, (D, 2L − 1), fp32.

        Raises:
            ValueError: If the sequence is longer than the filter.
        """
        return taps_of([self], length)[0]

    def weights(self) -> FilterWeights | None:
        """Return the parameters of filter and skip for a kernel, or None if it must not read them.

        A kernel calls no modules. So a hook, an adapter or another class rules it out, and so does
        FSDP, which gathers a filter's parameters in its call.
        """
        filter = self.filter
        kind, own = type(filter), filter.__dict__
        if (
            not isinstance(filter, HyenaFilter)
            or kind.forward is not HyenaFilter.forward
            or kind.__call__ is not nn.Module.__call__
            or "forward" in own
            or type(self) is not LongConv
            or "forward" in self.__dict__
            or has_hooks(filter, self)
            or not filter.wants_kernel()
        ):
            return None
        return filter.weights(self.skip)

    def _check_length(self, length: int) -> None:
        if length > self.filter.max_length:
            raise ValueError(
                f"The sequence has {length} positions, but the filters have only "
                f"long_conv_l_max = {self.filter.max_length}."
            )

    def _may_keep(self) -> bool:
        # A traced graph must not read this state.
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        )

    def _can_keep_spectrum(self, u: Tensor) -> bool:
        return (
            self._may_keep()
            and u.device.type == "cpu"
            and u.dtype != torch.float64
            and 8 * self.filter.channels * (u.shape[1] + 1) <= KEPT_SPECTRUM_BYTES
        )

    def _parameters_alone(self) -> list[Tensor] | None:
        """Return the parameters, or None if the filter may depend on anything else."""
        found: list[Tensor] = []
        for module in self.modules():
            own, kind = module.__dict__, type(module)
            if not (kind in FILTER_MODULES or issubclass(kind, HyenaFilter)):
                return None
            if "forward" in own or has_hooks(module):
                return None
            found += (p for p in own["_parameters"].values() if p is not None)
        return found if all(type(p) is nn.Parameter and not p.is_meta for p in found) else None

    def _kept_spectrum(self, length: int, parameters: Sequence[Tensor]) -> Tensor:
        kept = self.kept
        if kept is None or not kept.holds_for(length, parameters):
            k_fwd, k_rev = self.filter(length)
            spectrum = filter_spectrum(k_fwd, k_rev, self.skip.float())
            self.kept = kept = Kept(spectrum, length, parameters)
        return kept.value

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles get: all but what is kept."""
        return self.__dict__ | {"kept": None, "kept_taps": None, "examined": None}


def taps_of(convs: Sequence[LongConv], length: int) -> list[Tensor]:
    """Return `taps(length)` of each convolution, by one launch of a kernel where that is possible.

    Raises:
        ValueError: If the sequence is longer than the filters.
    """
    taps = batched_taps(convs, length)
    if taps is None:
        taps = []
        for conv in convs:
            k_fwd, k_rev = conv.filter(length)
            taps.append(two_sided_taps(k_fwd, k_rev, conv.skip))
    return taps


def batched_taps(
    convs: Sequence[LongConv], length: int, keeper: TapsKeeper | None = None, group: int = 0
) -> list[Tensor] | None:
    """Return the taps by one launch of a kernel; None if these filters need to be called.

    Args:
        convs: The convolutions.
        length: L.
        keeper: Where to keep the taps in evaluation without gradients; see `hyena_filters`.
        group: Tells these convolutions from others of `keeper`.

    Raises:
        ValueError: If the sequence is longer than the filters.
    """
    for conv in convs:
        conv._check_length(length)
    filters = [conv.filter for conv in convs]
    settings = filters[0].settings()
    if any(filter.settings() != settings for filter in filters[1:]):
        return None
    weights = _all_weights(convs)
    if weights is None:
        return None
    return list(taps_of_filters(filters, weights, length, length - 1, keeper, group))


def _all_weights(convs: Sequence[LongConv]) -> list[FilterWeights] | None:
    """Return `weights()` of all convolutions, or None if one has none.

    What was found stays with the first of them, for as long as nothing in the modules is replaced.
    """
    first = convs[0]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and first.examined is not None:
        watch, weights = first.examined
        if watch.holds_for(convs) and first.filter.wants_kernel():
            return weights
        first.examined = None
    found: list[FilterWeights] = []
    for conv in convs:
        weights_of_one = conv.weights()
        if weights_of_one is None:
            return None
        found.append(weights_of_one)
    if not traced:
        watch = Watch(convs)
        if watch.sees(t for one in found for t in one.tensors()):
            first.examined = watch, found
    return found


FILTER_MODULES = (LongConv, FilterMLP, FilterLinear, nn.ModuleList)  # and HyenaFilter's kinds
