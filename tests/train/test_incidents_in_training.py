"""What is done about bad steps and spikes, injected into real training."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest
from pipeline.checkpoint.pending import PendingCheckpoint
from pipeline.checkpoint.weights import load_weights
from pipeline.errors import PipelineError, StopRequested
from pipeline.run.folder import run_for, step_name
from pipeline.train.engine.engine import Engine
from pipeline.train.session import Session
from tests import processes
from tests.experiment import curve, events
from tests.train.conftest import Lab
from tests.train.tiny import spoiling, tiny

# ---- decisions, without training ------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_bad_step_is_skipped_without_a_trace_in_weights_or_moments(stage, tmp_path, monkeypatch):
    """The spoilt step changes nothing: the optimizer has taken one step less, and everything is finite."""
    config = tiny(tmp_path, **{"train.zero_stage": stage, "train.max_iters": 6, "train.checkpoint_interval": 2})
    monkeypatch.setattr(Engine, "loss", spoiling({3}, float("nan")))
    loop.train(config)
    folders = run_for(config).checkpoints
    before, after = (load_weights(folders / step_name(s)) for s in (4, 6))
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in before), "training continued"
    assert Manifest.load(folders / step_name(6)).state["optimizer_steps"] == 5
    (event,) = events(run_for(config).path, "bad_step")
    assert event["step"] == 3
    record = json.loads(Path(event["path"]).read_text())
    assert record["batch"] == 2 and record["loss"] == "nan"
    assert len(record["samples"]) == config.train.batch_size
    assert all("self-evident" in s["text"] or len(s["text"]) > 10 for s in record["samples"])


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path, monkeypatch):
    config = tiny(tmp_path, **{"train.max_iters": 3, "train.checkpoint_interval": 1, "checkpoint.keep_last": 9})
    monkeypatch.setattr(Engine, "loss", spoiling({3}, float("inf")))
    loop.train(config)
    two, three = (load_weights(run_for(config).checkpoints / step_name(s)) for s in (2, 3))
    assert all(torch.equal(two[name], three[name]) for name in two)


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    config = tiny(tmp_path, guard={"max_bad_steps": 3})
    monkeypatch.setattr(Engine, "loss", spoiling({2, 4, 5, 6, 7}, float("nan")))
    with pytest.raises(PipelineError, match="3 steps in a row"):
        loop.train(config)
    assert [e["step"] for e in events(run_for(config).path, "bad_step")] == [2, 4, 5, 6]
    assert events(run_for(config).path, "failed")


@pytest.mark.slow
def test_by_default_a_spike_is_reported_and_training_continues(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    monkeypatch.setattr(Engine, "loss", spoiling({30}, 50.0))
    loop.train(config)
    assert [e["step"] for e in events(run_for(config).path, "spike")] == [30]
    assert not events(run_for(config).path, "rollback")


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["warn", "rollback"])
def test_a_lasting_rise_is_reported_once_and_becomes_the_usual_loss(on_spike, tmp_path, monkeypatch):
    """With nothing to roll back to, a rollback is only a warning."""
    config = tiny(tmp_path, **{"guard": {"on_spike": on_spike}, "train.checkpoint_interval": 1000})
    monkeypatch.setattr(Engine, "loss", spoiling(set(range(25, 41)), 3.0))
    loop.train(config)
    assert [e["step"] for e in events(run_for(config).path, "spike")] == [25]
    assert len(list(run_for(config).bad_batches.iterdir())) == 1


@pytest.mark.slow
def test_a_full_disk_costs_the_record_of_a_batch_and_not_the_run(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path, **{"train.max_iters": 30})

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.train.guard.write_json", full)
    monkeypatch.setattr(Engine, "loss", spoiling({3}, float("nan")))
    assert loop.train(config).step == 30
    (event,) = events(run_for(config).path, "bad_step")
    assert event["step"] == 3 and event["batch"] == 2 and event["path"] is None
    assert f"{run_for(config).bad_batches}: No space left" in event["error"]
    assert event["error"] in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_rollback_skips_the_batches_and_so_does_a_resumed_run(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    config = tiny(tmp_path / "a", guard={"on_spike": "rollback"})
    monkeypatch.setattr(Engine, "loss", spoiling({28}, 50.0))
    loop.train(config)
    (rollback,) = events(run_for(config).path, "rollback")
    assert (rollback["step"], rollback["to"], rollback["skipped"]) == (28, 20, [26, 27])
    assert len(curve(run_for(config).path)) == 40, "the repeated steps replace those before the rollback"
    final = run_for(config).checkpoints / step_name(40)
    assert Manifest.load(final).state["guard"]["skipped"] == [26, 27]

    # The same, stopped after the rollback and started again: the skip list comes out of the checkpoint.
    other = tiny(tmp_path / "b", **{"guard": {"on_spike": "rollback"}, "train.max_iters": 30})
    monkeypatch.setattr(Engine, "loss", spoiling({28}, 50.0))
    loop.train(other)
    monkeypatch.undo()
    other = tiny(tmp_path / "b", guard={"on_spike": "rollback"})
    loop.train(other)
    assert curve(run_for(other).path) == curve(run_for(config).path)
    ours, theirs = load_weights(final), load_weights(run_for(other).checkpoints / step_name(40))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
def test_a_run_that_was_stopped_rolls_back_as_one_that_was_not(tmp_path, monkeypatch):
    """The stop's checkpoint, of step 31, is too young for the first rollback, and the second needs that of step 21."""
    weights = []
    for name, stop_after in (("undisturbed", 0), ("stopped", 30)):
        (tmp_path / name).mkdir()
        settings = {"train.checkpoint_interval": 7, "checkpoint.keep_last": 1, "checkpoint.keep_best": False}
        config = tiny(tmp_path / name, guard={"on_spike": "rollback"}, **settings)
        monkeypatch.setattr(Engine, "loss", spoiling({32, 33}, 50.0))
        log = Session.log

        def logged(session: Session, step: int, *numbers: Any, stop_after: int = stop_after, log: Any = log) -> None:
            log(session, step, *numbers)
            if step == stop_after and not events(session.run.path, "preempted"):
                signal.raise_signal(signal.SIGUSR2)

        monkeypatch.setattr(Session, "log", logged)
        with pytest.raises(StopRequested, match="after step 31") if stop_after else contextlib.nullcontext():
            loop.train(config)
        if stop_after:
            loop.train(config)
        found = events(run_for(config).path, "rollback")
        assert [(e["step"], e["to"]) for e in found] == [(32, 28), (29, 21)], name
        weights.append(load_weights(run_for(config).checkpoints / step_name(40)))
        monkeypatch.undo()
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


