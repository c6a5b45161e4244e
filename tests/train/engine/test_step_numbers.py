"""The numbers that all ranks agree on arrive on the host as they were on the device."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.train.engine.step_numbers import Numbers, PendingNumbers, asked_of


def test_loss_norm_and_stop_are_read_in_this_order() -> None:
    assert PendingNumbers(torch.tensor([2.5, 0.75, 0.0])).read() == Numbers(loss=2.5, norm=0.75, stop=False)


@pytest.mark.parametrize(("asked", "stop"), [(0, False), (1, True), (2, True)])
def test_one_rank_that_was_asked_to_stop_is_enough(asked: int, stop: bool) -> None:
    assert PendingNumbers(torch.tensor([1.0, 1.0, float(asked)]), world_size=2).read().stop is stop


def test_what_is_not_finite_stays_so() -> None:
    numbers = PendingNumbers(torch.tensor([float("nan"), float("inf"), 0.0])).read()
    assert math.isnan(numbers.loss) and math.isinf(numbers.norm)


@pytest.mark.parametrize("world_size", [1, 2, 1000])
@pytest.mark.parametrize("profile", [0, 1, 3])
@pytest.mark.parametrize("stopped", ["none", "first", "last", "all"])
def test_one_sum_tells_both_whether_to_stop_and_which_profile(world_size: int, profile: int, stopped: str) -> None:
    ranks = {"none": set(), "first": {0}, "last": {world_size - 1}, "all": set(range(world_size))}[stopped]
    asked = [asked_of(rank in ranks, profile if rank == 0 else 0, world_size) for rank in range(world_size)]
    numbers = PendingNumbers(torch.tensor([1.0, 1.0, sum(torch.tensor(asked))]), world_size).read()
    assert (numbers.stop, numbers.profile) == (bool(ranks), profile)
