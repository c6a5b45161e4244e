"""Every schedule warms up, and then equals its closed form at each step."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.optim.schedule import get_lr_cosine_schedule, learning_rates

WARMUP, STEPS, HIGH, LOW = 7, 100, 1.0, 0.1


def cosine(done: float) -> float:
    """From 1 to 0."""
    return math.cos(math.pi / 2 * min(1, max(0, done))) ** 2


# What is left of the way from the minimum to the maximum at a step, written out again.
SHAPES: dict[str, tuple[dict[str, Any], Any]] = {
    "cosine": ({}, lambda it: cosine((it - 7) / 93)),
    "cosine that ends before": ({"cosine_cycle_iters": 50}, lambda it: cosine((it - 7) / 43)),
    "linear": ({}, lambda it: (100 - it) / 93),
    "constant": ({}, lambda it: 1.0),
    "inv_sqrt": ({}, lambda it: (max(0.1, (7 / it) ** 0.5) - 0.1) / 0.9),
    "wsd linear": ({"decay_iters": 20, "decay": "linear"}, lambda it: min(1, (100 - it) / 20)),
    "wsd 1-sqrt": ({"decay_iters": 20, "decay": "1-sqrt"}, lambda it: 1 - max(0, (it - 80) / 20) ** 0.5),
    "wsd cosine": ({"decay_iters": 20, "decay": "cosine"}, lambda it: cosine((it - 80) / 20)),
}  # fmt: skip


def rates(kind: str, steps: int = STEPS, **settings: Any) -> list[float]:
    of = {
        "schedule": kind, "learning_rate": HIGH, "min_learning_rate": LOW, "warmup_iters": WARMUP,
        "cosine_cycle_iters": None, "decay_iters": None, "decay": "1-sqrt", **settings,
    }  # fmt: skip
    return [learning_rates(SimpleNamespace(**of), steps)(it) for it in range(steps)]


@pytest.mark.parametrize("name", SHAPES)
def test_a_schedule_is_its_closed_form(name: str):
    settings, left = SHAPES[name]
    found = rates(name.split()[0], **settings)
    assert found[:WARMUP] == pytest.approx([HIGH * it / WARMUP for it in range(WARMUP)])
    assert found[WARMUP:] == pytest.approx([LOW + (HIGH - LOW) * left(it) for it in range(WARMUP, STEPS)], abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(found[WARMUP:]))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inv_sqrt", "wsd"])
def test_without_warm_up_the_first_step_has_the_maximum(kind: str):
    assert rates(kind, warmup_iters=0, decay_iters=10)[0] == HIGH


@pytest.mark.parametrize("kind", ["constant", "inv_sqrt"])
def test_more_steps_change_no_rate_of_a_schedule_without_an_end(kind: str):
    assert rates(kind, 200)[:STEPS] == rates(kind)


def test_more_steps_change_no_rate_of_wsd_before_its_decay():
    long, short = rates("wsd", 200, decay_iters=20), rates("wsd", decay_iters=20)
    assert long[:80] == short[:80] and long[81] != short[81]
    assert long[180:] == short[80:]


def test_the_cosine_of_the_adapters_warms_up_decays_and_stays_at_the_minimum():
    lrs = [get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    assert lrs[:8] == pytest.approx([it / 7 for it in range(8)])
    assert lrs[14] == pytest.approx(0.55)
    assert lrs[21:] == [pytest.approx(0.1)] * 4
    assert all(a > b for a, b in itertools.pairwise(lrs[7:22]))


def test_the_cosine_works_without_warm_up_and_without_decay():
    assert get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert get_lr_cosine_schedule(10, 1.0, 0.1, 10, 10) == 0.1
