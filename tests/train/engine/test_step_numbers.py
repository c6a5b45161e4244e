"""The numbers that all ranks agree on arrive on the host as they were on the device."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.train.engine.step_numbers import Numbers, PendingNumbers


def test_loss_norm_and_stop_are_read_in_this_order() -> None:
    assert PendingNumbers(torch.tensor([2.5, 0.75, 0.0])).read() == Numbers(loss=2.5, norm=0.75, stop=False)


@pytest.mark.parametrize(("asked", "stop"), [(0, False), (1, True), (2, True)])
def test_one_rank_that_was_asked_to_stop_is_enough(asked: int, stop: bool) -> None:
    assert PendingNumbers(torch.tensor([1.0, 1.0, float(asked)])).read().stop is stop


def test_what_is_not_finite_stays_so() -> None:
    numbers = PendingNumbers(torch.tensor([float("nan"), float("inf"), 0.0])).read()
    assert math.isnan(numbers.loss) and math.isinf(numbers.norm)
