"""`fused_decoupled_adamw` against Composer's optimizer, which it replaces."""

import copy

import composer.optim
import pytest
import torch
from llmfoundry.utils.builders import build_optimizer

from m2_plugin.foundry.optimizers import DecoupledAdamW

KEYS = {"lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 1e-2}
# Of lr in a few steps: a warm-up from 0, and a decay.
SCHEDULE = [0.0, 0.5, 1.0, 1.0, 0.7, 0.1]


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)
    )


def build(name, **keys):
    net = model()
    return net, build_optimizer(net, name, copy.deepcopy({**KEYS, **keys}))


def steps(net, optimizer, schedule, seed=1):
    """Train on two microbatches a step, with Composer's way to set the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for factor in schedule:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()
        for _ in range(2):
            net(torch.randn(32, 8, generator=generator)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def assert_same(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weight_decay": 0.0},
        {"amsgrad": True},
        {"param_groups": [{"param_str_match": "bias", "lr": 1e-3, "weight_decay": 0.1}]},
        {"param_groups": [{"param_str_match": "bias", "lr": 0.0}]},
        {"disable_grad": "bias"},
    ],
    ids=["plain", "no_decay", "amsgrad", "groups", "zero_lr", "frozen"],
)
def test_it_updates_as_composers_does(keys):
    (ours, fused), (theirs, plain) = (
        build(name, **keys) for name in ("fused_decoupled_adamw", "decoupled_adamw")
    )
    assert type(fused) is DecoupledAdamW and type(plain) is composer.optim.DecoupledAdamW
    start = copy.deepcopy(ours)
    steps(ours, fused, SCHEDULE)
    steps(theirs, plain, SCHEDULE)
    assert_same(ours, theirs)
    assert not torch.allclose(ours[0].weight, start[0].weight, atol=1e-3)


def test_weight_decay_follows_the_schedule_and_not_the_learning_rate():
    """Without a gradient to speak of, a step multiplies weights by 1 − weight_decay · factor."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = DecoupledAdamW([weight], lr=1e-4, weight_decay=0.1, eps=1.0)
    optimizer.param_groups[0]["lr"] = 0.5e-4
    weight.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize("first", ["decoupled_adamw", "fused_decoupled_adamw"])
@pytest.mark.parametrize("second", ["decoupled_adamw", "fused_decoupled_adamw"])
def test_either_resumes_from_the_others_state(first, second):
    whole, optimizer = build("decoupled_adamw")
    steps(whole, optimizer, SCHEDULE)
    steps(whole, optimizer, SCHEDULE, seed=2)
    net, optimizer = build(first)
    steps(net, optimizer, SCHEDULE)
    resumed, other = build(second)
    assert type(other).__qualname__ == type(optimizer).__qualname__  # Composer looks for it
    resumed.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(resumed, other, SCHEDULE, seed=2)
    assert_same(resumed, whole)


def test_states_are_those_of_composers():
    states = []
    for name in ("fused_decoupled_adamw", "decoupled_adamw"):
        net, optimizer = build(name)
        steps(net, optimizer, SCHEDULE)
        states.append(optimizer.state_dict())
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-5, atol=1e-8)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_steps_wait_for_no_device(monkeypatch):
    """Composer's reads each parameter's step count, which on a GPU waits for all that is queued."""
    net, optimizer = build("fused_decoupled_adamw")
    read = []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(self) or 1.0)
    steps(net, optimizer, [1.0])
    assert not read
    net, optimizer = build("decoupled_adamw")
    steps(net, optimizer, [1.0])
    assert len(read) == len(list(net.parameters()))


def test_a_closure_gives_the_loss():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = DecoupledAdamW([weight], lr=0.1)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (weight < 1).all()


@pytest.mark.gpu
def test_it_updates_as_composers_does_on_a_gpu():
    (ours, fused), (theirs, plain) = (
        (net := model().cuda(), cls(net.parameters(), **KEYS))
        for cls in (DecoupledAdamW, composer.optim.DecoupledAdamW)
    )
    for _ in range(5):
        x = torch.randn(32, 8, device="cuda")
        for net, optimizer in ((ours, fused), (theirs, plain)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert_same(ours, theirs)
