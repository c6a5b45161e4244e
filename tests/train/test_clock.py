"""Where the seconds of a step go, by a clock that moves only when it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline.train.clock as clock
from pipeline.checkpoint.saver import Saved
from pipeline.train.clock import StepClock


class Time:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(clock, "time", fake)
    return fake


def test_a_reading_is_the_mean_over_the_steps_since_the_last_one(time: Time) -> None:
    steps = StepClock()
    for seconds in (1.0, 3.0):
        time.now += seconds
        steps.lap("data")
        time.now += 4.0
        steps.lap("forward_backward")
        steps.step_done()
    time.now += 2.0
    assert steps.read() == {"data": 2.0, "forward_backward": 4.0, "step": 7.0}

    time.now += 5.0
    steps.lap("data")
    steps.step_done()
    assert steps.read() == {"data": 5.0, "step": 5.0}


def test_what_happens_after_a_reading_belongs_to_the_next_lap(time: Time) -> None:
    steps = StepClock()
    time.now += 3.0
    steps.read()
    time.now += 1.0
    steps.lap("optimizer")
    steps.step_done()
    assert steps.read() == {"optimizer": 1.0, "step": 1.0}


def test_a_pause_is_part_of_no_lap_and_of_no_step(time: Time) -> None:
    steps = StepClock()
    time.now += 1.0
    steps.lap("data")
    time.now += 30.0
    steps.pause()
    time.now += 2.0
    steps.lap("data")
    steps.step_done()
    assert steps.read() == {"data": 3.0, "step": 3.0}


def test_the_longest_recent_step_is_known_before_the_first_reading_but_for_the_first_step_and_pauses(
    time: Time,
) -> None:
    """The first step of a start also compiles."""
    steps = StepClock()
    assert steps.longest_step_s == 0.0
    for seconds, longest in ((60.0, 0.0), (2.0, 2.0), (5.0, 5.0), (3.0, 5.0)):
        time.now += seconds
        steps.lap("optimizer")
        steps.step_done()
        time.now += 30.0
        steps.pause()
        assert steps.longest_step_s == longest
    for _ in range(100):
        time.now += 1.0
        steps.step_done()
    assert steps.longest_step_s == 1.0


def test_neither_a_wait_for_a_save_nor_a_rollback_makes_a_step_long(time: Time) -> None:
    steps = StepClock()
    for _ in range(3):
        time.now += 1.0
        steps.lap("optimizer")
        time.now += 400.0
        steps.lap(clock.STALL)
        time.now += 1.0
        steps.lap("optimizer")
        steps.step_done()
        time.now += 300.0
        steps.skip()
    assert steps.longest_step_s == 2.0 and steps.longest_pause_s == 0.0
    assert steps.read() == {"optimizer": 2.0, "checkpoint_stall": 400.0, "step": 402.0}


def test_the_longest_pause_is_remembered(time: Time) -> None:
    steps = StepClock()
    assert steps.longest_pause_s == 0.0
    for seconds in (5.0, 30.0, 2.0):
        time.now += seconds
        steps.pause()
    steps.read()
    assert steps.longest_pause_s == 30.0


def test_a_reading_before_the_first_step_divides_by_nothing(time: Time) -> None:
    steps = StepClock()
    time.now += 2.0
    assert steps.read() == {"step": 2.0}


def test_only_durable_saves_tell_how_long_a_save_takes() -> None:
    durable, failed = Saved(10, Path("step_00000010"), None, 4.0), Saved(20, None, "no part of rank 3", 1800.0)
    longer = Saved(30, Path("step_00000030"), None, 6.0)
    assert clock.longest_save_s([durable, failed]) == 4.0
    assert clock.longest_save_s([durable, longer, failed]) == 6.0
    assert clock.longest_save_s([failed]) == clock.UNKNOWN_SAVE_S == 10.0
