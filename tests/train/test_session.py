"""What a session counts, records and saves, and the validation that it runs for the start before it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipeline.train.clock as clock
import pipeline.train.evaluate as evaluating
import pipeline.train.loop as loop
import pipeline.train.ranks.stop as stopping
import pipeline.train.session as sessions
from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.saver import Saved
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, CheckpointError, StopRequested
from pipeline.files import read_json
from pipeline.model.flops import flops_per_token
from pipeline.run.events import Checkpointed, CheckpointFailed, Failed
from pipeline.run.folder import CHECKPOINT_MANIFEST, step_name
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.evaluate import Evaluation
from pipeline.train.ranks import group
from pipeline.train.session import Session, every
from tests import processes
from tests.experiment import curve, events, validations
from tests.train.conftest import Lab
from tests.train.fakes import Progress, Saver, Tracker, fake_session, pending
from tests.train.tiny import tiny

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
        session.reader = SimpleNamespace(batch=batch)  # type: ignore[assignment]
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
    session.clock.step_s, session.clock.longest_pause_s = 2.0, pause
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
    assert "another rank" in session.stop_message(7) and "step 7" in session.stop_message(7)
    session.stop.request("SIGUSR2")
    assert "SIGUSR2" in session.stop_message(7) and "everything is saved" in session.stop_message(7)


# ---- real training --------------------------------------------------------------------------------


def train_disturbed(arguments: list[str], asked_after: int, fails_after: int) -> None:
    """Trains; rank 1 is asked to stop after a step, or fails after another."""
    log = Session.log

    def disturbed(self: Session, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == asked_after and os.environ["RANK"] == "1":
            self.stop.request("SIGUSR2")
        if step == fails_after:
            raise ZeroDivisionError("a bug")

    Session.log = disturbed  # type: ignore[method-assign]
    processes.command(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("stops_at", "last"), [(25, 30), (30, 30)])
def test_a_validation_skipped_by_a_stop_is_run_once_by_the_next_start(
    lab: Lab, tmp_path: Path, stops_at: int, last: int
) -> None:
    """This includes the last step's; a third start from the same checkpoint does not run it again."""
    name = f"missed_{stops_at}"
    arguments = ["train", str(lab.config(name)), "train.zero_stage=1", f"train.max_iters={last}"]
    run = lab.config(name).parent / "runs" / name

    ranks = processes.fork(train_disturbed, (arguments, stops_at - 1, 0), 2, tmp_path / "stopped")
    assert ranks.wait(90) and set(ranks.codes.values()) == {EXIT_STOPPED}, ranks.words()
    assert [step_of(f) for f in published(run / "checkpoints")] == [stops_at]
    assert stops_at not in dict(validations(run)), "the stop had been agreed when it was due"

    if stops_at < last:
        ranks = processes.fork(train_disturbed, (arguments, 0, stops_at + 2), 2, tmp_path / "failed")
        assert ranks.wait(90) and set(ranks.codes.values()) == {EXIT_FAILED}, ranks.words()
        assert [step for step, _ in validations(run)] == [stops_at]
    lab.train(name, 2, 1, f"train.max_iters={last}")
    whole = lab.uninterrupted(2, 1)
    assert curve(run) == curve(whole)[:last]
    assert [step for step, _ in validations(run)] == [25, 30]
    assert validations(run)[0] == validations(whole)[0]
    assert len(events(run, "finished")) == 1


