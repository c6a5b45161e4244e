"""A run lives through a save that fails, and is not finished before its last checkpoint is there."""

from __future__ import annotations

import resource

import pytest

from pipeline.checkpoint.layout import published
from pipeline.errors import EXIT_FAILED
from tests import processes
from tests.experiment import curve, events
from tests.train.conftest import Lab

# Bytes a file may grow to: metrics, not a rank's part of a checkpoint.
LIMIT = 64 * 1024


def short_of_room(arguments: list[str]) -> None:
    """The command line, where no file of a checkpoint's size can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    processes.command(arguments)


@pytest.mark.slow
def test_without_its_last_checkpoint_a_run_ends_with_1_and_the_next_start_takes_the_steps_anew(lab: Lab) -> None:
    world, stage, name = 2, 1, "short_of_room"
    run = lab.train(name, world, stage, "train.max_iters=4")
    good = [folder.name for folder in published(run / "checkpoints")]

    changes = ["train.zero_stage=1", "train.max_iters=10", "train.checkpoint_interval=5"]
    arguments = ["train", str(lab.config(name)), *changes]
    ranks = processes.fork(short_of_room, (arguments,), world, run.parent / f"{name}.log")
    assert ranks.within(ranks.poll, 60)
    assert ranks.codes == {0: EXIT_FAILED, 1: EXIT_FAILED}
    assert "the last checkpoint could not be saved" in ranks.words() and "Traceback" not in ranks.words()
    assert [e["step"] for e in events(run, "checkpoint_failed")] == [5, 10], "the first one ended nothing"
    assert [e["step"] for e in events(run, "failed")] == [10]
    assert [folder.name for folder in published(run / "checkpoints")] == good

    lab.train(name, world, stage, *changes[1:])
    assert [e["step"] for e in events(run, "resumed")] == [4, 4]
    assert curve(run) == curve(lab.uninterrupted(world, stage))[:10]