# ---- several ranks ---------------------------------------------------------------------------


def spoil_on_one_rank(config: str, calls: list[int], factor: float) -> None:
    """Trains; the loss of rank 1 is spoilt when it is computed for these times."""
    if os.environ["RANK"] == "1":
        Engine.loss = spoiling(set(calls), factor)  # type: ignore[method-assign]
    processes.command(["train", config])


def spoilt(lab: Lab, tmp_path: Path, name: str, calls: list[int], factor: float, **changes: Any) -> Path:
    """The run folder after training on two ranks with one micro-batch per step each."""
    config = lab.config(name, **{"train.micro_batch_size": 4, "train.max_iters": 40, **changes})
    ranks = processes.fork(spoil_on_one_rank, (str(config), calls, factor), 2, tmp_path / "log")
    assert ranks.wait(120) and set(ranks.codes.values()) == {0}, ranks.words()
    return config.parent / "runs" / name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(lab: Lab, tmp_path: Path, stage: int) -> None:
    """The numbers are read one step late, and still no trace is left: the next steps are finite."""
    settings = {"train.zero_stage": stage, "train.log_interval": 5, "train.checkpoint_interval": 20}
    run = spoilt(lab, tmp_path, f"bad_{stage}", [7, 20, 33], math.inf, **settings)
    found = events(run, "bad_step")
    assert [e["step"] for e in found] == [7, 20, 33]
    assert [json.loads(Path(e["path"]).read_text())["batch"] for e in found] == [6, 19, 32]
    states = {step: Manifest.load(run / "checkpoints" / step_name(step)).state for step in (20, 40)}
    assert [states[step]["optimizer_steps"] for step in (20, 40)] == [18, 37]
    assert [states[step]["guard"]["bad_steps"] for step in (20, 40)] == [2, 3]
    weights = load_weights(run / "checkpoints" / step_name(40))
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.slow
def test_a_jump_on_one_rank_rolls_all_ranks_back_to_the_same_checkpoint(lab: Lab, tmp_path: Path) -> None:
    settings = {"guard": {"on_spike": "rollback"}, "train.log_interval": 7, "train.checkpoint_interval": 10}
    run = spoilt(lab, tmp_path, "jump", [32], 40.0, **settings)
    (rollback,) = events(run, "rollback")
    assert (rollback["step"], rollback["to"], rollback["skipped"]) == (32, 30, [30, 31])
    assert Manifest.load(run / "checkpoints" / step_name(40)).state["guard"]["skipped"] == [30, 31]
    assert [step for step, _ in curve(run)] == [1, 7, 14, 21, 28, 35, 40]


