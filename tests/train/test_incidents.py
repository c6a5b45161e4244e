"""What is decided about bad steps and spikes, without training."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pipeline.train.incidents as incidents
from pipeline.checkpoint.layout import published
from pipeline.errors import PipelineError
from pipeline.run.events import BadStep, RolledBack
from pipeline.run.folder import step_name
from pipeline.run.world import World
from pipeline.train.incidents import Rollback, Verdict, inspect, roll_back
from pipeline.train.session import Session
from tests.train.fakes import fake_session, pending


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The batches that would be written down: folder, name, index and numbers."""
    batches: list[tuple[Any, ...]] = []

    def record(folder: Path, name: str, reader: Any, index: int, size: int, tokenizer: Any, **about: float) -> Path:
        batches.append((folder.name, name, index, size, about["step"]))
        return folder / f"{name}.json"

    monkeypatch.setattr(incidents, "record_batch", record)
    monkeypatch.setattr(incidents.Tokenizer, "load", lambda path, end_of_text: None)
    return batches


def settled(session: Session) -> Session:
    """With a window of losses in which 2.0 is usual."""
    for i in range(30):
        session.guard.is_spike(2.0 + 0.01 * (i % 3))
    return session


def test_numbers_are_read_one_step_late_so_that_the_device_never_waits(tmp_path: Path, recorded: list[Any]) -> None:
    session, late = fake_session(tmp_path), pending(loss=math.nan)
    assert inspect(session, 1, late) == Verdict()
    assert recorded == [] and [step for step, _ in session.unread] == [1]
    assert inspect(session, 2, pending()) == Verdict()
    assert recorded == [("bad_batches", "bad_step_00000001", 0, 4, 1)]
    assert [step for step, _ in session.unread] == [2]


@pytest.mark.parametrize("step", [10, 20, 25, 100])
def test_a_log_line_a_validation_a_save_or_the_end_reads_them_at_once(
    tmp_path: Path, recorded: list[Any], step: int
) -> None:
    session = fake_session(tmp_path)
    inspect(session, step - 1, pending())
    inspect(session, step, pending(loss=math.nan))
    assert [name for _, name, *_ in recorded] == [f"bad_step_{step:08d}"]
    assert not session.unread


def test_a_stop_is_seen_one_step_late_and_reads_everything(tmp_path: Path) -> None:
    session = fake_session(tmp_path)
    assert not inspect(session, 1, pending(stop=1)).stop
    assert inspect(session, 2, pending()).stop
    assert not session.unread, "what is saved has been judged"


def test_a_stop_is_seen_at_once_where_something_is_due(tmp_path: Path) -> None:
    assert inspect(fake_session(tmp_path), 10, pending(stop=1)).stop


@pytest.mark.parametrize("numbers", [{"loss": math.inf}, {"norm": math.nan}])
def test_a_bad_step_is_recorded_and_said(tmp_path: Path, recorded: list[Any], numbers: dict[str, float]) -> None:
    session = fake_session(tmp_path)
    session.guard.skipped = (1,)
    assert inspect(session, 10, pending(**numbers)) == Verdict()
    assert recorded == [("bad_batches", "bad_step_00000010", 10, 4, 10)], "the tenth batch that is not skipped"
    (message,) = session.progress.messages  # type: ignore[attr-defined]
    assert "step 10" in message and "bad_step_00000010.json" in message
    assert session.guard.bad_steps == 1
    (event,) = session.tracker.events  # type: ignore[attr-defined]
    assert isinstance(event, BadStep) and event.error is None
    assert (event.step, event.batch, event.path) == (10, 10, str(session.run.bad_batches / "bad_step_00000010.json"))


def test_too_many_bad_steps_in_a_row_fail_the_run_with_all_recorded(tmp_path: Path, recorded: list[Any]) -> None:
    session = fake_session(tmp_path, guard={"max_bad_steps": 3})
    for step, loss in enumerate((math.nan, 2.0, math.nan, math.nan), start=1):
        inspect(session, step, pending(loss=loss))
    inspect(session, 5, pending(loss=math.nan))
    with pytest.raises(PipelineError, match="3 steps in a row"):
        inspect(session, 6, pending())
    assert [name for _, name, *_ in recorded] == [f"bad_step_0000000{step}" for step in (1, 3, 4, 5)]


def test_only_the_first_rank_records_a_batch(tmp_path: Path, recorded: list[Any]) -> None:
    session = fake_session(tmp_path, World(rank=1, size=2))
    inspect(session, 10, pending(loss=math.nan))
    assert recorded == [] and session.guard.bad_steps == 1


