"""Several casts at once are the casts one by one."""

import pytest
import torch

from m2_plugin.ops.cast import cast_together


def tensors(*needs_grad: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5), (7,), (2, 1, 4)
    return [
        torch.randn(shape, generator=generator).requires_grad_(need)
        for shape, need in zip(shapes, needs_grad, strict=True)
    ]


@pytest.mark.parametrize("needs_grad", [(True, True, True), (True, False, True)])
def test_values_and_gradients_equal_those_of_single_casts(needs_grad):
    given, alone = tensors(*needs_grad), tensors(*needs_grad)
    found = cast_together([given[0], None, *given[1:]], torch.bfloat16)
    assert found.pop(1) is None
    wanted = [x.to(torch.bfloat16) for x in alone]
    weights = [torch.randn_like(x) for x in wanted]
    for own, theirs in zip(found, wanted, strict=True):
        assert torch.equal(own, theirs) and own.requires_grad == theirs.requires_grad
    for results in (found, wanted):
        sum((y * w).sum() for y, w in zip(results, weights, strict=True)).backward()
    for own, theirs in zip(given, alone, strict=True):
        assert (own.grad is None) == (theirs.grad is None)
        if own.grad is not None:
            assert own.grad.dtype == torch.float32 and torch.equal(own.grad, theirs.grad)


def test_a_result_that_nobody_uses_has_no_gradient():
    given = tensors(True, True, True)
    cast_together(given, torch.bfloat16)[1].sum().backward()
    assert [x.grad is None for x in given] == [True, False, True]


def test_tensors_of_the_dtype_are_returned_as_they_are():
    x, y = torch.randn(3, dtype=torch.bfloat16), torch.randn(4)
    found = cast_together([x, y], torch.bfloat16)
    assert found[0] is x and torch.equal(found[1], y.to(torch.bfloat16))
    assert cast_together([x, None], torch.bfloat16) == [x, None]
    assert cast_together([], torch.bfloat16) == []


def test_tensors_of_several_dtypes():
    x, y = torch.randn(3), torch.randn(4, dtype=torch.float16)
    found = cast_together([x, y], torch.bfloat16)
    assert [z.dtype for z in found] == [torch.bfloat16] * 2
    assert torch.equal(found[0], x.to(torch.bfloat16)) and torch.equal(found[1], y.bfloat16())


def test_one_copy_for_all():
    given = tensors(True, True, True)
    with torch.profiler.profile() as profile:
        found = cast_together(given, torch.bfloat16)
        torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    names = [event.name for event in profile.events()]
    assert names.count("aten::_foreach_copy_") == 2 and "aten::_to_copy" not in names


def test_without_gradients():
    given = tensors(True, False, True)
    with torch.no_grad():
        found = cast_together(given, torch.bfloat16)
    for own, x in zip(found, given, strict=True):
        assert torch.equal(own, x.to(torch.bfloat16)) and not own.requires_grad


def test_it_compiles():
    given, alone = tensors(True, True, True), tensors(True, True, True)
    compiled = torch.compile(
        lambda *x: sum(y.sum() for y in cast_together(x, torch.bfloat16)), backend="aot_eager",
        fullgraph=True,
    )  # fmt: skip
    compiled(*given).backward()
    sum(x.to(torch.bfloat16).sum() for x in alone).backward()
    for own, theirs in zip(given, alone, strict=True):
        assert torch.equal(own.grad, theirs.grad)
