"""`pipeline profile` on a running training of two ranks: named traces, and not a bit of a loss changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.errors import EXIT_USAGE
from tests import processes
from tests.experiment import curve, events, last_step, validations
from tests.processes import wait_until
from tests.train.conftest import Lab
from tests.train.profile.traces import spans

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def train_slowly(arguments: list[str]) -> None:
    """Every step takes a tenth of a second, so that there is time to ask."""
    from pipeline.train.engine.engine import Engine

    whole = Engine.set_learning_rate

    def slow(self: Engine, lr: float) -> None:
        time.sleep(0.1)
        whole(self, lr)

    Engine.set_learning_rate = slow  # type: ignore[method-assign]
    processes.command(arguments)


def test_a_profile_of_a_running_training_shows_its_phases_and_changes_no_loss(lab: Lab, tmp_path: Path) -> None:
    whole = lab.uninterrupted(2, 1)
    arguments = ["train", str(lab.config("profiled")), "train.zero_stage=1"]
    run = whole.with_name("profiled")
    ranks = processes.fork(train_slowly, (arguments,), 2, tmp_path / "train")
    try:
        assert wait_until(lambda: last_step(run) >= 3 or ranks.poll(), 60) and not ranks.codes, ranks.words()
        missing = processes.start_alone(["profile", str(run), "--ranks", "0,2"], tmp_path / "missing")
        asked = processes.start_alone(["profile", str(run), "--steps", "3", "--ranks", "0,1"], tmp_path / "profile")
        assert missing.wait(30) and missing.codes == {0: EXIT_USAGE}, missing.words()
        assert asked.wait(60) and asked.codes == {0: 0}, asked.words()
        assert not ranks.poll(), "it was written while the run trained"
        assert ranks.wait(60) and set(ranks.codes.values()) == {0}, ranks.words()
    finally:
        ranks.end()
    late = processes.start_alone(["profile", str(run)], tmp_path / "late")
    assert late.wait(30) and late.codes == {0: EXIT_USAGE}, late.words()

    (began,), (done,) = events(run, "profile_began"), events(run, "profiled")
    assert done["problems"] == []
    traces = [Path(file) for file in done["files"] if "trace" in file]
    assert len(done["files"]) == 4 and len(traces) == 2
    assert all(file in asked.words() for file in done["files"])
    for trace in traces:
        shown = spans(trace)
        steps = [span for span in shown if span[0].startswith("step")]
        assert [name for name, _, _ in steps] == [f"step {began['step'] + i}" for i in (1, 2, 3)]
        assert phases_of(steps[1], shown) == ["data", "forward", "backward"] * 2 + ["reduce and clip", "optimizer"]
    assert not (run / "profiles" / "request.json").exists()
    (network,) = events(run, "network")
    assert (network["ranks"], network["nodes"]) == (2, 1) and network["gb_per_s"] > 0
    assert curve(run) == curve(whole) and validations(run) == validations(whole)


def phases_of(step: tuple[str, float, float], shown: list[tuple[str, float, float]]) -> list[str]:
    """Our own phases inside a step, in their order."""
    ours = {"data", "forward", "backward", "reduce and clip", "optimizer"}
    _, begin, end = step
    return [name for name, first, last in shown if begin <= first and last <= end and name in ours]
