"""Ranks as forks of a process that has imported everything: a restart costs a second, not the ten of four imports.

They are real processes: each joins its process group over TCP, can be killed alone, and runs the whole command.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


def import_everything() -> None:
    """Before the first fork; starts no threads, which would not survive it."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true")
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    import deepspeed  # noqa: F401
    import torch
    import torch._dynamo  # every optimiser imports it, which takes a second

    import pipeline.cli
    import pipeline.data.display
    import pipeline.train.loop  # noqa: F401

    torch.set_num_threads(1)


@dataclass
class Ranks:
    """Processes that run one command together.

    Attributes:
        pids: One a rank.
        codes: Exit status of each that has ended; minus the signal's number if one killed it.
        ended_at: When each ended, by the monotonic clock.
    """

    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.ended_at[rank] = time.monotonic()
        return len(self.codes) == len(self.pids)

    def wait(self, timeout_s: float) -> bool:
        """Waits until all have ended; False if the time was over before."""
        return wait_until(self.poll, timeout_s)

    def kill(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to these ranks, or to all, as far as they run."""
        self.poll()
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def end(self) -> None:
        """Leaves no process behind."""
        self.kill(signal.SIGKILL)
        self.wait(10)

    def words(self) -> str:
        """The end of what the ranks printed."""
        return self.log.read_text(errors="replace")[-4000:]


def start(arguments: Sequence[str], world_size: int, log: Path) -> Ranks:
    """Starts `pipeline ARGUMENTS` on every rank.

    Args:
        arguments: Of the command.
        world_size: Number of ranks.
        log: Takes what they print.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    return Ranks([_fork(arguments, rank, world_size, port, log) for rank in range(world_size)], log)


def _fork(arguments: Sequence[str], rank: int, world_size: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        sys.argv = ["pipeline", *arguments]
        from pipeline.cli import main

        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: what the parent registered to run at its own end is none of the child's business.
        os._exit(code)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Polls; False if the time was over first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
