"""The learning rate warms up, follows a cosine, then stays at its minimum."""

from __future__ import annotations

import itertools

import pytest

from pipeline.optim.schedule import get_lr_cosine_schedule


def test_the_schedule_warms_up_decays_and_stays_at_the_minimum():
    lrs = [get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    assert lrs[:8] == pytest.approx([it / 7 for it in range(8)])
    assert lrs[14] == pytest.approx(0.55)
    assert lrs[21:] == [pytest.approx(0.1)] * 4
    assert all(a > b for a, b in itertools.pairwise(lrs[7:22]))


def test_the_schedule_works_without_warm_up_and_without_decay():
    assert get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert get_lr_cosine_schedule(10, 1.0, 0.1, 10, 10) == 0.1
