"""Two starts of one run: the one that lost it ends at once and writes nothing more."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.startup as startup
from pipeline.checkpoint import pending
from pipeline.checkpoint.pending import lost_to, take_over
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.saver import Saved
from pipeline.config.sections import Config
from pipeline.errors import EXIT_FAILED, EXIT_USAGE, CheckpointError
from pipeline.run.events import CheckpointFailed, Event
from pipeline.run.folder import run_for
from pipeline.train.startup import open_session
from tests import processes
from tests.checkpoint.support import fragments, saver
from tests.experiment import curve, events, last_step, lines, validations
from tests.processes import wait_until
from tests.tracking.support import make_run
from tests.train.conftest import Lab


def train_slowly(arguments: list[str], seconds: float) -> None:
    """Every step takes so long."""
    from pipeline.train.engine.engine import Engine

    whole = Engine.loss

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return whole(*args)

    Engine.loss = slow  # type: ignore[method-assign]
    processes.command(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("step_s", "log_interval"), [(0.2, 1), (60.0, 1)], ids=["short steps", "a step that hangs"])
def test_the_start_that_lost_the_run_ends_within_seconds_and_writes_nothing_more(
    lab: Lab, tmp_path: Path, step_s: float, log_interval: int
) -> None:
    whole = lab.uninterrupted(2, 1)
    name = f"superseded_{step_s:g}"
    arguments = ["train", str(lab.config(name)), "train.zero_stage=1", f"train.log_interval={log_interval}"]
    run = whole.with_name(name)
    first = processes.fork(train_slowly, (arguments, step_s), 2, tmp_path / "first")
    try:
        assert wait_until(lambda: bool(events(run, "started")) or first.poll(), 60), first.words()

        refused = processes.start(arguments, 1, tmp_path / "refused")
        assert refused.within(refused.poll, 60) and refused.codes == {0: EXIT_USAGE}, refused.words()
        assert socket.gethostname() in refused.words() and "--take-over" in refused.words()
        assert not first.poll(), first.words()

        processes.run([*arguments, "--take-over"], 2, tmp_path / "second")
        assert first.within(first.poll, 30), "the start that lost still runs"
    finally:
        first.end()
    assert set(first.codes.values()) == {EXIT_FAILED}
    assert "taken over" in first.words() and "Traceback" not in first.words()
    assert [line["event"] for line in lines(run / "events.jsonl")][-1] == "finished" and not events(run, "failed")
    assert not events(run, "checkpoint_failed")
    assert curve(run) == curve(whole) and validations(run) == validations(whole)
    assert last_step(run) == 100


def test_a_save_is_not_begun_once_another_start_has_taken_over(tmp_path: Path) -> None:
    take_over(tmp_path, "a1")
    one = saver(tmp_path, [])
    one.save(1, fragments(1.0), {})
    one.wait()
    assert one.superseded() is None
    take_over(tmp_path, "a2")
    assert one.superseded() is not None
    with pytest.raises(CheckpointError, match="taken over"):
        one.save(2, fragments(2.0), {})


def test_a_save_that_another_start_overtook_at_its_rename_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new start may have looked for the newest checkpoint before."""
    real = pending.publish_dir

    def overtaken(temp: Path, final: Path) -> None:
        real(temp, final)
        take_over(tmp_path, "a2")

    monkeypatch.setattr(pending, "publish_dir", overtaken)
    take_over(tmp_path, "a1")
    reports: list[Saved] = []
    one = saver(tmp_path, reports)
    one.save(1, fragments(1.0), {})
    one.wait()
    assert [report.path for report in reports] == [None] and "taken over" in str(reports[0].error)
    assert verify(tmp_path / "step_00000001").step == 1, "whole, for whoever comes next"


def test_a_start_looks_for_the_newest_checkpoint_once_no_older_start_can_publish(
    resumable: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older start published in between would be trained once more, and its metrics lost in a crash."""
    checkpoints, real = run_for(resumable).checkpoints, startup.find_checkpoint
    take_over(checkpoints, "older")
    seen: list[bool] = []

    def looking(*args: Any) -> Any:
        seen.append(lost_to(checkpoints, "older") is not None)
        return real(*args)

    monkeypatch.setattr(startup, "find_checkpoint", looking)
    with open_session(resumable):
        assert seen == [True]


def test_an_owner_file_that_cannot_be_read_takes_nothing_over(tmp_path: Path) -> None:
    take_over(tmp_path, "a1")
    one = saver(tmp_path, [])
    (tmp_path / ".attempt").unlink()
    assert one.superseded() is None


def test_a_superseded_tracker_writes_no_line_event_or_state(tmp_path: Path) -> None:
    from pipeline import tracking

    run, config = make_run(tmp_path, "none")
    lost: list[bool] = []
    arguments: dict[str, Any] = {"provenance": {}, "dataset": {}, "tokenizer_file": None}
    tracker = tracking.start(run, config, step=0, superseded=lambda: bool(lost), **arguments)
    tracker.log(5, {"train/loss": 2.0})
    kept = {file: file.read_bytes() for file in (run.metrics_file, run.events_file, run.mlflow_file)}
    lost.append(True)
    tracker.log(10, {"train/loss": 1.0})
    failed: Event = CheckpointFailed(step=10, error="taken over")
    tracker.event(failed)
    tracker.rewind(3)
    tracker.close("FAILED")
    assert {file: file.read_bytes() for file in kept} == kept
