"""`warmup_stable_decay`: its values, and that a run extended before its decay is the longer run."""

import math
from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.core import Time, Timestamp, TimeUnit
from composer.models import ComposerClassifier
from llmfoundry.utils.builders import build_scheduler
from torch.utils.data import DataLoader, TensorDataset

SHAPES = {
    "1-sqrt": lambda share: 1 - math.sqrt(share),
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


def build(**keys):
    return build_scheduler("warmup_stable_decay", {"t_warmup": "10ba", "t_decay": "20ba", **keys})


def state(batch, duration="100ba", dataloader_len=None):
    length = None if dataloader_len is None else Time(dataloader_len, TimeUnit.BATCH)
    return SimpleNamespace(
        timestamp=Timestamp(batch=batch, token=batch * 1000),
        max_duration=Time.from_timestring(duration),
        dataloader_len=length,
    )


@pytest.mark.parametrize("decay", SHAPES)
def test_its_values(decay):
    schedule = build(decay=decay, alpha_f=0.1)
    assert [schedule(state(t)) for t in (0, 1, 5, 9)] == pytest.approx([0, 0.1, 0.5, 0.9])
    assert {schedule(state(t)) for t in range(10, 81)} == {1.0}
    for t in range(80, 101):
        expected = 0.1 + 0.9 * SHAPES[decay]((t - 80) / 20)
        assert schedule(state(t)) == pytest.approx(expected)
    assert schedule(state(100)) == schedule(state(101)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "keys, duration, batch, dataloader_len",
    [
        ({"t_warmup": "0.1dur", "t_decay": "0.2dur"}, "100ba", lambda t: t, None),
        ({"t_warmup": "0.1dur", "t_decay": "0.2dur"}, "4ep", lambda t: t, 25),
        ({"t_warmup": "10ba", "t_decay": "1ep"}, "4ep", lambda t: t, 25),
        ({"t_warmup": "10ba", "t_decay": "20000tok"}, "100000tok", lambda t: t, None),
    ],
)
def test_other_units(keys, duration, batch, dataloader_len):
    t_decay = 25 if keys["t_decay"] == "1ep" else 20
    plain, other = build(t_decay=f"{t_decay}ba"), build(**keys)
    for t in range(101):
        expected = plain(state(t))
        assert other(state(batch(t), duration, dataloader_len)) == pytest.approx(expected)


@pytest.mark.parametrize("scale_warmup", [True, False])
def test_scaling_the_schedule(scale_warmup):
    """Half the schedule at half the time; the warm-up only if asked, as in Composer."""
    schedule = build(scale_warmup=scale_warmup)
    for t in range(0, 101, 2):
        if scale_warmup or t >= 20:
            # Composer scales max_duration before the schedule sees it.
            assert schedule(state(t // 2, "50ba"), 0.5) == pytest.approx(schedule(state(t)))
    assert schedule(state(5, "50ba"), 0.5) == (1.0 if scale_warmup else 0.5)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"decay": "square"}, "scheduler.decay must be one of 1-sqrt, linear, cosine"),
        ({"alpha_f": 1.5}, "scheduler.alpha_f must be a number from 0 to 1, got 1.5"),
        ({"t_warmup": "soon"}, "scheduler.t_warmup 'soon' is not a time"),
        ({"t_warmup": 10}, "scheduler.t_warmup 10 is not a time"),
        ({"t_decay": "5sec"}, "scheduler.t_decay must be at least 0, in ba"),
        ({"t_decay": "-5ba"}, "scheduler.t_decay must be at least 0, in ba"),
    ],
)
def test_refuses_what_no_run_can_use(keys, message):
    with pytest.raises(ValueError, match=message):
        build(**keys)


def test_refuses_what_this_run_cannot_use():
    with pytest.raises(ValueError, match="t_decay 20ba is not in the unit of max_duration 9tok"):
        build()(state(0, "9tok"))
    with pytest.raises(ValueError, match="do not fit in max_duration 29ba"):
        build()(state(0, "29ba"))
    assert build()(state(0, "30ba")) == 0


def train(folder, duration, load_path=None):
    """Train a linear model; return its learning rates by batch, and its weights."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.randint(0, 2, (12,))
    model = ComposerClassifier(torch.nn.Linear(4, 2), num_classes=2)
    rates = {}
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), batch_size=4),
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.1),
        schedulers=build(t_warmup="3ba", t_decay="4ba"),
        max_duration=f"{duration}ba",
        save_folder=str(folder),
        save_filename="ba{batch}.pt",
        save_interval="1ba",
        load_path=load_path,
        device="cpu",
        progress_bar=False,
        seed=1,
    )
    group = trainer.state.optimizers[0].param_groups[0]
    step = trainer.state.optimizers[0].step

    def recorded(*args, **kwargs):
        rates[trainer.state.timestamp.batch.value] = group["lr"]
        return step(*args, **kwargs)

    trainer.state.optimizers[0].step = recorded
    trainer.fit()
    trainer.close()
    return rates, model.state_dict()


def test_a_run_extended_before_its_decay_is_the_longer_run(tmp_path):
    rates, weights = train(tmp_path / "long", 16)
    short, _ = train(tmp_path / "short", 9)
    assert [short[t] for t in range(6)] == [rates[t] for t in range(6)] and short[8] < rates[8]
    for batch in (2, 5):  # of the warm-up, and the last before the decay
        path = tmp_path / f"short/ba{batch}.pt"
        again, extended = train(tmp_path / f"extended{batch}", 16, str(path))
        assert again == {t: rates[t] for t in range(batch, 16)}
        assert all(torch.equal(extended[name], weights[name]) for name in weights)
