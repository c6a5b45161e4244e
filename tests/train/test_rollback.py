"""A rollback goes where the steps say, however fast or slow the disk is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.loop as loop
from pipeline.checkpoint.pending import PendingCheckpoint
from tests import processes
from tests.experiment import events
from tests.train.conftest import Lab
from tests.train.test_guard import Sabotage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def train_jumping(config: str, at: int, save_s: float) -> None:
    """Trains with one micro-batch a step; the loss of step `at` jumps, and a save takes longer than many steps."""
    loop.cross_entropy = Sabotage({at}, 50.0)  # type: ignore[assignment]
    publish = PendingCheckpoint.publish

    def slowly(self: PendingCheckpoint, *args: Any) -> Any:
        time.sleep(save_s)
        return publish(self, *args)

    PendingCheckpoint.publish = slowly  # type: ignore[method-assign]
    processes.command(["train", config])


def rollbacks(lab: Lab, tmp_path: Path, name: str, at: int, save_s: float, **changes: Any) -> list[tuple[int, int]]:
    """From which step two ranks went back to which."""
    settings = {
        "train.micro_batch_size": 4, "train.max_iters": 40, "guard": {"on_spike": "rollback"}, **changes,
    }  # fmt: skip
    config = lab.config(name, **settings)
    ranks = processes.fork(train_jumping, (str(config), at, save_s), 2, tmp_path / name)
    assert ranks.wait(120) and set(ranks.codes.values()) == {0}, ranks.words()
    run = config.parent / "runs" / name
    assert [e["step"] for e in events(run, "spike")] == [at]
    return [(e["step"], e["to"]) for e in events(run, "rollback")]


@pytest.mark.parametrize("save_s", [0.0, 1.5])
def test_the_checkpoint_before_a_jump_outlives_the_save_under_way(lab: Lab, tmp_path: Path, save_s: float) -> None:
    """The save of step 30 ends after the jump at 31 was seen; it must not take away the checkpoint of step 20."""
    keeping = {"train.checkpoint_interval": 10, "checkpoint": {"keep_last": 1, "keep_best": False}}
    assert rollbacks(lab, tmp_path, f"outlives_{save_s}", 31, save_s, **keeping) == [(31, 20)]


@pytest.mark.parametrize("save_s", [0.0, 1.5])
def test_a_first_checkpoint_still_being_written_is_gone_back_to(lab: Lab, tmp_path: Path, save_s: float) -> None:
    assert rollbacks(lab, tmp_path, f"first_{save_s}", 32, save_s, **{"train.checkpoint_interval": 30}) == [(32, 30)]
