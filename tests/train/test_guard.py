"""Guards: bad gradients and loss spikes, injected into real training."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest
from pipeline.checkpoint.weights import load_weights
from pipeline.config.load import load_config
from pipeline.config.sections import Config, GuardConfig
from pipeline.data.build.display import prepare_here
from pipeline.errors import PipelineError
from pipeline.model.loss import cross_entropy
from pipeline.run.folder import run_for, step_name
from pipeline.train.guard import Guard, data_index
from tests import experiment, processes
from tests.test_bad_input import experiment as tiny_experiment
from tests.train.conftest import Lab


@given(st.integers(0, 200), st.sets(st.integers(0, 150), max_size=30))
def test_steps_train_on_every_batch_that_is_not_skipped_in_order(step, skipped):
    expected = [i for i in range(400) if i not in skipped]
    assert data_index(step, tuple(skipped)) == expected[step]


def test_a_spike_stands_out_of_the_window_and_does_not_enter_it():
    guard = Guard(GuardConfig(spike_window=30, spike_sigma=5))
    assert not any(guard.is_spike(3.0 + 0.1 * math.sin(i)) for i in range(30))
    assert guard.is_spike(9.0) and guard.is_spike(9.0)
    assert not guard.is_spike(3.1)


def test_a_guard_restored_from_its_state_decides_alike():
    losses = [2.0 + 0.2 * math.cos(i) for i in range(50)]
    whole, first = Guard(GuardConfig()), Guard(GuardConfig())
    for loss in losses[:25]:
        whole.is_spike(loss), first.is_spike(loss)
    second = Guard(GuardConfig(), json.loads(json.dumps(first.state())))
    for loss in [*losses[25:], 8.0]:
        assert whole.is_spike(loss) == second.is_spike(loss)
    whole.accept(8.0), second.accept(8.0)
    assert whole.is_spike(7.0) == second.is_spike(7.0)
    assert whole.state() == second.state()


class Sabotage:
    """Stands in for the loss and spoils it when it is called for the n-th time."""

    def __init__(self, at: set[int], factor: float) -> None:
        self.at, self.factor, self.calls = at, factor, 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = cross_entropy(logits, targets)
        return loss * self.factor if self.calls in self.at else loss


def tiny(folder: Path, **changes: Any) -> Config:
    settings = {
        "train.max_iters": 40, "train.log_interval": 1, "train.val_interval": 1000, "train.checkpoint_interval": 10,
        "optimizer.cosine_cycle_iters": 40, "optimizer.learning_rate": 1e-3, "optimizer.min_learning_rate": 1e-4,
    }  # fmt: skip
    config = load_config(tiny_experiment(folder, **settings | changes))
    prepare_here(config, None)
    return config


def events(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run_for(config).events_file.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(config: Config) -> list[float]:
    lines = [json.loads(line) for line in run_for(config).metrics_file.read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_is_skipped_without_a_trace_in_weights_or_moments(stage, tmp_path, monkeypatch):
    """The spoilt step must change nothing: the optimiser has taken one step less, and all is finite."""
    config = tiny(tmp_path, **{"train.zero_stage": stage, "train.max_iters": 6, "train.checkpoint_interval": 2})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({3}, float("nan")))
    loop.train(config)
    folders = run_for(config).checkpoints
    before, after = (load_weights(folders / step_name(s)) for s in (4, 6))
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in before), "training went on"
    assert Manifest.load(folders / step_name(6)).state["optimizer_steps"] == 5
    (event,) = events(config, "bad_step")
    assert event["step"] == 3
    record = json.loads(Path(event["path"]).read_text())
    assert record["batch"] == 2 and record["loss"] == "nan"
    assert len(record["samples"]) == config.train.batch_size
    assert all("self-evident" in s["text"] or len(s["text"]) > 10 for s in record["samples"])


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path, monkeypatch):
    config = tiny(tmp_path, **{"train.max_iters": 3, "train.checkpoint_interval": 1, "checkpoint.keep_last": 9})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({3}, float("inf")))
    loop.train(config)
    two, three = (load_weights(run_for(config).checkpoints / step_name(s)) for s in (2, 3))
    assert all(torch.equal(two[name], three[name]) for name in two)


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    config = tiny(tmp_path, guard={"max_bad_steps": 3})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({2, 4, 5, 6, 7}, float("nan")))
    with pytest.raises(PipelineError, match="3 steps in a row"):
        loop.train(config)
    assert [e["step"] for e in events(config, "bad_step")] == [2, 4, 5, 6]
    assert events(config, "failed")


@pytest.mark.slow
def test_a_spike_is_reported_and_training_goes_on_by_default(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({30}, 50.0))
    loop.train(config)
    assert [e["step"] for e in events(config, "spike")] == [30]
    assert not events(config, "rollback")


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["warn", "rollback"])
def test_a_lasting_rise_is_reported_and_then_what_losses_are_compared_with(on_spike, tmp_path, monkeypatch):
    """With nothing to go back to a rollback is no more than a warning."""
    config = tiny(tmp_path, **{"guard": {"on_spike": on_spike}, "train.checkpoint_interval": 1000})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage(set(range(25, 41)), 3.0))
    loop.train(config)
    assert [e["step"] for e in events(config, "spike")] == [25]
    assert len(list(run_for(config).bad_batches.iterdir())) == 1


@pytest.mark.slow
def test_a_full_disk_costs_the_record_of_a_batch_and_not_the_run(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path, **{"train.max_iters": 30})

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.train.guard.write_json", full)
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({3}, float("nan")))
    assert loop.train(config).step == 30
    (event,) = events(config, "bad_step")
    assert event["step"] == 3 and event["batch"] == 2 and event["path"] is None
    assert event["error"] == f"batch 2 could not be written to {run_for(config).bad_batches}: No space left on device"
    assert event["error"] in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_rollback_leaves_the_batches_out_and_a_resumed_run_does_too(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    config = tiny(tmp_path / "a", guard={"on_spike": "rollback"})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({28}, 50.0))
    loop.train(config)
    (rollback,) = events(config, "rollback")
    assert (rollback["step"], rollback["to"], rollback["skipped"]) == (28, 20, [26, 27])
    assert len(losses(config)) == 40, "the repeated steps replace those before the rollback"
    final = run_for(config).checkpoints / step_name(40)
    assert Manifest.load(final).state["guard"]["skipped"] == [26, 27]

    # The same, stopped after the rollback and started again: the skip list comes out of the checkpoint.
    other = tiny(tmp_path / "b", **{"guard": {"on_spike": "rollback"}, "train.max_iters": 30})
    monkeypatch.setattr(loop, "cross_entropy", Sabotage({28}, 50.0))
    loop.train(other)
    monkeypatch.setattr(loop, "cross_entropy", cross_entropy)
    other = tiny(tmp_path / "b", guard={"on_spike": "rollback"})
    loop.train(other)
    assert losses(other) == losses(config)
    ours, theirs = load_weights(final), load_weights(run_for(other).checkpoints / step_name(40))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


# ---- several ranks ---------------------------------------------------------------------------


def spoil_on_one_rank(config: str, calls: list[int], factor: float) -> None:
    """Trains; the loss of rank 1 is spoilt when it is computed for these times."""
    if os.environ["RANK"] == "1":
        loop.cross_entropy = Sabotage(set(calls), factor)  # type: ignore[assignment]
    processes.command(["train", config])


def spoilt(lab: Lab, tmp_path: Path, name: str, calls: list[int], factor: float, **changes: Any) -> Path:
    """The run folder after training on two ranks with one micro-batch a step each."""
    config = lab.config(name, **{"train.micro_batch_size": 4, "train.max_iters": 40, **changes})
    ranks = processes.fork(spoil_on_one_rank, (str(config), calls, factor), 2, tmp_path / "log")
    assert ranks.wait(120) and set(ranks.codes.values()) == {0}, ranks.words()
    return config.parent / "runs" / name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(lab: Lab, tmp_path: Path, stage: int) -> None:
    """Seen one step late (nothing is logged there), and yet without a trace: the next steps are finite."""
    settings = {"train.zero_stage": stage, "train.log_interval": 5, "train.checkpoint_interval": 20}
    run = spoilt(lab, tmp_path, f"bad_{stage}", [7, 20, 33], math.inf, **settings)
    found = experiment.events(run, "bad_step")
    assert [e["step"] for e in found] == [7, 20, 33]
    assert [json.loads(Path(e["path"]).read_text())["batch"] for e in found] == [6, 19, 32]
    states = {step: Manifest.load(run / "checkpoints" / step_name(step)).state for step in (20, 40)}
    assert [states[step]["optimizer_steps"] for step in (20, 40)] == [18, 37]
    assert [states[step]["guard"]["bad_steps"] for step in (20, 40)] == [2, 3]
    weights = load_weights(run / "checkpoints" / step_name(40))
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.slow
def test_a_jump_on_one_rank_takes_all_ranks_back_to_the_same_checkpoint(lab: Lab, tmp_path: Path) -> None:
    settings = {"guard": {"on_spike": "rollback"}, "train.log_interval": 7, "train.checkpoint_interval": 10}
    run = spoilt(lab, tmp_path, "jump", [32], 40.0, **settings)
    (rollback,) = experiment.events(run, "rollback")
    assert (rollback["step"], rollback["to"], rollback["skipped"]) == (32, 30, [30, 31])
    assert Manifest.load(run / "checkpoints" / step_name(40)).state["guard"]["skipped"] == [30, 31]
    assert [step for step, _ in experiment.curve(run)] == [1, 7, 14, 21, 28, 35, 40]
