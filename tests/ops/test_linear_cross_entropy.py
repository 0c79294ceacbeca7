import pytest
import torch
import torch.nn.functional as F

from m2_plugin.ops import backend
from m2_plugin.ops.kernels import linear_cross_entropy as kernels
from m2_plugin.ops.linear_cross_entropy import linear_cross_entropy
from tests.utils import KERNEL_DEVICE, KERNEL_DTYPES, assert_close, gradients

NAMES = ("loss", "dx", "dweight", "dbias")


def inputs(rows=7, width=24, size=50, ignored=2, dtype=torch.float64):
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(size, width, dtype=dtype)
    bias, labels = torch.randn(size, dtype=dtype), torch.randint(size, (rows,))
    labels[:ignored] = -100
    return x, weight, bias, labels


def textbook(x, weight, bias, labels):
    """The definition: −log of the softmax at the label, averaged over labelled rows."""
    z = x @ weight.T if bias is None else x @ weight.T + bias
    chosen = labels != -100
    p = z[chosen].exp() / z[chosen].exp().sum(-1, keepdim=True)
    return -p.gather(1, labels[chosen, None]).log().mean()


def outcome(fn, tensors, labels, grad=1.0):
    given = [t.detach().requires_grad_() for t in tensors if t is not None]
    args = [*given, None] if len(given) == 2 else given
    loss = fn(*args, labels)
    return loss.detach(), *gradients(loss, torch.full_like(loss, grad), *given)


@pytest.mark.parametrize("has_bias", [True, False])
def test_torch_path_is_the_definition(has_bias):
    x, weight, bias, labels = inputs()
    tensors = x, weight, bias if has_bias else None
    expected = outcome(textbook, tensors, labels)
    for a, b in zip(outcome(linear_cross_entropy, tensors, labels), expected, strict=True):
        torch.testing.assert_close(a, b)


# Vocabularies of part of a tile, whole tiles, and several with a rest.
@pytest.mark.parametrize("size", [50, 64, 150])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel(size, has_bias, dtype, monkeypatch):
    """In several chunks, the last of them short; the weight in fp32, as under autocast."""
    monkeypatch.setattr(kernels, "COLUMNS", 64)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    *tensors, labels = inputs(300, 24, size, ignored=3)
    if not has_bias:
        tensors[2] = None
    x, *parameters = (None if t is None else t.float() for t in tensors)
    x, parameters = x.to(dtype), [None if t is None else t.to(dtype).float() for t in parameters]
    exact = outcome(
        linear_cross_entropy, [None if t is None else t.double() for t in (x, *parameters)], labels
    )
    plain = outcome(
        lambda x, w, b, y: linear_cross_entropy(x, w.to(dtype), b if b is None else b.to(dtype), y),
        (x, *parameters), labels,
    )  # fmt: skip

    def kernel(*args):
        return linear_cross_entropy(*args, backend="triton")

    moved = [None if t is None else t.to(KERNEL_DEVICE) for t in (x, *parameters)]
    found = outcome(kernel, moved, labels.to(KERNEL_DEVICE))
    for name, a, e, p in zip(NAMES, found, exact, plain, strict=False):
        assert_close(name, a.cpu(), e, p, atol=1e-5 if dtype == torch.float32 else 1e-3)
    assert found[1].dtype == dtype and found[2].dtype == torch.float32


def test_gradients_are_scaled_as_the_loss_is():
    """By a factor that float16 could not hold, as a scaled loss has."""
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(dtype=torch.float16))
    weight, bias = weight.float(), bias.float()

    def kernel(*args):
        return linear_cross_entropy(*args, backend="triton")

    once = outcome(kernel, (x / 64, weight, bias), labels, 1.0)
    scaled = outcome(kernel, (x / 64, weight, bias), labels, 1e-6)
    torch.testing.assert_close(scaled[2], once[2] * 1e-6)
    torch.testing.assert_close(scaled[3], once[3] * 1e-6)
    assert torch.equal(scaled[0], once[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_labels_the_loss_is_0(backend):
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(ignored=7, dtype=torch.float32))

    def loss(*args):
        return linear_cross_entropy(*args, backend=backend)

    assert all((t == 0).all() for t in outcome(loss, (x, weight, bias), labels))
    nothing = outcome(loss, (x[:0], weight, bias), labels[:0])
    assert nothing[0] == 0 and (nothing[2] == 0).all()


def test_without_gradients_none_are_computed(monkeypatch):
    asked = []
    losses = kernels._losses
    monkeypatch.setattr(
        kernels, "_losses", lambda z, y, needs: asked.append(needs) or losses(z, y, needs)
    )
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(dtype=torch.float32))
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight.requires_grad_(), bias, labels, "triton")
    assert asked == [False] and not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.T + bias, labels))


def test_fallback_gives_the_same(monkeypatch):
    monkeypatch.setattr(backend, "_failed", {"linear_cross_entropy": "broken"})
    run = kernels.run_kernel
    monkeypatch.setattr(kernels, "run_kernel", lambda op, strict, *args: run(op, False, *args))
    monkeypatch.setattr(kernels, "_compute", None)
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(dtype=torch.float32))

    def op(*args):
        return linear_cross_entropy(*args, backend="triton")

    found = outcome(op, (x, weight, bias), labels)
    for a, b in zip(found, outcome(linear_cross_entropy, (x, weight, bias), labels), strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_are_even_and_within_the_limit():
    assert kernels.chunks(4915, 30528, 2) == 2560  # two, rather than 4,396 and 519
    for rows in (1, 128, 129, 5000, 100_000):
        step = kernels.chunks(rows, 30528, 2)
        assert step % 128 == 0
        assert step * 30528 * 2 < kernels.CHUNK_BYTES + 128 * 30528 * 2
        assert -(-rows // step) <= -(-rows // (kernels.CHUNK_BYTES // (30528 * 2)))


def test_it_compiles_as_one_graph():
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(dtype=torch.float32))
    compiled = torch.compile(
        lambda *args: linear_cross_entropy(*args, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    found = outcome(compiled, (x, weight, bias), labels)
    for a, b in zip(found, outcome(linear_cross_entropy, (x, weight, bias), labels), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("label", [50, -1])
def test_an_unknown_label_makes_the_kernels_loss_nan(label):
    x, weight, bias, labels = (t.to(KERNEL_DEVICE) for t in inputs(dtype=torch.float32))
    labels[-1] = label
    loss = linear_cross_entropy(x, weight, bias, labels, backend="triton")
    assert loss.isnan()