def test_a_full_disk_costs_the_record_and_not_the_run(
    tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **about: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(incidents, "record_batch", full)
    session = fake_session(tmp_path)
    assert inspect(session, 10, pending(loss=math.nan)) == Verdict()
    (message,) = session.progress.messages  # type: ignore[attr-defined]
    assert "No space left" in message and "batch 9" in message
    (event,) = session.tracker.events  # type: ignore[attr-defined]
    assert event.path is None and event.error in message


@pytest.mark.parametrize("on_spike", ["warn", "rollback"])
def test_a_lasting_rise_is_reported_once(tmp_path: Path, recorded: list[Any], on_spike: str) -> None:
    """Nothing to roll back to: a rollback is no more than a warning."""
    session = settled(fake_session(tmp_path, guard={"on_spike": on_spike, "spike_window": 20}))
    for step in (10, 20, 30, 40):
        assert inspect(session, step, pending(loss=4.0)) == Verdict()
    assert [name for _, name, *_ in recorded] == ["spike_00000010"]


@pytest.mark.parametrize(("present", "chosen"), [((10, 20, 30, 38, 39), 38), ((38,), 38), ((39, 40), None), ((), None)])
def test_a_jump_rolls_back_to_the_newest_checkpoint_that_no_suspect_batch_has_touched(
    tmp_path: Path, recorded: list[Any], present: tuple[int, ...], chosen: int | None
) -> None:
    """Two batches are suspects: those of steps 39 and 40."""
    session = settled(fake_session(tmp_path, guard={"on_spike": "rollback", "rollback_skip": 2}))
    for step in present:
        (session.run.checkpoints / step_name(step)).mkdir(parents=True)
    inspect(session, 39, pending())
    verdict = inspect(session, 40, pending(loss=50.0, stop=1))
    assert session.saver.waits == [None], "a save in progress may publish that very checkpoint"  # type: ignore[attr-defined]
    assert not session.unread
    if chosen is None:
        assert verdict == Verdict(stop=True)
    else:
        assert verdict == Verdict(Rollback(40, session.run.checkpoints / step_name(chosen)))


def test_a_warning_looks_for_no_checkpoint(tmp_path: Path, recorded: list[Any]) -> None:
    session = settled(fake_session(tmp_path, guard={"on_spike": "warn"}))
    (session.run.checkpoints / step_name(1)).mkdir(parents=True)
    assert inspect(session, 40, pending(loss=50.0)) == Verdict()
    assert session.saver.waits == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("evaluated", [30, 31])
def test_a_rollback_restores_the_state_skips_the_suspects_and_quarantines_what_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: int
) -> None:
    """The guard forgets the jump, but not which batches earlier rollbacks have skipped."""
    session = fake_session(tmp_path, guard={"on_spike": "rollback", "rollback_skip": 2})
    session.step, session.tokens_seen, session.guard.skipped = 40, 4000, (3, 7)
    session.evaluation = SimpleNamespace(step=evaluated)  # type: ignore[assignment]
    folders = {step: session.run.checkpoints / step_name(step) for step in (20, 30, 35, 38)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    saved = {"losses": [2.0, 2.1], "skipped": [3], "bad_in_a_row": 0, "bad_steps": 5}
    manifest = SimpleNamespace(step=30, state={"guard": saved, "tokens_seen": 3000})
    loaded: list[Any] = []
    session.engine.load = loaded.append  # type: ignore[method-assign, assignment]
    reader = SimpleNamespace(manifest=manifest, close=lambda: loaded.append("closed"))
    monkeypatch.setattr(incidents, "CheckpointReader", lambda folder: reader if folder == folders[30] else None)

    assert roll_back(session, Rollback(40, folders[30])) == 30
    assert loaded == [reader, "closed"]
    assert (session.step, session.tokens_seen) == (30, 3000)
    # Batches 38 and 39 would be those of steps 39 and 40, had not two before them been skipped.
    assert session.guard.skipped == (3, 7, 40, 41)
    assert session.guard.state() == saved | {"skipped": [3, 7, 40, 41]}
    assert published(session.run.checkpoints) == [folders[30], folders[20]]
    assert {f.name for f in session.run.checkpoints.glob("*.rejected")} == {
        "step_00000035.rejected", "step_00000038.rejected",
    }  # fmt: skip
    rolled_back = RolledBack(step=40, to=30, skipped=[3, 7, 40, 41])
    assert session.tracker.events == [rolled_back]  # type: ignore[attr-defined]
    assert session.tracker.rewound == [30]  # type: ignore[attr-defined]
    assert (session.evaluation is None) == (evaluated == 31), "step 31 will come again, with other weights"
