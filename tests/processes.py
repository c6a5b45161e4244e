"""Ranks as forks of a process that has imported everything: a start takes one second, not the ten of four imports.

They are real processes: each joins its process group over TCP, can be killed alone, and ends with an exit status.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults.injected import begin, preloaded

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preload"])


@dataclass
class Ranks:
    """The processes of one world."""

    processes: list[BaseProcess]
    """One per rank."""
    log: Path
    """Receives what they print."""
    codes: dict[int, int] = field(default_factory=dict)
    """Exit status of each rank that has ended; the negative signal number if a signal killed it."""
    ended_at: dict[int, float] = field(default_factory=dict)
    """When each rank ended, by the monotonic clock."""
    queued: dict[int, float] = field(default_factory=dict)
    """Seconds that each rank, as last seen, was ready to run and had no processor."""
    agent: BaseProcess | None = None
    """In place of torchrun's agent: has a store as that does; None for ranks without an agent."""

    def poll(self) -> bool:
        """Returns whether all ranks have ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and process.exitcode is not None:
                self.codes[rank] = process.exitcode
                self.ended_at[rank] = time.monotonic()
        return len(self.codes) == len(self.processes)

    def wait(self, timeout_s: float) -> bool:
        """Waits until all ranks have ended; returns False on timeout."""
        return wait_until(self.poll, timeout_s)

    def within(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Polls; returns False after `seconds`, not counting those in which the ranks queued for a processor.

        On a busy machine a rank that waits for its turn does not hang. A rank that spins both hangs and queues, so that
        four times the seconds are the limit in any case.
        """
        began, queued = time.monotonic(), self._queued_s()
        while not condition():
            passed = time.monotonic() - began
            if passed > 4 * seconds or (passed > seconds and passed - (self._queued_s() - queued) > seconds):
                return False
            time.sleep(0.005)
        return True

    def launched(self, condition: Callable[[], bool], seconds: float, grace_s: float = 10.0) -> bool:
        """Waits like `within`, and ends all ranks some seconds after one has failed, as torchrun and srun do."""
        failed_at: list[float] = []

        def done() -> bool:
            if self.poll() or condition():
                return True
            if any(self.codes.values()):
                failed_at.append(time.monotonic())
            if failed_at and time.monotonic() - failed_at[0] > grace_s:
                self.end()
            return False

        return self.within(done, seconds)

    def _queued_s(self) -> float:
        """Sums over all threads of all ranks, because the ranks may have waited for one another."""
        for rank, process in enumerate(self.processes):
            with contextlib.suppress(OSError):  # it has ended: the last reading counts
                tasks = Path(f"/proc/{process.pid}/task").iterdir()
                self.queued[rank] = sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9
        return sum(self.queued.values())

    def kill(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to these ranks, or to all that still run."""
        self.poll()
        for rank in range(len(self.processes)) if ranks is None else ranks:
            pid = self.processes[rank].pid
            if rank not in self.codes and pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended, and its status is still on the way
                    os.kill(pid, number)

    def end(self) -> None:
        """Kills what still runs and waits for it."""
        self.kill(signal.SIGKILL)
        self.kill_agent()
        self.wait(10)

    def kill_agent(self) -> None:
        """Kills the agent, if there is one."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.join()

    def words(self) -> str:
        """Returns the end of what the ranks printed."""
        return self.log.read_text(errors="replace")[-4000:]


def start(arguments: Sequence[str], world_size: int, log: Path, environ: Mapping[str, str] | None = None) -> Ranks:
    """Starts `pipeline ARGUMENTS` on every rank.

    Args:
        arguments: The arguments of the command.
        world_size: Number of ranks.
        log: Receives what they print.
        environ: Additional variables.
    """
    return fork(command, (list(arguments),), world_size, log, environ)


def start_with_agent(arguments: Sequence[str], world_size: int, log: Path) -> Ranks:
    """Starts `pipeline ARGUMENTS` on every rank, as torchrun's agent does."""
    receive, send = _FORKS.Pipe(duplex=False)
    agent = _FORKS.Process(target=_agent, args=(send,))
    agent.start()
    environ = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = fork(command, (list(arguments),), world_size, log, environ, receive.recv())
    ranks.agent = agent
    return ranks


def start_alone(arguments: Sequence[str], log: Path, folder: Path | None = None) -> Ranks:
    """Starts `pipeline ARGUMENTS` as a user does in a folder: one process, without the variables of a launcher."""
    return _forked(command, (list(arguments), folder), [{}], log)


def run(arguments: Sequence[str], world_size: int, log: Path, timeout_s: float = 120) -> None:
    """Runs `pipeline ARGUMENTS` on every rank; fails unless all exit with 0."""
    ranks = start(arguments, world_size, log)
    finished = ranks.within(ranks.poll, timeout_s)
    ranks.end()
    assert finished and set(ranks.codes.values()) == {0}, f"{ranks.codes}\n{ranks.words()}"


def on_ranks(function: Callable[..., Any], world_size: int, log: Path, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Returns what `function(world, *args)` returns on each rank, called inside their process group.

    Args:
        function: A function at the top level of a module.
        world_size: Number of ranks.
        log: Receives what they print.
        args: Plain values.
        timeout_s: Limit for all ranks together.
    """
    pipes = [_FORKS.Pipe(duplex=False) for _ in range(world_size)]
    ranks = fork(_called, (function, [send for _, send in pipes], args, log), world_size, log)
    try:
        deadline = time.monotonic() + timeout_s
        for receive, send in pipes:
            send.close()
            assert receive.poll(max(0.0, deadline - time.monotonic())), f"no answer in {timeout_s} s\n{ranks.words()}"
        answers = [receive.recv() for receive, _ in pipes]
        assert ranks.wait(30) and set(ranks.codes.values()) == {0}, f"{ranks.codes}\n{ranks.words()}"
        return answers
    except EOFError:
        raise AssertionError(f"a rank gave no answer\n{ranks.words()}") from None
    finally:
        ranks.end()


def fork(
    target: Callable[..., None],
    args: tuple[Any, ...],
    world_size: int,
    log: Path,
    environ: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Ranks:
    """Calls `target(*args)` on every rank, with the variables that a launcher would set.

    Args:
        target: A function at the top level of a module.
        args: Plain values.
        world_size: Number of ranks.
        log: Receives what they print.
        environ: Additional variables.
        port: Where the launcher listens; a free one by default.
    """
    meeting = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return _forked(target, args, [{**(environ or {}), **meeting, **rank} for rank in ranks], log)


def _agent(port: Connection) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def _forked(target: Callable[..., None], args: tuple[Any, ...], environs: list[dict[str, str]], log: Path) -> Ranks:
    log.parent.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    with preloaded():  # the first start of a process starts the server that forks it
        forkserver.ensure_running()
    for environ in environs:
        processes.append(_FORKS.Process(target=_rank, args=(target, args, log, environ)))
        processes[-1].start()
    return Ranks(processes, log)


def _rank(target: Callable[..., None], args: tuple[Any, ...], log: Path, environ: dict[str, str]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environ)
    begin()
    target(*args)


def command(arguments: list[str], folder: Path | None = None) -> None:
    """Runs the command line in this process, and in this folder."""
    from pipeline.cli.main import main

    if folder is not None:
        os.chdir(folder)
    sys.argv = ["pipeline", *arguments]
    main()


def _called(function: Callable[..., Any], answers: list[Connection], args: tuple[Any, ...], log: Path) -> None:
    import torch

    from pipeline.run.world import world_from_environment
    from pipeline.train.ranks.group import process_group

    world = world_from_environment()
    for rank, answer in enumerate(answers):
        if rank != world.rank:
            answer.close()  # otherwise the death of its owner would go unnoticed
    try:
        with process_group(world, torch.device("cpu"), file=log.with_name(f"{log.name}.{world.meeting}")):
            answers[world.rank].send(function(world, *args))
    except BaseException:
        traceback.print_exc()
        raise


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Polls the condition; returns False on timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def free_port() -> int:
    """Returns a port that nothing uses, below those that the kernel gives to connections.

    It stays free until its server starts: a port that the kernel chose could meanwhile be given to any connection.
    """
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _ports() -> Iterator[int]:
    """Yields ports, by processes that run side by side in different places of the range."""
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(10_000, max(first_of_kernel, 20_000))
    return itertools.islice(itertools.cycle(ports), random.SystemRandom().randrange(len(ports)), None)


_PORTS = _ports()
