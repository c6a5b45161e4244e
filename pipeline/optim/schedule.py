"""Learning-rate schedules: closed forms of the step. All of them warm up linearly from 0 to the maximum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

Decay = Literal["linear", "1-sqrt", "cosine"]

_REMAINING: dict[Decay, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
"""What is left of the learning rate above the minimum after a share of the decay."""


class Settings(Protocol):
    """What a schedule depends on besides the number of steps; the section `optimizer` of a config has it."""

    schedule: Literal["cosine", "wsd", "linear", "constant", "inv_sqrt"]
    """Which one."""
    learning_rate: float
    """The maximum, reached after warm-up."""
    min_learning_rate: float
    """The minimum, reached at the end."""
    warmup_iters: int
    """Steps of warm-up."""
    cosine_cycle_iters: int | None
    """Step at which `cosine` ends; unset, the last one."""
    decay_iters: int | None
    """Steps of the decay at the end of `wsd`."""
    decay: Decay
    """Its form."""


def learning_rates(settings: Settings, max_iters: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the step, from 0.

    Args:
        settings: The section `optimizer`.
        max_iters: Steps of the whole training.
    """
    high, low, warmup = settings.learning_rate, settings.min_learning_rate, settings.warmup_iters
    match settings.schedule:
        case "cosine":
            end = settings.cosine_cycle_iters or max_iters
            return lambda it: get_lr_cosine_schedule(it, high, low, warmup, end)
        case "linear":
            return lambda it: get_lr_wsd_schedule(it, high, low, warmup, warmup, max_iters, "linear")
        case "wsd":
            start = max_iters - (settings.decay_iters or 0)
            return lambda it: get_lr_wsd_schedule(it, high, low, warmup, start, max_iters, settings.decay)
        case "constant":
            return lambda it: _warm_up(it, high, warmup)
        case "inv_sqrt":
            return lambda it: get_lr_inverse_sqrt_schedule(it, high, low, warmup)


def first_other_rate(one: Callable[[int], float], other: Callable[[int], float], steps: int) -> int | None:
    """Returns the first of so many steps at which two schedules differ; None if they agree on all."""
    return next((step for step in range(steps) if one(step) != other(step)), None)


def get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """Returns the learning rate at step `it`: linear warm-up from 0, a cosine down to the minimum, then the minimum.

        min + 0.5 * (1 + cos(pi * (it - warmup) / (end - warmup))) * (max - min)

    Source: Loshchilov & Hutter 2017, eq. 5, with one cycle; the form used by LLaMA (Touvron et al. 2023).
    """
    return get_lr_wsd_schedule(
        it, max_learning_rate, min_learning_rate, warmup_iters, warmup_iters, cosine_cycle_iters, "cosine"
    )


def get_lr_wsd_schedule(
    it: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    decay_start: int,
    decay_end: int,
    decay: Decay,
) -> float:
    """Returns the learning rate at step `it`: warm-up, stable at the maximum, decay, then the minimum.

        min + f((it - start) / (end - start)) * (max - min)  with f(x) = 1 - x, 1 - sqrt(x) or 0.5 * (1 + cos(pi * x))

    Source: Hu et al. 2024, "MiniCPM"; `1-sqrt` is from Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations"; a linear decay without a stable part is that of Bergsma et al. 2025, "Straight to
    Zero".
    """
    if it < warmup_iters:
        return _warm_up(it, max_learning_rate, warmup_iters)
    if it >= decay_end:
        return min_learning_rate
    if it < decay_start:
        return max_learning_rate
    done = (it - decay_start) / (decay_end - decay_start)
    return min_learning_rate + _REMAINING[decay](done) * (max_learning_rate - min_learning_rate)


def get_lr_inverse_sqrt_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int
) -> float:
    """Returns the learning rate at step `it`: warm-up, then the inverse square root of the step.

        max(min, max * sqrt(warmup / it))

    Source: Vaswani et al. 2017, section 5.3, scaled so that warm-up ends at the maximum.
    """
    if it < warmup_iters:
        return _warm_up(it, max_learning_rate, warmup_iters)
    return max(min_learning_rate, max_learning_rate * math.sqrt(max(1, warmup_iters) / max(1, it)))


def _warm_up(it: int, max_learning_rate: float, warmup_iters: int) -> float:
    return it / warmup_iters * max_learning_rate if it < warmup_iters else max_learning_rate