class Clock:
    """Stands in for the module `time`: it moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "stops_at"),
    [
        pytest.param(1045.0, 10, id="the first, not measured yet"),
        pytest.param(1075.0, 20, id="the second"),
    ],
)
def test_a_wall_clock_limit_accounts_for_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, stops_at: int
) -> None:
    """From 1000 on: steps of 1 s, and after each tenth a validation of 30 s, until 1040 and 1080."""
    fake = Clock()
    for module in (clock, sessions, stopping):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setenv("PIPELINE_DEADLINE", str(limit))

    whole = Engine.loss

    def step(*args: Any) -> Any:
        fake.now += torch.is_grad_enabled()
        return whole(*args)

    def validation(*args: Any, **kwargs: Any) -> evaluating.Evaluation:
        fake.now += 30.0
        return evaluating.evaluate(*args, **kwargs)

    monkeypatch.setattr(Engine, "loss", step)
    monkeypatch.setattr(sessions, "evaluate", validation)
    config = tiny(
        tmp_path,
        **{
            "train.val_interval": 10,
            "train.num_val_batches": 30,
            "train.checkpoint_interval": 1000,
            "train.max_iters": 90,
        },
    )
    with pytest.raises(StopRequested, match=f"time limit.* after step {stops_at};"):
        loop.train(config)
    assert fake.now + 1.5 * clock.UNKNOWN_SAVE_S < limit, "there was time for a save"
    (newest,) = published(Path(config.runs_dir) / config.name / "checkpoints")
    assert verify(newest).step == stops_at


def train_reading_late(arguments: list[str]) -> None:
    """Trains; rank 1 is slow to read from the store whether the last checkpoint is durable."""
    wait = Session.wait_until_durable

    def late(self: Session) -> None:
        store = group.store()

        def get(key: str) -> bytes:
            time.sleep(1)
            return store.get(key)

        group.store = lambda: SimpleNamespace(add=store.add, wait=store.wait, get=get)  # type: ignore[assignment]
        wait(self)

    if os.environ["RANK"] == "1":
        Session.wait_until_durable = late  # type: ignore[method-assign]
    processes.command(arguments)


@pytest.mark.slow
def test_rank_0_does_not_leave_before_every_rank_knows_the_outcome(lab: Lab, tmp_path: Path) -> None:
    arguments = ["train", str(lab.config("read_late")), "train.max_iters=2"]
    ranks = processes.fork(train_reading_late, (arguments,), 2, tmp_path / "log")
    assert ranks.wait(90) and ranks.codes == {0: 0, 1: 0}, ranks.words()


@pytest.mark.slow
def test_a_checkpoint_is_reported_without_reading_its_manifest_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a thousand ranks it has tens of megabytes, and parsing it stalls training."""
    config = tiny(tmp_path, **{"train.max_iters": 3})
    monkeypatch.setattr(layout.Manifest, "load", lambda folder: pytest.fail(f"{folder} is read again"))
    loop.train(config)
    monkeypatch.undo()
    run = Path(config.runs_dir) / config.name
    (saved,) = events(run, "checkpointed")
    assert saved["digest"] == read_json(run / "checkpoints" / step_name(3) / CHECKPOINT_MANIFEST)["digest"]


# Largest file in bytes: enough for metrics, too little for a rank's part of a checkpoint.
LIMIT = 64 * 1024


def short_of_room(arguments: list[str]) -> None:
    """Runs the command line where no file of a checkpoint's size can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    processes.command(arguments)


@pytest.mark.slow
def test_without_its_last_checkpoint_a_run_ends_with_1_and_the_next_start_repeats_the_steps(lab: Lab) -> None:
    world, stage, name = 2, 1, "short_of_room"
    run = lab.train(name, world, stage, "train.max_iters=4")
    good = [folder.name for folder in published(run / "checkpoints")]

    changes = ["train.zero_stage=1", "train.max_iters=10", "train.checkpoint_interval=5"]
    arguments = ["train", str(lab.config(name)), *changes]
    ranks = processes.fork(short_of_room, (arguments,), world, run.parent / f"{name}.log")
    assert ranks.within(ranks.poll, 60)
    assert ranks.codes == {0: EXIT_FAILED, 1: EXIT_FAILED}
    assert "the last checkpoint could not be saved" in ranks.words() and "Traceback" not in ranks.words()
    assert [e["step"] for e in events(run, "checkpoint_failed")] == [5, 10], "the first failure did not end the run"
    assert [e["step"] for e in events(run, "failed")] == [10]
    assert [folder.name for folder in published(run / "checkpoints")] == good

    lab.train(name, world, stage, *changes[1:])
    assert [e["step"] for e in events(run, "resumed")] == [4, 4]
    assert curve(run) == curve(lab.uninterrupted(world, stage))[:10]
