"""A branch on real ranks: any layout continues its parent's curve, and a kill at any moment costs neither of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.layout import published
from pipeline.checkpoint.pins import pins
from pipeline.checkpoint.weights import load_weights
from pipeline.files import sha256_file
from pipeline.run.folder import step_name
from tests import processes
from tests.experiment import curve, events, in_precision
from tests.train.conftest import Lab
from tests.train.engine.test_numerics import TOLERANCE
from tests.train.test_resume import HALF

UNTIL = HALF + 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def branching(parent: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run that continues another one from its middle, for ten steps."""
    return {
        "init": {"from": str(parent), "step": HALF, "what": "all"}, "train.max_iters": UNTIL,
        "train.checkpoint_interval": 4, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("layout", [(2, 3, "fp32"), (2, 2, "bf16")])
def test_on_the_layout_of_its_parent_every_bit_is_the_same(lab: Lab, layout: tuple[int, int, str]) -> None:
    world, stage, precision = layout
    parent = lab.uninterrupted(world, stage, precision)
    settings = branching(parent, **in_precision(precision, world, stage))
    run = lab.train(f"branch_{world}_{stage}_{precision}", world, stage, **settings)
    assert curve(run) == curve(parent)[HALF:UNTIL]
    assert pins(parent / "checkpoints") == []


def test_on_other_layouts_it_continues_along_the_curve(lab: Lab) -> None:
    parent = lab.uninterrupted(2, 3)
    whole = [loss for _, loss in curve(lab.uninterrupted(1, 0))][HALF:UNTIL]
    for world, stage in ((1, 0), (4, 1)):
        run = lab.train(f"moved_{world}_{stage}", world, stage, **branching(parent))
        assert [loss for _, loss in curve(run)] == pytest.approx(whole, rel=TOLERANCE)


def test_weights_alone_arrive_bit_for_bit_in_the_part_of_every_rank(lab: Lab) -> None:
    """The learning rate of the first step is zero."""
    settings = {"init": {"from": str(lab.uninterrupted(1, 0)), "step": HALF}, "train.max_iters": 1}
    run = lab.train("weights", 2, 3, **settings, **in_precision("bf16", 2, 3))
    theirs, ours = weights_after(lab.uninterrupted(1, 0), HALF), weights_after(run, 1)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(run / "checkpoints" / step_name(step))


def any_file(run: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in run.glob(pattern))


MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "at once": lambda run, parent: True,
    "it holds a pin": lambda run, parent: bool(pins(parent / "checkpoints")),
    "its folder exists": lambda run, parent: run.exists(),
    "its config is written": lambda run, parent: any_file(run, "config.yaml"),
    "its provenance is written": lambda run, parent: any_file(run, "provenance.json"),
    "it is ready": lambda run, parent: bool(events(run, "started")),
    "it has trained": lambda run, parent: len(curve(run)) > 1,
    "it saves": lambda run, parent: any_file(run, "checkpoints/.step_*.tmp", "checkpoints/step_*"),
    "it has saved": lambda run, parent: bool(published(run / "checkpoints")),
    "it has let go": lambda run, parent: bool(events(run, "checkpointed")),
}


def test_killed_at_any_moment_it_loses_nothing_and_its_parent_stays_as_it_was(lab: Lab) -> None:
    parent = lab.uninterrupted(1, 0)
    before = {file: sha256_file(file) for file in parent.rglob("*") if file.is_file()}
    for number, moment in enumerate(MOMENTS.values()):
        name = f"killed_{number}"
        run, log = parent.parent / name, parent.parent.parent / "logs" / f"{name}.log"
        ranks = processes.start(["train", str(lab.config(name, **branching(parent)))], 1, log)
        reached = processes.wait_until(lambda: moment(run, parent) or ranks.poll(), 60)  # noqa: B023
        ranks.kill(signal.SIGKILL)
        ranks.end()
        assert reached and set(ranks.codes.values()) <= {-signal.SIGKILL, 0}, ranks.words()
        assert curve(lab.train(name, 1, 0, **branching(parent))) == curve(parent)[HALF:UNTIL], name
        assert pins(parent / "checkpoints") == []
    assert {file: sha256_file(file) for file in parent.rglob("*") if file.is_file()} == before
