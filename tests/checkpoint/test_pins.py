"""A pin protects a checkpoint from the retention of its run: while it counts, and no longer."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import retention
from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.pins import DAYS, pin, pins, unpin
from pipeline.files import write_json
from tests.checkpoint.support import save

DAY = 86_400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoints of a run that has saved once."""
    checkpoints = tmp_path / "runs" / "base" / "checkpoints"
    checkpoints.mkdir(parents=True)
    take_over(checkpoints, "a1")
    save(checkpoints, 1, keep_last=1, keep_best=False)
    return checkpoints


@pytest.fixture
def holder(folder: Path) -> Path:
    """The folder of another run."""
    place = folder.parent.parent / "branch"
    place.mkdir()
    return place


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in reversed(published(folder))]


def saved_again(folder: Path, step: int = 2) -> list[int | None]:
    save(folder, step, keep_last=1, keep_best=False)
    return steps(folder)


def later(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    now = time.time()
    monkeypatch.setattr("pipeline.checkpoint.pins.time.time", lambda: now + days * DAY)


def test_a_pinned_checkpoint_stays_until_its_holder_lets_it_go(folder: Path, holder: Path) -> None:
    pin(published(folder)[0], holder)
    assert saved_again(folder) == [1, 2]
    unpin(folder, holder)
    assert saved_again(folder, 3) == [3]
    assert pins(folder) == []


def test_one_holder_does_not_let_go_what_another_holds(folder: Path, holder: Path) -> None:
    twin = folder.parent.parent.parent / "elsewhere" / holder.name
    for one in (holder, twin):
        pin(published(folder)[0], one)
    unpin(folder, holder)
    assert [p.holder for p in pins(folder)] == [str(twin)]
    assert saved_again(folder) == [1, 2]


def test_a_holder_has_one_pin_the_last(folder: Path, holder: Path) -> None:
    pin(published(folder)[0], holder)
    save(folder, 2, keep_last=1, keep_best=False)
    pin(folder / "step_00000002", holder)
    assert saved_again(folder, 3) == [2, 3]


@pytest.mark.parametrize(("days", "counts"), [(DAYS - 1, True), (DAYS + 1, False)])
def test_a_pin_counts_for_some_days(
    folder: Path, holder: Path, days: float, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(published(folder)[0], holder)
    later(monkeypatch, days)
    assert (1 in saved_again(folder)) is counts


def test_a_pin_whose_holder_is_gone_counts_for_a_day(
    folder: Path, holder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch pins before its folder exists; it may need hours to check a large checkpoint."""
    holder.rmdir()
    pin(published(folder)[0], holder)
    assert saved_again(folder) == [1, 2]
    later(monkeypatch, 1.1)
    assert saved_again(folder, 3) == [3]


def test_a_holder_that_is_only_out_of_sight_keeps_its_pin(
    folder: Path, holder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that shows the run alone has another folder in the place of the one above all runs."""
    file = pin(published(folder)[0], holder)
    write_json(file, json.loads(file.read_text()) | {"inode": 1})
    holder.rmdir()
    later(monkeypatch, 2)
    assert saved_again(folder) == [1, 2]


def test_a_dead_pin_is_reported_once_by_name(
    folder: Path, holder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = pin(published(folder)[0], holder)
    later(monkeypatch, DAYS + 1)
    keeper = retention.Retention(folder, retention.CheckpointConfig(keep_last=1))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            keeper.remove_old(published(folder)[0], None)
    assert [str(file) in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.parametrize("content", ["", "{}", '{"holder": 3}', "[" * 10_000, '{"until": 1e400}'])
def test_a_damaged_pin_protects_nothing_and_stops_nothing(folder: Path, holder: Path, content: str) -> None:
    pin(published(folder)[0], holder).write_text(content)
    assert saved_again(folder) == [2]
    assert [p.dead is None for p in pins(folder)] == [False]


def test_a_checkpoint_that_is_pinned_while_it_is_being_deleted_comes_back(
    folder: Path, holder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = retention.pins
    looks = []

    def pinned_after_the_first_look(checkpoints: Path) -> list[object]:
        answer = found(checkpoints)
        if not looks:
            pin(folder / "step_00000001", holder)
        looks.append(answer)
        return answer  # type: ignore[return-value]

    monkeypatch.setattr(retention, "pins", pinned_after_the_first_look)
    assert saved_again(folder) == [1, 2]
    assert len(looks) == 2


def test_long_names_and_odd_ones_make_a_file_name(folder: Path) -> None:
    for name in ("x" * 200, "a b*?[c]"):
        pin(published(folder)[0], folder.parent.parent / name)
    assert len(pins(folder)) == 2
