"""A stop comes before a validation that is due; the next start makes up for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.clock as clock
import pipeline.train.evaluate as evaluating
import pipeline.train.loop as loop
import pipeline.train.ranks.stop as stopping
import pipeline.train.session as sessions
from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.saver import Saved
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, StopRequested
from pipeline.files import read_json
from pipeline.model.loss import cross_entropy
from pipeline.run.folder import step_name
from pipeline.train.session import Session
from tests import processes
from tests.experiment import curve, events, validations
from tests.train.conftest import Lab
from tests.train.test_guard import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


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


@pytest.mark.parametrize(("stops_at", "last"), [(25, 30), (30, 30)])
def test_a_validation_left_out_by_a_stop_is_made_up_for_once(
    lab: Lab, tmp_path: Path, stops_at: int, last: int
) -> None:
    """Also that of the last step; and not again by a third start, from the same checkpoint."""
    name = f"left_out_{stops_at}"
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
    """Stands in for the module `time`: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time


@pytest.mark.parametrize(
    ("limit", "stops_at"),
    [
        pytest.param(1045.0, 10, id="the first, which nobody has measured"),
        pytest.param(1075.0, 20, id="the second"),
    ],
)
def test_a_wall_clock_limit_reckons_with_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, stops_at: int
) -> None:
    """From 1000 on: steps of 1 s, and after each tenth a validation of 30 s, until 1040 and 1080."""
    fake = Clock()
    for module in (clock, sessions, stopping):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setenv("PIPELINE_DEADLINE", str(limit))

    def step(*args: Any) -> Any:
        fake.now += 1.0
        return cross_entropy(*args)

    def validation(*args: Any, **kwargs: Any) -> evaluating.Evaluation:
        fake.now += 30.0
        return evaluating.evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "cross_entropy", step)
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


def test_a_checkpoint_is_reported_without_reading_its_manifest_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a thousand ranks it has tens of megabytes, which are parsed while training stands still."""
    config = tiny(tmp_path, **{"train.max_iters": 3})
    monkeypatch.setattr(layout.Manifest, "load", lambda folder: pytest.fail(f"{folder} is read again"))
    loop.train(config)
    monkeypatch.undo()
    run = Path(config.runs_dir) / config.name
    (saved,) = events(run, "checkpointed")
    assert saved["digest"] == read_json(run / "checkpoints" / step_name(3) / layout.MANIFEST)["digest"]


def test_a_failed_save_does_not_count_as_what_a_save_takes() -> None:
    durable, failed = Saved(10, Path("step_00000010"), None, 4.0), Saved(20, None, "no part of rank 3", 1800.0)
    assert clock.longest_save_s([durable, failed]) == 4.0
    assert clock.longest_save_s([failed]) == clock.UNKNOWN_SAVE_S
