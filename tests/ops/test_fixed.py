import gc

import torch

from m2_plugin.ops import fixed
from m2_plugin.ops.fixed import declare_fixed, derived, is_fixed, is_reused


def twice(*tensors):
    return lambda: [2 * t for t in tensors]


def test_what_comes_from_fixed_tensors_is_computed_once_for_a_key():
    x, y = torch.randn(3), torch.randn(3)
    declare_fixed(x)
    first = derived([x], "a", twice(x))
    assert torch.equal(first[0], 2 * x)
    assert derived([x], "a", twice(x))[0] is first[0]
    second = derived([x], "b", twice(x))  # takes the place of the first
    assert second[0] is not first[0] and derived([x], "b", twice(x))[0] is second[0]
    assert derived([x], "a", twice(x))[0] is not first[0]
    mixed = derived([x, y], "a", twice(x, y))  # y may change
    assert derived([x, y], "a", twice(x, y))[1] is not mixed[1]


def test_a_view_of_a_fixed_tensor_is_another():
    x = torch.randn(3)
    declare_fixed(x)
    assert is_fixed(x) and is_fixed(x.float()) and not is_fixed(x[:2]) and not is_fixed(x.view(3))
    assert is_reused(x) and not is_reused(x[:2])
    declare_fixed(x, reused=False)
    assert is_fixed(x) and not is_reused(x)


def test_results_die_with_their_tensors():
    before = len(fixed._fixed)
    x = torch.randn(3)
    declare_fixed(x)
    derived([x], "a", twice(x))
    assert len(fixed._fixed) == before + 1
    del x
    gc.collect()
    assert len(fixed._fixed) == before
