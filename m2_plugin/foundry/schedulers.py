"""The learning-rate schedule `warmup_stable_decay`; llm-foundry has constant, cosine and others."""

import math
from collections.abc import Callable

from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler, LinearScheduler

from m2_plugin.foundry.private import convert_time

__all__ = ["DECAYS", "WarmupStableDecayScheduler"]

# What is left of the decay after a share of it, from 1 at 0 to 0 at 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda share: 1 - math.sqrt(share),
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


class WarmupStableDecayScheduler(ComposerScheduler):
    """Warm up linearly, stay constant, and decay at the end (WSD, arXiv 2404.06395).

    The factor on the learning rate at time t of a run of length T is

        t / t_warmup                                                   if t < t_warmup
        1                                                              if t < T - t_decay
        alpha_f + (1 - alpha_f) · decay((t - (T - t_decay)) / t_decay)    else

    Before the decay the factor does not depend on T, if `t_warmup` is not a share of it. So one run
    gives models of several lengths: load a checkpoint of the constant phase, set a later
    `max_duration`, and training continues as if that had been its length from the start. The decay
    `1-sqrt` gave the lowest losses in Hägele et al. (arXiv 2405.18392), with 10 to 20% of the run.

    Args:
        t_warmup: How long to warm up: `1000ba`, `0.06dur`, or another of Composer's times.
        t_decay: How long to decay, at the end, in the unit of `max_duration` or as a share
            (`dur`). Epochs count as batches.
        decay: `1-sqrt`, `linear` or `cosine`.
        alpha_f: The factor at the end, from 0 to 1.
        scale_warmup: Whether `scale_schedule_ratio` applies to `t_warmup` too, as in Composer's
            schedulers. It always applies to `t_decay`, and to shares (`dur`) through
            `max_duration`.

    Raises:
        ValueError: If a value is out of range; and at the start of the run if the units differ or
            the warm-up and the decay do not fit in the run.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        t_decay: str | Time,
        decay: str = "1-sqrt",
        alpha_f: float = 0.0,
        scale_warmup: bool = False,
    ):
        if decay not in DECAYS:
            raise ValueError(f"scheduler.decay must be one of {', '.join(DECAYS)}, got {decay!r}.")
        if isinstance(alpha_f, bool) or not 0 <= alpha_f <= 1:
            raise ValueError(f"scheduler.alpha_f must be a number from 0 to 1, got {alpha_f!r}.")
        self.t_warmup = _time("t_warmup", t_warmup)
        self.t_decay = _time("t_decay", t_decay)
        self.decay = decay
        self.alpha_f = alpha_f
        self.scale_warmup = scale_warmup
        self.warmup = LinearScheduler(alpha_i=0.0, alpha_f=1.0, t_max=self.t_warmup)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Return the factor on the learning rate at the state's time.

        Args:
            state: The trainer's state, whose `max_duration` `ssr` has scaled already.
            ssr: Composer's scale schedule ratio.
        """
        warmup_ratio = ssr if self.scale_warmup else 1.0
        t_warmup = convert_time(self.t_warmup, state, warmup_ratio)
        t_decay = convert_time(self.t_decay, state, ssr)
        end = convert_time("1dur", state)
        self._check(t_warmup, t_decay, end)
        if state.timestamp < t_warmup:
            return self.warmup(state, warmup_ratio)
        into = state.timestamp.get(end.unit).value - (end.value - t_decay.value)
        if into <= 0:
            return 1.0
        left = DECAYS[self.decay](min(1.0, into / t_decay.value))
        return self.alpha_f + (1 - self.alpha_f) * left

    def _check(self, t_warmup: Time, t_decay: Time, end: Time) -> None:
        if t_decay.unit != end.unit:
            raise ValueError(
                f"scheduler.t_decay {self.t_decay.to_timestring()} is not in the unit of "
                f"max_duration {end.to_timestring()}: give it in {end.unit.value}, or as a share "
                "such as 0.1dur."
            )
        if t_decay.value + (t_warmup.value if t_warmup.unit == end.unit else 0) > end.value:
            raise ValueError(
                f"scheduler.t_warmup {self.t_warmup.to_timestring()} and scheduler.t_decay "
                f"{self.t_decay.to_timestring()} do not fit in max_duration {end.to_timestring()}: "
                "make them shorter, or the run longer."
            )


def _time(key: str, value: str | Time) -> Time:
    """Parse a time, and refuse what no schedule can use."""
    try:
        time = Time.from_input(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"scheduler.{key} {value!r} is not a time such as 1000ba.") from error
    if time.unit == TimeUnit.SECOND or time.value < 0:
        raise ValueError(
            f"scheduler.{key} must be at least 0, in ba, ep, sp, tok or dur, got {value!r}."
        )
    return time