def train_jumping(config: str, at: int, save_s: float) -> None:
    """Trains with one micro-batch per step; the loss of step `at` jumps, and a save takes longer than many steps."""
    Engine.loss = spoiling({at}, 50.0)  # type: ignore[method-assign]
    publish = PendingCheckpoint.publish

    def slowly(self: PendingCheckpoint, *args: Any) -> Any:
        time.sleep(save_s)
        return publish(self, *args)

    PendingCheckpoint.publish = slowly  # type: ignore[method-assign]
    processes.command(["train", config])


def rollbacks(lab: Lab, tmp_path: Path, name: str, at: int, save_s: float, **changes: Any) -> list[tuple[int, int]]:
    """Returns from which step two ranks rolled back to which."""
    settings = {
        "train.micro_batch_size": 4, "train.max_iters": 40, "guard": {"on_spike": "rollback"}, **changes,
    }  # fmt: skip
    config = lab.config(name, **settings)
    ranks = processes.fork(train_jumping, (str(config), at, save_s), 2, tmp_path / name)
    assert ranks.wait(120) and set(ranks.codes.values()) == {0}, ranks.words()
    run = config.parent / "runs" / name
    assert [e["step"] for e in events(run, "spike")] == [at]
    return [(e["step"], e["to"]) for e in events(run, "rollback")]


@pytest.mark.slow
@pytest.mark.parametrize("save_s", [0.0, 1.5])
def test_the_checkpoint_before_a_jump_outlives_the_save_in_progress(lab: Lab, tmp_path: Path, save_s: float) -> None:
    """The save of step 30 ends after the jump at step 31 is seen; it must not delete the checkpoint of step 20."""
    keeping = {"train.checkpoint_interval": 10, "checkpoint": {"keep_last": 1, "keep_best": False}}
    assert rollbacks(lab, tmp_path, f"outlives_{save_s}", 31, save_s, **keeping) == [(31, 20)]


@pytest.mark.slow
@pytest.mark.parametrize("save_s", [0.0, 1.5])
def test_a_rollback_waits_for_a_first_checkpoint_that_is_still_being_written(
    lab: Lab, tmp_path: Path, save_s: float
) -> None:
    assert rollbacks(lab, tmp_path, f"first_{save_s}", 32, save_s, **{"train.checkpoint_interval": 30}) == [(32, 30)]
