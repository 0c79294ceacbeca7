import pytest
import torch

from m2_plugin.ops.reference.short_conv import short_conv_reference
from m2_plugin.ops.short_conv import short_conv
from tests.utils import assert_close, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sequence_last", "strided"])
@pytest.mark.parametrize("length", [1, 2, 3, 33, 128])
def test_equals_a_sum_over_taps(length, layout, dtype):
    batch, channels = 3, 10
    x = torch.randn(batch, length, channels)
    if layout == "sequence_last":
        x = torch.randn(channels, batch, length).permute(1, 2, 0)
    elif layout == "strided":
        x = torch.randn(batch, 2 * length, 2 * channels)[:, ::2, ::2]
    tensors = [x, torch.randn(channels, 3), torch.randn(channels)]
    dy = torch.randn(batch, length, channels)

    def run(fn, to):
        args = [t.to(dtype).to(to).requires_grad_() for t in tensors]
        y = fn(*args)
        return y, *gradients(y, dy.to(to), *args)

    for name, actual, exact, plain in zip(
        ("y", "dx", "dw", "db"),
        run(short_conv, dtype),
        run(short_conv_reference, torch.float64),
        run(short_conv_reference, dtype),
        strict=True,
    ):
        assert_close(name, actual, exact, plain)


def test_is_causal():
    x = torch.randn(1, 12, 4)
    weight, bias = torch.randn(4, 3), torch.randn(4)
    y = short_conv(x, weight, bias)
    x[:, 7] += 1
    changed = (short_conv(x, weight, bias) - y).abs().sum((0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7, 8, 9]
