"""What a session saves, validates and records in real training, on one rank and on two."""

from __future__ import annotations

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
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, StopRequested
from pipeline.files import read_json
from pipeline.run.folder import CHECKPOINT_MANIFEST, step_name
from pipeline.train.engine.engine import Engine
from pipeline.train.ranks import group
from pipeline.train.session import Session
from tests import processes
from tests.experiment import curve, events, validations
from tests.train.conftest import Lab
from tests.train.tiny import tiny


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

    often = ["train.max_iters=30", "train.checkpoint_interval=2", "checkpoint.max_failures=3"]
    arguments = ["train", str(lab.config(name)), "train.zero_stage=1", *often]
    ranks = processes.fork(short_of_room, (arguments,), world, run.parent / f"{name}_often.log")
    assert ranks.within(ranks.poll, 60)
    assert ranks.codes == {0: EXIT_FAILED, 1: EXIT_FAILED}
    assert "checkpoint.max_failures" in ranks.words() and "Traceback" not in ranks.words()
    assert [e["step"] for e in events(run, "checkpoint_failed")] == [6, 8, 10]
    (failed,) = events(run, "failed")
    assert failed["step"] == 12 and "checkpoint.max_failures" in failed["error"]
    (run / "events.jsonl").unlink()
    lab.train(name, world, stage, "train.max_iters=4")

    changes = ["train.zero_stage=1", "train.max_iters=10", "train.checkpoint_interval=5"]
    arguments = ["train", str(lab.config(name)), *changes]
    ranks = processes.fork(short_of_room, (arguments,), world, run.parent / f"{name}.log")
    assert ranks.within(ranks.poll, 60)
    assert ranks.codes == {0: EXIT_FAILED, 1: EXIT_FAILED}
    assert "last checkpoint could not" in ranks.words() and "Traceback" not in ranks.words()
    assert [e["step"] for e in events(run, "checkpoint_failed")] == [5, 10], "the first failure did not end the run"
    assert [e["step"] for e in events(run, "failed")] == [10]
    assert [folder.name for folder in published(run / "checkpoints")] == good

    lab.train(name, world, stage, *changes[1:])
    assert [e["step"] for e in events(run, "resumed")] == [4, 4, 4]
    assert curve(run) == curve(lab.uninterrupted(world, stage))[:10]
