"""What ranks say they are doing, and whom rank 0 finds by it."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.train.ranks.activity import Activity, Doing, Roster, Slowest

CPU = torch.device("cpu")


def doing(phases: int = 10, collectives: int = 5, own_s: float | None = 0.1) -> Doing:
    return Doing(step=3, phase="forward", phases=phases, collectives=collectives, own_s=own_s)


def roster(**others: Doing) -> Roster:
    """Rank 0 at phase 10 and collective 5, and the others by `rank_N`."""
    found = Roster(Activity(CPU))
    found._own.now = doing  # type: ignore[method-assign]
    for name, what in others.items():
        found.hear(int(name.removeprefix("rank_")), f"n{name[-1]}", what)
    return found


def test_phases_are_counted_and_nest() -> None:
    activity = Activity(CPU)
    activity.begin_step(7)
    with activity.phase("validation"):
        with activity.phase("forward"):
            assert activity.now().phase == "forward"
        assert activity.now().phase == "validation"
    found = activity.now()
    assert (found.step, found.phase, found.phases, found.own_s) == (7, "", 2, None)
    assert Doing(**found.to_json()) == found


def test_only_the_time_before_the_first_collective_of_a_step_is_a_ranks_own() -> None:
    activity = Activity(CPU)
    activity.begin_collective()
    assert activity.now().own_s is None, "before the first step"
    for step in range(3):
        activity.begin_step(step)
        time.sleep(0.02)
        activity.begin_collective()
        time.sleep(0.1)
        activity.begin_collective()
    own = activity.now().own_s
    assert own is not None and 0.02 <= own < 0.1


@pytest.mark.parametrize(
    ("others", "missing"),
    [
        ({"rank_1": doing(), "rank_2": doing()}, []),
        ({"rank_1": doing(phases=9), "rank_2": doing()}, [1]),
        ({"rank_1": doing(collectives=4), "rank_2": doing()}, [1]),
        ({"rank_1": doing(phases=11, collectives=5), "rank_2": doing()}, [0, 2]),
    ],
)
def test_the_ranks_that_are_behind_did_not_come(others: dict[str, Doing], missing: list[int]) -> None:
    assert sorted(roster(**others).missing(silence_s=60.0)) == missing


def test_a_rank_that_says_nothing_did_not_come_however_far_it_was() -> None:
    found = roster(rank_1=doing(phases=11), rank_2=doing(phases=9))
    found._clock = lambda: time.monotonic() + 100.0
    found.hear(2, "n2", doing(phases=9))
    assert list(found.missing(silence_s=60.0)) == [1]


def test_the_slowest_is_the_one_with_the_longest_time_of_its_own() -> None:
    found = roster(rank_1=doing(own_s=0.4), rank_2=doing(own_s=0.2), rank_3=doing(own_s=None))
    assert found.slowest() == Slowest(rank=1, seconds=0.4, median_s=0.2)
    assert roster(rank_1=doing(own_s=0.4)).slowest() == Slowest(rank=1, seconds=0.4, median_s=0.1)
    assert roster(rank_1=doing(own_s=None)).slowest() is None and roster().slowest() is None
