"""The checkpoint that a run branched from stays until the run has one of its own."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest, published
from pipeline.checkpoint.pins import pins
from pipeline.checkpoint.retention import Retention
from pipeline.config.sections import Config
from pipeline.config.train_sections import CheckpointConfig
from pipeline.errors import UsageError
from pipeline.run.folder import Run, run_for
from pipeline.train.engine.engine import Engine
from tests.experiment import curve
from tests.train.origin.lineage import AT, Lineage, checkpoint


def killed_before_its_first_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def dies(engine: Engine) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "step", dies)
        loop.train(config)


def retain_only_the_newest(run: Run) -> list[str]:
    keeper = Retention(run.checkpoints, CheckpointConfig(keep_last=1, keep_best=False))
    keeper.remove_old(published(run.checkpoints)[0], None)
    return [folder.name for folder in published(run.checkpoints)]


def test_killed_before_its_first_checkpoint_it_starts_from_the_same_one_again(
    line: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint(line.run, 10)
    shutil.move(newest, line.folder)
    config = line.branch(**{"init.step": "newest"})
    killed_before_its_first_checkpoint(config, monkeypatch)
    shutil.move(line.folder / newest.name, newest)  # the parent trains on meanwhile
    assert retain_only_the_newest(line.run) == ["step_00000010", "step_00000008"]
    loop.train(config)
    assert curve(run_for(config).path) == curve(line.run.path)[8:]
    assert pins(line.run.checkpoints) == []
    assert retain_only_the_newest(line.run) == ["step_00000010"]


def test_killed_between_its_first_save_and_letting_go_it_lets_go_at_the_next_start(
    line: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = line.branch(**{"train.max_iters": 8})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.train.session.unpin", lambda *_: None)
        loop.train(config)
    assert len(pins(line.run.checkpoints)) == 1
    loop.train(config.model_copy(update={"train": config.train.model_copy(update={"max_iters": 9})}))
    assert pins(line.run.checkpoints) == []


def test_the_checkpoint_it_started_from_must_still_be_that_one(line: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    config = line.branch()
    killed_before_its_first_checkpoint(config, monkeypatch)
    gone = checkpoint(line.run, AT)
    other = Manifest.load(gone)
    other.state["val_loss"] = 1.25
    other.save(gone)
    with pytest.raises(UsageError, match="digest"):
        loop.train(config)
    shutil.rmtree(gone)
    with pytest.raises(UsageError, match="step_00000004"):
        loop.train(config)


@pytest.mark.parametrize(("kept_forever", "told"), [(3, True), (2, False)])
def test_a_parent_that_cannot_be_written_is_no_obstacle_and_a_risk_is_told(
    line: Lineage,
    kept_forever: int,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    folder = checkpoint(line.run, AT)
    manifest = Manifest.load(folder)
    manifest.state["config"]["checkpoint"]["keep_every"] = kept_forever
    manifest.save(folder)
    monkeypatch.setattr("pipeline.train.origin.branch.pin", refused)
    loop.train(line.branch())
    assert ("Permission denied" in "".join(capfd.readouterr())) is told


def test_a_checkpoint_outside_a_run_is_a_parent_too_and_gets_no_pin(
    line: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = line.folder / "received"
    shutil.copytree(checkpoint(line.run, AT), alone)
    config = line.branch(place=alone, **{"init.step": None})
    killed_before_its_first_checkpoint(config, monkeypatch)
    assert [f.name for f in line.folder.glob("*.pin.*")] == []
    loop.train(config)
    assert curve(run_for(config).path) == curve(line.run.path)[AT:]
