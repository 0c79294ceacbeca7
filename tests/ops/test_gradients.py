"""Backward passes that are not differentiable."""

import pytest
import torch

from m2_plugin.ops.gradients import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        assert not torch.is_grad_enabled()
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_first_gradient(create_graph):
    x = torch.tensor([3.0, -1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(Square.apply(x).square().sum(), x, create_graph=create_graph)
    assert grad.tolist() == [108.0, -4.0]


def test_the_second_gradient_is_an_error():
    x = torch.tensor([3.0], requires_grad=True)
    (grad,) = torch.autograd.grad(Square.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
