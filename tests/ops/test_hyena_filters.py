import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from m2_plugin.ops.fixed import is_fixed
from m2_plugin.ops.hyena_filters import FilterWeights, MLPWeights, TapsKeeper, hyena_filters
from m2_plugin.ops.kernels import hyena_filters as kernels
from m2_plugin.ops.kernels.launch import device_class
from tests.utils import KERNEL_DEVICE, assert_close, gradients, max_error


def weights(length, channels, emb_dim, order, causal):
    """One filter, with weights large enough for arguments of the sines of about ±100."""

    def mlp():
        return MLPWeights(
            torch.randn(order, emb_dim) / 2,
            torch.randn(order),
            torch.randn(order, order) / order**0.5,
            torch.randn(order),
            torch.randn(order, order) / order**0.5,
            torch.randn(order),
            torch.randn(channels, order) / order**0.5,
        )

    z, freq = torch.randn(length, emb_dim), 10 + torch.randn(order)
    return FilterWeights(z, freq, torch.randn(channels), mlp(), None if causal else mlp())


def tensors(filters):
    return [t for f in filters for t in (*f[:3], *f.fwd, *(f.rev or ()))]


def to(filters, dtype, device=KERNEL_DEVICE):
    def move(t):
        return t.to(device, dtype, copy=True).requires_grad_()

    def mlp(m):
        return None if m is None else MLPWeights(*map(move, m))

    return [FilterWeights(*map(move, f[:3]), mlp(f.fwd), mlp(f.rev)) for f in filters]


def run(filters, grad, backend, dtype, length, before, device="cpu"):
    filters = to(filters, dtype, device)
    window = torch.linspace(0, 1, length), torch.linspace(3, 15, grad.shape[1])
    window = [t.to(device, dtype) for t in window]
    taps = torch.stack(hyena_filters(filters, *window, 1.5, before, backend))
    results = taps, *gradients(taps, grad.to(taps), *tensors(filters))
    return [t.cpu() for t in results]


@pytest.mark.parametrize(
    ("num", "length", "channels", "emb_dim", "order", "causal", "full"),
    [
        (3, 70, 40, 5, 32, False, False),
        (1, 33, 17, 3, 20, False, True),
        (2, 20, 130, 7, 16, True, False),
        (1, 600, 5, 5, 16, False, False),
        (1, 1, 3, 3, 8, False, False),
        (1, 2, 1, 3, 8, True, False),
        (1, 65, 33, 5, 128, False, False),
    ],
    ids=[
        "several",
        "last_reverse_tap",
        "causal",
        "splits",
        "one_position",
        "one_mlp",
        "published_order",
    ],
)
def test_kernel(num, length, channels, emb_dim, order, causal, full):
    # More positions than the taps need: the others' features get no gradient.
    filters = [weights(length + 3, channels, emb_dim, order, causal) for _ in range(num)]
    before = length if full else length - 1
    grad = torch.randn(num, channels, before + length)
    names = ["taps", *(f"gradient {i}" for i in range(len(tensors(filters))))]
    for name, actual, exact, plain in zip(
        names,
        run(filters, grad, "triton", torch.float32, length, before, KERNEL_DEVICE),
        run(filters, grad, "torch", torch.float64, length, before),
        run(filters, grad, "torch", torch.float32, length, before),
        strict=True,
    ):
        assert actual.dtype == torch.float32
        assert_close(name, actual, exact, plain, factor=4, atol=1e-5)


def test_the_last_configurations_are_as_exact(monkeypatch):
    monkeypatch.setattr(kernels.tuning, "best", lambda op, key, candidates, *_: candidates[-1])
    test_kernel(1, 300, 20, 3, 16, False, False)
    test_kernel(1, 65, 33, 5, 128, False, False)


def test_all_configurations_give_the_same(monkeypatch):
    filters = [weights(300, 20, 3, 16, causal=False)]
    grad = torch.randn(1, 20, 599)
    results, tried = [], set()
    for last in (False, True):

        def take(op, key, candidates, run, device, last=last):
            tried.update((op, repr(c)) for c in candidates)
            # Hidden layers rounded otherwise change gradients by the factor of a frequency.
            return candidates[-1 if last and "hidden layers" not in op else 0]

        monkeypatch.setattr(kernels.tuning, "best", take)
        results.append(run(filters, grad, "triton", torch.float32, 300, 299, KERNEL_DEVICE))
    assert len(tried) == (8 if device_class(torch.device(KERNEL_DEVICE)) == "large" else 4)
    for one, other in zip(*results, strict=True):
        assert max_error(one, other) < 1e-5 * max(1.0, one.abs().max().item())


@triton.jit
def sines_kernel(x_ptr, sin_ptr, cos_ptr):
    i = tl.arange(0, 4096)
    x = tl.load(x_ptr + i)
    tl.store(sin_ptr + i, kernels.sin(x))
    tl.store(cos_ptr + i, kernels.cos(x))


