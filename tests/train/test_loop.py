"""The loop in one process: the numbers of plain PyTorch, and what a run leaves behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.checkpoint.weights import load_weights
from pipeline.config.sections import Config
from pipeline.errors import PipelineError, StopRequested
from pipeline.optim.schedule import get_lr_cosine_schedule
from pipeline.run.folder import Run, run_for, step_name
from pipeline.train.engine.engine import Engine
from pipeline.train.session import TrainResult
from tests.experiment import curve, events, lines, validations
from tests.train.conftest import Trained
from tests.train.engine.reference import train_plainly
from tests.train.tiny import tiny


def test_every_step_is_that_of_plain_pytorch(trained: Trained) -> None:
    plain = train_plainly(trained.config_file, range(trained.config.train.max_iters))
    assert [loss for _, loss in curve(trained.run.path)] == pytest.approx(plain.losses, rel=1e-5)
    norms = [line["train/grad_norm"] for line in lines(trained.run.metrics_file) if "train/grad_norm" in line]
    assert norms == pytest.approx(plain.norms, rel=1e-4)


def test_the_learning_rate_follows_the_schedule_from_step_0(trained: Trained) -> None:
    optim = trained.config.optimizer
    assert optim.cosine_cycle_iters is not None
    schedule = (optim.learning_rate, optim.min_learning_rate, optim.warmup_iters, optim.cosine_cycle_iters)
    found = [line["train/lr"] for line in lines(trained.run.metrics_file) if "train/lr" in line]
    assert found == [get_lr_cosine_schedule(step, *schedule) for step in range(trained.config.train.max_iters)]


def test_a_stable_part_extended_twice_and_then_decayed_equals_the_run_planned_so(tmp_path: Path) -> None:
    def train(name: str, schedule: str, steps: int, decay_iters: int | None = None) -> Path:
        optimizer = {"schedule": schedule, "decay_iters": decay_iters, "cosine_cycle_iters": None}
        loop.train(
            config.model_copy(
                update={
                    "name": name,
                    "optimizer": config.optimizer.model_copy(update=optimizer),
                    "train": config.train.model_copy(update={"max_iters": steps}),
                }
            )
        )
        return Path(config.runs_dir) / name

    config = tiny(tmp_path)
    planned = train("planned", "wsd", 24, 8)
    for schedule, steps, decay_iters in (("constant", 6, None), ("constant", 16, None), ("wsd", 24, 8)):
        grown = train("grown", schedule, steps, decay_iters)
    assert curve(grown) == curve(planned) and len(curve(grown)) == 24
    ours, theirs = (load_weights(run / "checkpoints" / step_name(24)) for run in (grown, planned))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoints_validations_and_the_end_come_when_they_are_due(trained: Trained) -> None:
    """Ten steps: a checkpoint after each fourth, a validation after each third, both after the last."""
    assert [step_of(f) for f in reversed(published(trained.run.checkpoints))] == [4, 8, 10]
    assert [step for step, _ in validations(trained.run.path)] == [3, 6, 9, 10]
    assert [e["step"] for e in events(trained.run.path, "checkpointed")] == [4, 8, 10]
    assert [e["step"] for e in events(trained.run.path, "started")] == [0]
    assert [e["step"] for e in events(trained.run.path, "finished")] == [10]
    last = Manifest.load(trained.run.checkpoints / step_name(10)).state
    assert last["val_loss"] == validations(trained.run.path)[-1][1]
    assert Manifest.load(trained.run.checkpoints / step_name(8)).state["val_loss"] is None


def test_the_result_says_what_came_of_it(trained: Trained) -> None:
    result, train = trained.result, trained.config.train
    assert result.step == 10
    assert result.tokens_seen == 10 * train.batch_size * trained.config.model.context_length
    assert result.evaluation is not None
    assert (10, result.evaluation.loss) == validations(trained.run.path)[-1]
    assert 0 < result.seconds < 60


def test_a_run_that_is_complete_is_complete_at_once(
    trained: Trained, resumable: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "loss", lambda *args: pytest.fail("a step was begun"))
    again = loop.train(resumable)
    assert again.step == 10 and again.tokens_seen == trained.result.tokens_seen
    assert again.evaluation is None, "the validation of the last step is recorded"
    assert len(curve(run_for(resumable).path)) == 10


def interrupting(calls: list[int], at: int) -> Any:
    """The loss, with a signal in its n-th call in training."""

    whole = Engine.loss

    def loss(*args: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGUSR2)
        return whole(*args)

    return loss


def test_a_stop_saves_before_a_due_validation_and_the_next_start_continues_on_the_same_curve(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches per step: the signal comes in step 6, whose numbers are read at once."""
    config: Config = trained.again(tmp_path)
    run: Run = run_for(config)
    monkeypatch.setattr(Engine, "loss", interrupting([], 11))
    with pytest.raises(StopRequested, match="SIGUSR2.*step 6"):
        loop.train(config)
    assert step_of(published(run.checkpoints)[0]) == 6
    assert [step for step, _ in validations(run.path)] == [3]
    assert [(e["step"], e["reason"]) for e in events(run.path, "preempted")] == [(6, "SIGUSR2")]
    assert not events(run.path, "finished")

    monkeypatch.undo()
    result: TrainResult = loop.train(config)
    assert [e["step"] for e in events(run.path, "resumed")] == [6]
    assert curve(run.path) == curve(trained.run.path)
    assert validations(run.path) == validations(trained.run.path)
    assert result.tokens_seen == trained.result.tokens_seen


def test_an_error_in_a_step_is_recorded_as_the_end_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, **{"train.max_iters": 3})

    def bug(*args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Engine, "loss", bug)
    with pytest.raises(ZeroDivisionError):
        loop.train(config)
    (failed,) = events(run_for(config).path, "failed")
    assert failed["step"] == 0 and "ZeroDivisionError: a bug" in failed["error"]


def test_output_that_nobody_reads_any_longer_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, **{"train.max_iters": 3})
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        with pytest.raises(PipelineError, match="output was closed"):
            loop.train(config)
    (failed,) = events(run_for(config).path, "failed")
    assert "output was closed" in failed["error"] and "SystemExit" not in failed["error"]
