"""Daly's model agrees with a simulation, with Young's limit and with common sense."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.plan.failure_model import Failures


def test_goodput_agrees_with_a_simulation():
    """The simulation cuts 200,000 segments of training by failures, with saves in the background."""
    failures = Failures(mtbf_s=7200.0, restart_s=300.0, stall_s=2.0, save_s=0.0)
    interval, rng = 900.0, random.Random(0)
    clock, done = 0.0, 0
    for _ in range(200_000):
        until_failure = rng.expovariate(1 / failures.mtbf_s)
        if until_failure >= interval + failures.stall_s:
            clock += interval + failures.stall_s
            done += 1
            continue
        clock += until_failure
        restart = failures.restart_s
        while (again := rng.expovariate(1 / failures.mtbf_s)) < restart:  # a restart can fail too
            clock += again
        clock += restart
    assert failures.goodput(interval) == pytest.approx(done * interval / clock, rel=0.005)


def test_the_best_interval_has_the_highest_goodput_and_is_youngs_for_rare_failures():
    failures = Failures(mtbf_s=30_000.0, restart_s=300.0, stall_s=10.0, save_s=30.0)
    best = failures.best_interval_s()
    assert best == pytest.approx(math.sqrt(2 * 10.0 * 30_000.0), rel=0.02)
    assert failures.goodput(best) >= max(failures.goodput(best * factor) for factor in (0.5, 0.8, 1.25, 2.0))


def test_no_interval_is_shorter_than_a_save():
    failures = Failures(mtbf_s=1000.0, restart_s=60.0, stall_s=0.001, save_s=50.0)
    assert failures.best_interval_s() == 50.0
    assert failures.goodput(1.0) == failures.goodput(50.0)


def test_a_job_that_fails_all_the_time_makes_no_progress():
    assert Failures(mtbf_s=1.0, restart_s=3600.0, stall_s=1.0, save_s=60.0).goodput(600.0) == 0.0