@pytest.mark.parametrize(("size", "error"), [(100.0, 2e-7), (3e4, 4e-6), (1e30, 2.0)])
def test_sines_of_large_arguments(size, error):
    x = (2 * torch.rand(4096, device=KERNEL_DEVICE) - 1) * size
    sines, cosines = torch.empty_like(x), torch.empty_like(x)
    sines_kernel[(1,)](x, sines, cosines)
    assert max_error(sines, x.double().sin()) <= error
    assert max_error(cosines, x.double().cos()) <= error


def test_wider_filters_are_for_pytorch():
    filters = to([weights(3, 2, 3, 160, causal=True)], torch.float32)
    window = torch.zeros(3, device=KERNEL_DEVICE), torch.zeros(2, device=KERNEL_DEVICE)
    assert [taps.shape for taps in hyena_filters(filters, *window)] == [(2, 5)]
    with pytest.raises(RuntimeError, match="order is 160, .* at most 128"):
        hyena_filters(filters, *window, backend="triton")


class Kept:
    """A keeper and two filters, small, without gradients."""

    def __init__(self, **kwargs):
        self.keeper = TapsKeeper(**kwargs)
        self.filters = to([weights(9, 4, 3, 16, causal=False) for _ in range(2)], torch.float32)
        self.rates = torch.ones(4, device=KERNEL_DEVICE)

    @torch.no_grad()
    def taps(self, key=0, length=9, kept=True):
        scale = torch.linspace(0, 1, 9, device=KERNEL_DEVICE)[:length]
        keeper = self.keeper if kept else None
        args = self.filters, scale, self.rates, 1.0, None, "triton", keeper, key
        taps = hyena_filters(*args)
        return hyena_filters(*args) if self.keeper.outdated() else taps


def same(taps, others):
    taps, others = torch.stack(taps), torch.stack(others)
    return torch.equal(taps.nan_to_num(9), others.nan_to_num(9))


def test_kept_taps_follow_the_values():
    case = Kept()
    taps = case.taps()
    assert all(map(is_fixed, taps))
    weight = case.filters[1].rev.w2
    for value in (2.0, float("nan")):
        assert case.taps() is taps
        weight.data[3, 5] = value  # no version counter sees this
        assert case.taps() is not taps
        taps = case.taps()
        assert same(taps, case.taps(kept=False))
    assert not any(map(is_fixed, case.taps(kept=False)))


def test_whoever_used_kept_taps_learns_that_they_do_not_hold():
    case = Kept()
    first = case.taps(key=0), case.taps(key=1)
    window = torch.linspace(0, 1, 9, device=KERNEL_DEVICE), case.rates

    def taps(key):
        with torch.no_grad():
            return hyena_filters(
                case.filters, *window, backend="triton", keeper=case.keeper, key=key
            )

    case.filters[0].freq.data.mul_(2)
    assert taps(0) is first[0]
    assert case.keeper.outdated() and not case.keeper.outdated()
    assert not same(taps(0), first[0]) and not case.keeper.outdated()
    assert taps(0) is not first[0] and taps(1) is first[1]  # of which nobody asked before
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(case.keeper.outdated).result()  # it used none
    assert case.keeper.outdated()
    assert same(taps(1), taps(0))


def test_kept_taps_have_a_limit():
    case = Kept()
    case.taps()
    (kept,) = case.keeper.kept.values()
    case = Kept(limit=2 * kept.nbytes)
    for key in range(3):  # the third does not fit
        taps = case.taps(key)
        assert same(taps, case.taps(kept=False))
        assert all(map(is_fixed, taps)) == (key < 2)
    assert len(case.keeper.kept) == 2
    case.taps(length=5)  # gives way to none of another length
    assert {where[0].length for where in case.keeper.kept} == {9, 5}
    case.keeper.clear()
    assert not case.keeper.kept


def test_the_default_limit_is_a_share_of_the_memory(monkeypatch):
    some = SimpleNamespace(total_memory=64 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: some)
    keeper, cpu, gpu = TapsKeeper(), torch.device("cpu"), torch.device("cuda")
    assert keeper.fits(4 << 30, gpu) and not keeper.fits((4 << 30) + 1, gpu)
    assert keeper.fits(1 << 29, cpu) and not keeper.fits((1 << 29) + 1, cpu)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_nothing(copied):
    case = Kept(limit=12345678)
    case.taps()
    other = copied(case.keeper)
    assert case.keeper.kept and not other.kept and other.limit == 12345678


def test_taps_with_gradients_are_not_kept():
    case = Kept()
    scale = torch.linspace(0, 1, 9, device=KERNEL_DEVICE)
    taps = hyena_filters(case.filters, scale, case.rates, backend="triton", keeper=case.keeper)
    assert taps[0].requires_grad and not case.keeper.kept
