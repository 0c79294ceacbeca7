import pytest
import torch

from m2_plugin.ops.input_projection import input_projection
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("readers", ["p", "u", "both"])
@pytest.mark.parametrize("sequence_last", [False, True], ids=["rows", "sequence_last"])
def test_equals_a_linear_map(sequence_last, readers, dtype):
    shape = 3, 20, 12
    u = torch.randn(shape, device=KERNEL_DEVICE)
    weight = torch.randn(36, 12, device=KERNEL_DEVICE)
    dp, du = torch.randn(3, 20, 36, device=KERNEL_DEVICE), torch.randn(shape, device=KERNEL_DEVICE)
    if sequence_last:
        u, du = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (u, du))

    def run(fn, to):
        args = [t.to(to).requires_grad_() for t in (u, weight)]
        p, passed = fn(*args)
        ends = {"p": [(p, dp)], "u": [(passed * 2, du)], "both": [(p, dp), (passed * 2, du)]}
        out, grads = zip(*((y, g.to(to)) for y, g in ends[readers]), strict=True)
        used = args if readers != "u" else args[:1]
        return [p, passed, *torch.autograd.grad(out, used, grads)]

    ours = run(input_projection, dtype)
    assert ours[0].permute(2, 0, 1).is_contiguous()
    assert not sequence_last or ours[2].permute(2, 0, 1).is_contiguous()
    plain = lambda u, weight: (u @ weight.t(), u)  # noqa: E731
    for i, results in enumerate(
        zip(ours, run(plain, torch.float64), run(plain, dtype), strict=True)
    ):
        assert_close(str(i), *results)


def test_frozen_weight_and_input():
    for frozen in range(2):
        args = [torch.randn(2, 5, 4), torch.randn(12, 4)]
        args[1 - frozen].requires_grad_()
        p, _ = input_projection(*args)
        (grad,) = gradients(p, torch.ones_like(p), args[1 - frozen])
        assert grad.shape == args[1 - frozen].shape
