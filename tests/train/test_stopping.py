"""A request saves everything once and ends with status 85; a rank that dies ends the other ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import verify
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED
from tests import processes
from tests.experiment import events, last_step
from tests.processes import Ranks, wait_until
from tests.train.conftest import Lab

LONG = {"train.max_iters": 100_000, "train.checkpoint_interval": 100_000, "train.val_interval": 100_000}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def started(lab: Lab, tmp_path: Path, name: str, world: int, **changes: object) -> tuple[Ranks, Path]:
    """Returns a run that would take very long, some steps after its start."""
    config = lab.config(name, **(LONG | changes))
    ranks = processes.start(["train", str(config)], world, tmp_path / "log")
    run = config.parent / "runs" / name
    assert wait_until(lambda: last_step(run) >= 3 or ranks.poll(), 60) and not ranks.codes, ranks.words()
    return ranks, run


def saved_once(ranks: Ranks, run: Path, reason: str) -> None:
    """Asserts that all ranks ended the same way, after one save of the last step."""
    assert ranks.wait(60), "the ranks still run"
    assert set(ranks.codes.values()) == {EXIT_STOPPED}, ranks.words()
    (checkpointed,) = events(run, "checkpointed")
    (newest,) = published(run / "checkpoints")
    assert verify(newest).step == step_of(newest) == checkpointed["step"] == last_step(run)
    assert [e["reason"] for e in events(run, "preempted")] == [reason]
    assert "everything is saved" in ranks.words() and "Traceback" not in ranks.words()


def test_without_torchrun_its_ranks_end_within_seconds_and_say_why(lab: Lab, tmp_path: Path) -> None:
    """They survive its death, but the store went with it: they could save nothing more."""
    config = lab.config("orphans", **LONG)
    run, log = config.parent / "runs" / "orphans", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with log.open("w") as out:
        agent = subprocess.Popen([*torchrun, "-m", "pipeline", "train", str(config)], stdout=out, stderr=out)
    try:
        assert wait_until(lambda: last_step(run) >= 3 or agent.poll() is not None, 120), log.read_text()
        ranks = children(agent.pid)
        assert len(ranks) == 2, log.read_text()
    finally:
        agent.kill()
        agent.wait()
    assert wait_until(lambda: not any(map(alive, ranks)), 30), log.read_text()
    (failed,) = events(run, "failed")
    assert "torchrun was killed" in failed["error"]
    assert "Traceback" not in log.read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGINT"])
def test_each_signal_to_all_ranks_saves_once_and_ends_with_85(lab: Lab, tmp_path: Path, name: str) -> None:
    ranks, run = started(lab, tmp_path, f"stop_{name}", 2)
    ranks.kill(signal.Signals[name])
    saved_once(ranks, run, name)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(lab: Lab, tmp_path: Path) -> None:
    ranks, run = started(lab, tmp_path, "stop_one", 2, **{"train.log_interval": 7})
    ranks.kill(signal.SIGUSR2, [1])
    assert ranks.wait(60) and set(ranks.codes.values()) == {EXIT_STOPPED}, ranks.words()
    (newest,) = published(run / "checkpoints")
    assert set(verify(newest).files) == {"rank_00000.safetensors", "rank_00001.safetensors"}
    (stopped,) = events(run, "preempted")
    assert stopped["step"] == step_of(newest)
    assert "another rank was asked" in ranks.words()


def test_repeated_signals_are_one_request(lab: Lab, tmp_path: Path) -> None:
    """A process tracker delivers a signal two or three times, and Slurm follows it with another."""
    ranks, run = started(lab, tmp_path, "stop_again", 2)
    for number in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):
        ranks.kill(number)
        time.sleep(0.02)
    saved_once(ranks, run, "SIGUSR2")


def test_a_second_ctrl_c_exits_at_once(lab: Lab, tmp_path: Path) -> None:
    """Also in a step that does not end: the first Ctrl-C is only a request."""
    config = lab.config("stop_twice", **LONG)
    ranks = processes.fork(train_with_slow_steps, (str(config),), 1, tmp_path / "log")
    assert wait_until(lambda: last_step(config.parent / "runs" / "stop_twice") >= 1 or ranks.poll(), 60)
    ranks.kill(signal.SIGINT)
    time.sleep(0.7)
    assert not ranks.poll()
    ranks.kill(signal.SIGINT)
    assert ranks.within(ranks.poll, 3) and ranks.codes == {0: 130}, ranks.words()


def train_with_slow_steps(config: str) -> None:
    """Every step after the first takes a minute."""
    from pipeline.train.engine.engine import Engine

    whole, calls = Engine.loss, []

    def slow(*args: Any) -> Any:
        calls.append(1)
        end = time.monotonic() + 60
        while len(calls) > 4 and time.monotonic() < end:
            time.sleep(0.05)
        return whole(*args)

    Engine.loss = slow
    processes.command(["train", config])


@pytest.mark.timing
def test_a_wall_clock_limit_stops_in_time(lab: Lab, tmp_path: Path) -> None:
    config = lab.config("deadline", **LONG)
    limit = time.time() + 27  # of which fifteen are reserved for a save, none of which has been measured yet
    environ = {"PIPELINE_DEADLINE": str(limit)}
    ranks = processes.start(["train", str(config)], 2, tmp_path / "log", environ)
    assert ranks.wait(60)
    assert time.time() < limit, "it was over before the limit"
    saved_once(ranks, config.parent / "runs" / "deadline", "time limit")


# ---- a rank that fails -----------------------------------------------------------------------


def train_failing(config: str, rank: int, how: str) -> None:
    """Rank `rank` fails in its fifth micro-batch."""
    import os

    from pipeline.errors import DataError
    from pipeline.train.engine.engine import Engine

    whole, calls = Engine.loss, []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 and os.environ["RANK"] == str(rank):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("shard 7 is gone") if how == "error" else ZeroDivisionError("a bug")
        return whole(*args)

    Engine.loss = fail
    processes.command(["train", config])


@pytest.mark.parametrize(
    ("rank", "how", "words"),
    [
        (1, "error", "failed: shard 7 is gone"),
        (0, "error", "failed: shard 7 is gone"),
        (1, "bug", "failed: a bug"),
        (1, "killed", "killed, out of memory"),
    ],
)
def test_a_rank_that_fails_ends_the_other_within_seconds_with_its_error_last(
    lab: Lab, tmp_path: Path, rank: int, how: str, words: str
) -> None:
    config = lab.config(f"fails_{rank}_{how}")
    ranks = processes.fork(train_failing, (str(config), rank, how), 2, tmp_path / "log")
    assert wait_until(lambda: ranks.poll() or len(ranks.codes) > 0, 90), "both ranks hang"
    assert ranks.within(ranks.poll, 15), "the other rank hangs"
    assert ranks.codes[1 - rank] == EXIT_FAILED
    shown = [line for line in ranks.words().splitlines() if line.startswith("pipeline: error: ")]
    # Both ranks write to one file; the last line of the rank that did not fail is the error of the one that did.
    assert [line for line in shown[-2:] if line.startswith(f"pipeline: error: rank {rank} ") and words in line], shown
    assert ranks.words().splitlines()[-1] == shown[-1] or how == "bug", "a bug of the program shows its traceback"
    run = config.parent / "runs" / config.stem
    (failed,) = events(run, "failed")
    assert (words if rank else "shard 7 is gone") in failed["error"]
    assert last_step(run) <= 5


def train_dying_in_a_save(config: str) -> None:
    """Rank 1 is killed while it writes its part; rank 0 is slow to close its records."""
    import os

    from pipeline.checkpoint.pending import PendingCheckpoint
    from pipeline.tracking.tracker import RunTracker
    from pipeline.train import session
    from pipeline.train.ranks import peers

    peers.GRACE_S = session.FAILED_SAVE_S = 0.5
    close = RunTracker.close

    def close_slowly(self: RunTracker, status: Any) -> None:
        time.sleep(3)
        close(self, status)
        print("tracking is closed", flush=True)

    def die(self: PendingCheckpoint, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    RunTracker.close = close_slowly  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        PendingCheckpoint.write_part = die  # type: ignore[method-assign]
    processes.command(["train", config])


def test_a_rank_that_dies_during_a_save_is_recorded_once(lab: Lab, tmp_path: Path) -> None:
    config = lab.config("dies_in_save", **{"train.checkpoint_interval": 3})
    ranks = processes.fork(train_dying_in_a_save, (str(config),), 2, tmp_path / "log")
    assert ranks.wait(90), "a rank hangs"
    assert ranks.codes == {0: EXIT_FAILED, 1: -signal.SIGKILL}, ranks.words()
    (failed,) = events(config.parent / "runs" / config.stem, "failed")
    assert "ended without" in failed["error"]
    assert ranks.words().count("tracking is closed") == 1, "closed once, and not cut off"
    assert ranks.words().count("pipeline: error: ") == 1


def train_freezing(config: str) -> None:
    """Rank 1 freezes in its fifth micro-batch, as on a node that hangs; its connections stay open."""
    import os

    from pipeline.train.engine.engine import Engine
    from pipeline.train.ranks import peers

    peers.SILENCE_S = 6.0
    whole, calls = Engine.loss, []

    def freeze(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return whole(*args)

    Engine.loss = freeze
    processes.command(["train", config])


def test_a_rank_that_freezes_is_named_by_the_other_which_ends(lab: Lab, tmp_path: Path) -> None:
    ranks = processes.fork(train_freezing, (str(lab.config("freezes")),), 2, tmp_path / "log")
    try:
        assert wait_until(lambda: ranks.poll() or 0 in ranks.codes, 90), "rank 0 hangs with it"
        assert ranks.codes == {0: EXIT_FAILED}
        last = ranks.words().splitlines()[-1]
        assert last.startswith("pipeline: error: rank 1 on ") and "silent for 6 seconds" in last
    finally:
        ranks.end()
