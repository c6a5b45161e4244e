"""When a hang is reported, by a clock that moves only when told to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.run.events import Event, Hang, HangEnded
from pipeline.run.folder import Run
from pipeline.train.ranks import hangs
from pipeline.train.ranks.activity import Activity, Doing, Roster
from pipeline.train.ranks.hangs import HangWatch, leave_stacks


class Ranks:
    """Rank 0 and rank 1, whose places are set by hand, and the watch over them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
        self.now = 1000.0
        monkeypatch.setattr(hangs, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.recorded: list[Event] = []
        self.told: list[Path] = []
        self.said: list[str] = []
        self.roster = Roster(Activity(torch.device("cpu")))
        self.roster._clock = lambda: self.now
        self.watch = HangWatch(
            Run(folder), self.roster, self.told.append, self.recorded.append, self.said.append, first
        )

    def at(self, step: int, own: int, other: int, phase: str = "backward") -> None:
        """Both ranks are after this step and have begun so many phases."""
        mine = Doing(step, phase, own, 0, None)
        self.roster._own.now = lambda: mine  # type: ignore[method-assign]
        self.roster.hear(1, "n1", Doing(step, phase, other, 0, None))

    def look_for(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.roster._seen[1] = self.roster._seen[1].__class__("n1", self.roster._seen[1].doing, self.now)
            self.watch.look()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch, first=100)


def test_ranks_that_do_not_move_for_thirty_seconds_hang_and_the_one_behind_is_named_once(ranks: Ranks) -> None:
    ranks.at(103, own=8, other=7)
    ranks.look_for(30)
    assert ranks.recorded == []
    ranks.look_for(60)
    (hang,) = ranks.recorded
    assert isinstance(hang, Hang)
    assert (hang.step, hang.ranks, hang.hosts, hang.phases) == (103, [1], ["n1"], ["backward"])
    assert ranks.told == [Path(hang.path)] and "rank 1 on n1" in ranks.said[0]
    assert ranks.watch.hang is not None


def test_ranks_that_move_again_have_ended_the_hang(ranks: Ranks) -> None:
    ranks.at(103, own=8, other=7)
    ranks.look_for(50)
    ranks.at(103, own=8, other=8)
    ranks.look_for(1)
    assert isinstance(ranks.recorded[-1], HangEnded) and 45 <= ranks.recorded[-1].seconds <= 55
    assert ranks.watch.hang is None
    ranks.look_for(40)
    assert isinstance(ranks.recorded[-1], Hang), "a hang that was reported makes none after it later"
    assert ranks.recorded[-1].ranks == [], "all have come equally far"


def test_what_has_taken_long_before_may_take_long_again(ranks: Ranks) -> None:
    ranks.at(103, own=8, other=7)
    ranks.look_for(20)
    ranks.at(103, own=8, other=8)
    ranks.look_for(95)
    assert ranks.recorded == []
    ranks.look_for(20)
    assert len(ranks.recorded) == 1


def test_the_first_step_may_compile(ranks: Ranks) -> None:
    ranks.at(100, own=8, other=7)
    ranks.look_for(299)
    assert ranks.recorded == []
    ranks.look_for(5)
    assert len(ranks.recorded) == 1


def test_a_rank_that_says_nothing_is_reported_in_the_first_step_too(ranks: Ranks) -> None:
    ranks.at(100, own=8, other=7)
    ranks.look_for(5)
    for _ in range(35):
        ranks.now += 1.0
        ranks.watch.look()
    (hang,) = ranks.recorded
    assert isinstance(hang, Hang) and hang.ranks == [1] and 30 <= hang.waited_s <= 32


def test_a_first_step_that_took_long_says_nothing_about_later_ones(ranks: Ranks) -> None:
    ranks.at(100, own=8, other=7)
    ranks.look_for(200)
    ranks.at(100, own=8, other=8)
    ranks.look_for(1)
    ranks.at(101, own=9, other=8)
    ranks.look_for(40)
    assert len(ranks.recorded) == 1


def test_ranks_that_all_wait_for_a_checkpoint_do_not_hang(ranks: Ranks) -> None:
    ranks.at(103, own=8, other=8, phase="checkpoint")
    ranks.look_for(500)
    assert ranks.recorded == []


def test_a_rank_leaves_its_threads_and_its_collectives(tmp_path: Path) -> None:
    leave_stacks(tmp_path / "hangs" / "step", 3, Activity(torch.device("cpu")))
    text = (tmp_path / "hangs" / "step" / "rank_3.txt").read_text()
    assert "test_a_rank_leaves_its_threads_and_its_collectives" in text
    json.loads((tmp_path / "hangs" / "step" / "rank_3_collectives.json").read_text())


def test_a_disk_that_takes_no_stacks_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "hangs").write_text("a file where the folder should be")
    leave_stacks(tmp_path / "hangs" / "step", 3, Activity(torch.device("cpu")))
