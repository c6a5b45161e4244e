"""A rank that is stopped or slow, from outside: it is named, the stacks of the others are kept."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_FAILED
from pipeline.launch.watch.run_status import RunStatus
from pipeline.launch.watch.status import statuses
from pipeline.run.related import found_runs
from tests import processes
from tests.experiment import events, last_step
from tests.processes import Ranks, wait_until
from tests.train.conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LONG = {"train.max_iters": 100_000, "train.checkpoint_interval": 100_000, "train.val_interval": 100_000}


def train_watched(arguments: list[str]) -> None:
    """A hang is reported after two seconds in place of thirty, and a stopped rank is lost after eight."""
    from pipeline.train.engine.engine import Engine
    from pipeline.train.ranks import hangs, peers

    hangs.HANG_S, hangs.TIMES_LONGEST, hangs.SILENCE_S = 2.0, 0, 1.0
    peers.HEARTBEAT_S, peers.SILENCE_S, peers.GRACE_S = 0.2, 8.0, 1.0
    whole = Engine.set_learning_rate

    def slow(self: Engine, lr: float) -> None:
        time.sleep(0.05)
        whole(self, lr)

    Engine.set_learning_rate = slow  # type: ignore[method-assign]
    processes.command(arguments)


def status(run: Path) -> RunStatus:
    (found,) = statuses(found_runs([str(run)])[0])
    return found


def stop_now_and_then(ranks: Ranks, rank: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for number, pause_s in ((signal.SIGSTOP, 0.25), (signal.SIGCONT, 0.1)):
            ranks.kill(number, [rank])
            time.sleep(pause_s)


def test_a_slowed_rank_is_named_and_a_stopped_one_leaves_the_stacks_of_those_that_wait(
    lab: Lab, tmp_path: Path
) -> None:
    config = lab.config("hung", **LONG)
    run = config.parent / "runs" / "hung"
    ranks = processes.fork(train_watched, (["train", str(config), "train.zero_stage=1"],), 2, tmp_path / "log")
    try:
        assert wait_until(lambda: last_step(run) >= 3 or ranks.poll(), 60) and not ranks.codes, ranks.words()

        stop_now_and_then(ranks, 1, 6.0)
        assert wait_until(lambda: (slowest := status(run).slowest) is not None and slowest.rank == 1, 5)
        assert not events(run, "hang"), "it is slow, and does not hang"

        ranks.kill(signal.SIGSTOP, [1])
        assert wait_until(lambda: bool(events(run, "hang")), 20), ranks.words()
        (hang,) = events(run, "hang")
        assert hang["ranks"] == [1] and hang["step"] > 3
        found = status(run)
        assert found.state == "running" and "rank 1" in str(found.hang)
        folder = Path(hang["path"])
        stacks, collectives = folder / "rank_0.txt", folder / "rank_0_collectives.json"
        assert wait_until(collectives.exists, 5)
        assert "run_loop" in stacks.read_text() and not (folder / "rank_1.txt").exists()
        assert json.loads(collectives.read_text())["entries"]

        ranks.kill(signal.SIGCONT, [1])
        assert wait_until(lambda: bool(events(run, "hang_ended")), 10), ranks.words()
        assert wait_until(lambda: status(run).hang is None and last_step(run) > hang["step"] + 1, 10)
        assert wait_until((folder / "rank_1.txt").exists, 5), "it leaves its own as soon as it can"

        ranks.kill(signal.SIGSTOP, [1])
        assert ranks.within(lambda: ranks.poll() or 0 in ranks.codes, 40), ranks.words()
        assert ranks.codes[0] == EXIT_FAILED and "rank 1" in ranks.words()
        found = status(run)
        assert found.state == "failed" and "rank 1" in found.reason and "rank 1" in str(found.hang)
    finally:
        ranks.end()


def train_with_slow_disk(arguments: list[str]) -> None:
    """Rank 1 waits for the data of its tenth step, in Python."""
    import os

    from pipeline.data.order.batches import BatchReader
    from pipeline.train.ranks import hangs, peers

    hangs.HANG_S, hangs.TIMES_LONGEST, peers.HEARTBEAT_S = 1.5, 0, 0.2
    whole, calls = BatchReader.batch, [0]

    def batch(self: BatchReader, *args: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == 20:
            wait_for_a_slow_disk()
        return whole(self, *args)

    BatchReader.batch = batch  # type: ignore[method-assign]
    processes.command(arguments)


def wait_for_a_slow_disk() -> None:
    time.sleep(6.0)


def test_the_stack_of_the_rank_that_did_not_come_shows_what_it_waits_for(lab: Lab, tmp_path: Path) -> None:
    """The run continues: the rank was only slow."""
    config = lab.config("slow_disk")
    run = config.parent / "runs" / "slow_disk"
    # Long enough after the wait for the next look, which comes each second.
    arguments = ["train", str(config), "train.zero_stage=2", "train.max_iters=400"]
    ranks = processes.fork(train_with_slow_disk, (arguments,), 2, tmp_path / "log")
    finished = ranks.wait(90)
    ranks.end()
    assert finished and set(ranks.codes.values()) == {0}, ranks.words()
    hang, ended = events(run, "hang")[-1], events(run, "hang_ended")[-1]
    assert hang["ranks"] == [1] and hang["phases"] == ["data"] and hang["step"] == 9
    assert ended["seconds"] > 3
    assert "wait_for_a_slow_disk" in (Path(hang["path"]) / "rank_1.txt").read_text()
    assert "wait_for_a_slow_disk" not in (Path(hang["path"]) / "rank_0.txt").read_text()
    assert status(run).hang is None
