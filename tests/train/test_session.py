"""What a session counts, records and saves, without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pipeline.train.clock as clock
import pipeline.train.session as sessions
from pipeline.checkpoint.saver import Saved
from pipeline.errors import CheckpointError
from pipeline.model.flops import flops_per_token
from pipeline.run.events import Checkpointed, CheckpointFailed, Failed
from pipeline.run.world import World
from pipeline.train.clock import every
from pipeline.train.evaluate import Evaluation
from pipeline.train.session import Session
from tests.train.fakes import Progress, Saver, Tracker, fake_session, pending

FOUND = Evaluation(step=25, loss=2.0, perplexity=7.4, bits_per_byte=2.9, tokens=160)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Nothing but notes; validations always find the same."""
    monkeypatch.setattr(sessions, "evaluate", lambda engine, validation, step: dataclasses.replace(FOUND, step=step))
    monkeypatch.delenv("PIPELINE_DEADLINE", raising=False)
    return fake_session(tmp_path)


def log_steps(session: Session, until: int) -> None:
    for step in range(session.step + 1, until + 1):
        session.log(step, 1e-3, pending(loss=float(step)))


def test_every_counts_finished_steps() -> None:
    assert [step for step in range(1, 10) if every(step, 3)] == [3, 6, 9]


def test_the_ranks_share_the_rows_of_a_global_batch(tmp_path: Path) -> None:
    """In order, each row once, in micro-batches; a skipped batch is replaced by the next one."""
    asked: list[tuple[int, int, int]] = []

    def batch(index: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((index, start, stop))
        return torch.arange(start, stop), torch.arange(start, stop) + 1

    for rank in range(2):
        sizes = {"train.batch_size": 12, "train.micro_batch_size": 3}
        session = fake_session(tmp_path, World(rank=rank, size=2), **sizes)
        session.reader = SimpleNamespace(batch=batch, weight=lambda *rows: None)  # type: ignore[assignment]
        session.guard.skipped = (4,)
        rows = [(x.tolist(), y.tolist()) for x, y in session.micro_batches(5)]
        assert rows[0] == ([6 * rank, 6 * rank + 1, 6 * rank + 2], [6 * rank + 1, 6 * rank + 2, 6 * rank + 3])
    assert asked == [(6, 0, 3), (6, 3, 6), (6, 6, 9), (6, 9, 12)]


def test_a_log_line_comes_with_the_first_the_last_and_every_tenth_step(tmp_path: Path) -> None:
    session = fake_session(tmp_path, **{"train.max_iters": 25})
    log_steps(session, 25)
    tracker, progress = session.tracker, session.progress
    assert isinstance(tracker, Tracker) and isinstance(progress, Progress)
    assert [step for step, _ in tracker.metrics] == progress.shown == [1, 10, 20, 25]
    assert progress.reached == list(range(1, 26))
    assert session.step == 25


def test_a_log_line_says_what_the_step_did_and_how_fast(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "peak_flops_per_s", lambda device, precision: {"fp32": 1e9}[precision])
    session.world = World(size=4)
    session.tokens_seen = 1000
    session.clock.read = lambda: {"data": 0.25, "step": 2.0}  # type: ignore[method-assign]
    session.log(1, 3e-4, pending(loss=2.5, norm=0.5))
    model = session.config.model
    tokens = session.config.train.batch_size * model.context_length
    flops = flops_per_token(model)
    assert session.tracker.metrics == [  # type: ignore[attr-defined]
        (
            1,
            {
                "train/loss": 2.5,
                "train/lr": 3e-4,
                "train/grad_norm": 0.5,
                "train/tokens_per_s": tokens / 2,
                "train/flops_per_s": tokens / 2 * flops,
                "train/tokens_seen": 1000 + tokens,
                "data/text/tokens_seen": 10,
                "time/data_s": 0.25,
                "time/step_s": 2.0,
                "train/mfu": tokens / 2 * flops / 4e9,
            },
        )
    ]


def test_without_a_known_peak_there_is_no_mfu(session: Session) -> None:
    session.log(1, 3e-4, pending())
    assert "train/mfu" not in session.tracker.metrics[0][1]  # type: ignore[attr-defined]


def test_a_validation_is_due_at_its_interval_and_after_the_last_step(tmp_path: Path) -> None:
    session = fake_session(tmp_path, **{"train.max_iters": 60})
    assert [step for step in range(1, 61) if session.validation_due(step)] == [25, 50, 60]


@pytest.mark.parametrize(
    ("step", "durable", "pause", "needed"),
    [
        # The step before a validation counts it, and so does its own step: it may be run before the ranks agree.
        (23, 4.0, 30.0, (2.0, 4.0, 0.0)),
        (24, 4.0, 30.0, (2.0, 4.0, 30.0)),
        (25, 4.0, 30.0, (2.0, 4.0, 30.0)),
        (26, None, 30.0, (2.0, clock.UNKNOWN_SAVE_S, 0.0)),
        (25, 4.0, 0.0, (2.0, 4.0, 20.0)),  # none was measured: ten batches take at most ten steps
    ],
)
def test_the_time_limit_accounts_for_steps_saves_and_validations(
    tmp_path: Path, step: int, durable: float | None, pause: float, needed: tuple[float, float, float]
) -> None:
    session = fake_session(tmp_path, **{"train.num_val_batches": 10})
    asked: list[tuple[float, ...]] = []
    session.stop.check_time = lambda *seconds: asked.append(seconds)  # type: ignore[method-assign, assignment]
    session.clock = SimpleNamespace(  # type: ignore[assignment]
        longest_step_s=2.0, longest_pause_s=pause, step_done=lambda: None, read=lambda: {"step": 2.0}
    )
    if durable is not None:
        session.saves.append(Saved(20, Path("step_00000020"), None, durable))
    session.log(step, 1e-3, pending())
    assert asked == [needed]


@pytest.mark.parametrize(
    ("step", "recorded", "runs"),
    [(0, False, False), (25, False, True), (25, True, False), (24, False, False), (100, False, True)],
)
def test_a_missed_validation_is_run_unless_it_is_recorded(
    session: Session, step: int, recorded: bool, runs: bool
) -> None:
    session.step = step
    session.run.path.mkdir(parents=True)
    lines = [{"step": step, "train/loss": 1.0}, {"step": step if recorded else step - 1, "val/loss": 1.0}]
    session.run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    session.run_missed_validation()
    assert [line for line, _ in session.tracker.metrics] == ([step] if runs else [])  # type: ignore[attr-defined]


def test_a_validation_is_recorded_and_is_a_pause(session: Session) -> None:
    modes: list[str] = []
    session.engine.module = SimpleNamespace(  # type: ignore[assignment]
        eval=lambda: modes.append("eval"), train=lambda: modes.append("train")
    )
    session.clock.pause = lambda: modes.append("pause")  # type: ignore[method-assign]
    session.validate(25)
    assert modes == ["eval", "train", "pause"]
    metrics = {"val/loss": 2.0, "val/perplexity": 7.4, "val/bits_per_byte": 2.9}
    assert session.tracker.metrics == [(25, metrics)]  # type: ignore[attr-defined]
    assert session.progress.shown == [25]  # type: ignore[attr-defined]


def test_a_checkpoint_holds_what_a_resumed_run_needs(session: Session) -> None:
    session.validate(25)
    session.tokens_seen = 1600
    session.guard.skipped = (3, 4)
    session.save(25)
    session.save(26)
    assert isinstance(session.saver, Saver)
    (step, state), (_, later) = session.saver.saved
    assert step == 25
    assert state["val_loss"] == 2.0 and later["val_loss"] is None, "a validation of other weights is not this one's"
    assert (state["optimizer_steps"], state["tokens_seen"], state["dataset"]) == (7, 1600, "d" * 64)
    assert state["guard"]["skipped"] == [3, 4]
    assert state["config"]["name"] == "tiny" and state["mlflow_run_id"] == "an id"
    assert bytes.fromhex(state["rng"]) == torch.get_rng_state().numpy().tobytes()


def test_a_run_whose_last_save_failed_is_not_finished(session: Session) -> None:
    session.saves += [Saved(10, None, "no room", 1.0), Saved(20, Path("step_00000020"), None, 1.0)]
    session.step, session.tokens_seen = 20, 640
    result = session.result()
    assert (result.step, result.tokens_seen, result.evaluation) == (20, 640, None)
    session.saves.append(Saved(30, None, "no room either", 1.0))
    with pytest.raises(CheckpointError, match="no room either"):
        session.result()
    assert session.saver.waits == [None, None]  # type: ignore[attr-defined]


def test_failed_and_durable_saves_are_recorded_and_a_failure_is_shown(session: Session) -> None:
    for saved in (Saved(10, Path("step_00000010"), None, 1.23456, "abc"), Saved(20, None, "no room", 2.0)):
        session.report_save(saved)
    assert [saved.step for saved in session.saves] == [10, 20]
    assert session.tracker.events == [  # type: ignore[attr-defined]
        Checkpointed(step=10, path="step_00000010", digest="abc", seconds=1.235),
        CheckpointFailed(step=20, error="no room"),
    ]
    (message,) = session.progress.messages  # type: ignore[attr-defined]
    assert "step 20" in message and "no room" in message


def test_a_start_ends_once_whoever_ends_it(session: Session) -> None:
    session.fail("rank 1 is gone")
    session.fail("a broken collective")
    assert session.tracker.closed == ["FAILED"]  # type: ignore[attr-defined]
    assert session.tracker.events == [Failed(step=0, error="rank 1 is gone")]  # type: ignore[attr-defined]
    assert session.saver.waits == [sessions.FAILED_SAVE_S] * 2  # type: ignore[attr-defined]


def test_a_thread_that_hangs_in_its_last_records_is_not_waited_for(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "END_S", 0.01)
    session.ending.acquire()
    session.fail("rank 1 is gone")
    assert session.tracker.closed == []  # type: ignore[attr-defined]


def test_the_person_who_stopped_a_run_is_told_why_and_that_nothing_is_lost(session: Session) -> None:
    assert "another rank" in session.stop.message(7) and "step 7" in session.stop.message(7)
    session.stop.request("SIGUSR2")
    assert "SIGUSR2" in session.stop.message(7) and "everything is saved" in session.stop.message(7)
