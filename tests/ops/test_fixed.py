import gc
import weakref

import torch

from m2_plugin.ops import fixed
from m2_plugin.ops.fixed import declare_fixed, derived, is_fixed, is_reused


def twice(tensors):
    return [2 * t for t in tensors]


def test_what_comes_from_fixed_tensors_is_computed_once_for_a_key():
    x, y = torch.randn(3), torch.randn(3)
    declare_fixed(x)
    first = derived([x], "a", twice)
    assert torch.equal(first[0], 2 * x)
    assert derived([x], "a", twice)[0] is first[0]
    second = derived([x], "b", twice)  # takes the place of the first
    assert second[0] is not first[0] and derived([x], "b", twice)[0] is second[0]
    assert derived([x], "a", twice)[0] is not first[0]
    mixed = derived([x, y], "a", twice)  # y may change
    assert derived([x, y], "a", twice)[1] is not mixed[1]


def test_what_comes_from_tensors_that_were_declared_together_is_computed_at_once():
    x, y, z = torch.randn(3, 3).unbind()
    calls = []
    declare_fixed(x, y, z)

    def compute(tensors):
        calls.append(len(tensors))
        return twice(tensors)

    for first, second in ((x, y), (z, x)):
        found = derived([first, second], "a", compute)
        assert torch.equal(found[0], 2 * first) and torch.equal(found[1], 2 * second)
    assert calls == [3]
    other = torch.randn(3)
    declare_fixed(other)
    assert torch.equal(derived([y, other], "a", compute)[1], 2 * other) and calls == [3, 1]


def test_a_view_of_a_fixed_tensor_is_another():
    x = torch.randn(3)
    declare_fixed(x)
    assert is_fixed(x) and is_fixed(x.float()) and not is_fixed(x[:2]) and not is_fixed(x.view(3))
    assert is_reused(x) and not is_reused(x[:2])
    declare_fixed(x, reused=False)
    assert is_fixed(x) and not is_reused(x)


def test_results_die_with_their_tensors():
    before = len(fixed._fixed)
    x, y = torch.randn(2, 3).unbind()
    declare_fixed(x, y)
    results = [weakref.ref(t) for t in derived([x, y], "a", twice)]
    assert len(fixed._fixed) == before + 2
    del x
    gc.collect()
    assert len(fixed._fixed) == before + 1 and all(t() is not None for t in results)
    del y
    gc.collect()
    assert len(fixed._fixed) == before and all(t() is None for t in results)
