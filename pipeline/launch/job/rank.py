"""The host's side of a rank: submitit calls `run_rank` in every task of a job, outside the image.

It starts the real command as a child (in the container, where the config names an image), passes signals on, keeps
the child's output in the run folder, and ends with the child's exit status. Whether the job is requeued is decided
once a job, in the batch script (`attempt.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from pipeline.config.sections import Config
from pipeline.errors import EXIT_STOPPED, PipelineError, UsageError
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.container.image import runtime_problem
from pipeline.launch.job.spec import Attempt, this_attempt
from pipeline.launch.site import Site
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import RankEnded, RankFailed, RankStopped
from pipeline.processes import end_with_parent
from pipeline.run.events import Cancelled, EventLog, append
from pipeline.run.folder import Run
from pipeline.run.world import DEADLINE_VARIABLE, World, world_from_srun

_POLL_S = 0.1
# A signal that arrives while Python starts is lost or fatal; one that is repeated is not.
_REPEAT_S = 5.0


class _Signals:
    """Remembers that this task was asked to stop; nothing else happens inside the handler."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        # submitit's own handlers would save from between two lines of its function and requeue by themselves.
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)


def run_rank(work_file: str) -> None:
    """Does one task's commands one after the other; submitit's function, a plain name and a plain argument.

    Raises:
        SystemExit: A command ended with another status than 0.
    """
    signals = _Signals()
    attempt = this_attempt(work_file)
    world = world_from_srun(os.environ)
    environment = _environment(attempt, world)
    for command in attempt.task.commands:
        code = _run(attempt, world, command, environment, signals)
        if code == 0 and signals.asked and command is not attempt.task.commands[-1]:
            code = EXIT_STOPPED
        if code != 0:
            raise SystemExit(code)


def _environment(attempt: Attempt, world: World) -> dict[str, str]:
    """The variables a rank is given by the launcher, inside the image and outside."""
    variables = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **attempt.site.environment}
    world.export(variables)
    # Every process would start a thread for each core of the node, not of its own share.
    threads = os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    variables.setdefault("OMP_NUM_THREADS", threads)
    if os.environ.get(DEADLINE_VARIABLE):
        variables[DEADLINE_VARIABLE] = os.environ[DEADLINE_VARIABLE]
    return variables


def command_line(
    config: Config, site: Site, run: Run, command: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """What a task starts: a command of `pipeline`, in the container where the config names an image."""
    if config.container.image is None:
        return [site.python or sys.executable, "-m", "pipeline", *command]
    return container_argv(
        config, site.container, run, ["pipeline", *command], environment=environment, code=run.code,
        scratch=Path(site.scratch) if site.scratch else None,
    )  # fmt: skip


def _run(attempt: Attempt, world: World, command: Sequence[str], environment: dict[str, str], signals: _Signals) -> int:
    """Starts a command and waits for it; returns the status this task ends with."""
    config = attempt.run.config()
    log = log_file(attempt, world.rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        try:
            argv = _usable_command_line(attempt, config, command, environment)
        except PipelineError as error:
            out.write(f"pipeline: error: {error}\n".encode())
            _note_end(attempt, world, RankFailed, error.exit_code)
            return error.exit_code
        child = subprocess.Popen(
            argv,
            env=container_environment(attempt.site.container, {**os.environ, **environment}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent(signal.SIGKILL),  # whatever Slurm uses to track processes
        )
        _wait(child, attempt, world, signals)
    code = child.returncode
    status = code if code >= 0 else 128 - code
    if signals.asked is not None and status == 128 + signals.asked:
        # It died of the signal before it could listen: there was nothing to save yet.
        _note_end(attempt, world, RankStopped, EXIT_STOPPED)
        return EXIT_STOPPED
    if status not in (0, EXIT_STOPPED) and signals.asked is None:
        _note_end(attempt, world, RankFailed, status)
    return status


def _usable_command_line(
    attempt: Attempt, config: Config, command: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """The command line, on a node that can run it.

    Raises:
        UsageError: This node has no container runtime, or not the image.
    """
    problem = runtime_problem(attempt.site.container) if config.container.image is not None else None
    if problem is not None:
        raise UsageError(problem)
    return command_line(config, attempt.site, attempt.run, command, environment)


def _note_end(attempt: Attempt, world: World, how: type[RankEnded], status: int) -> None:
    ended = how(**attempt.about(), rank=world.rank, host=socket.gethostname(), status=status)
    job_records.note(attempt.run, ended)


def _wait(child: subprocess.Popen[bytes], attempt: Attempt, world: World, signals: _Signals) -> None:
    """Until the child has ended; signals are passed on from here, for a handler must not wait for a process."""
    passed_on = 0.0
    while child.poll() is None:
        if signals.asked is not None and time.monotonic() - passed_on > _REPEAT_S:
            first, passed_on = not passed_on, time.monotonic()
            child.send_signal(signals.asked)
            if first and world.is_first:  # after the signal: accounting may take a minute to answer
                _note_cancelled(attempt)
        time.sleep(_POLL_S)


def _note_cancelled(attempt: Attempt) -> None:
    """`scancel` and preemption send the same signal; Slurm's accounting knows at once which it was."""
    info = slurm.ended([attempt.job], attempt.site.accounting).get(attempt.job)
    if info is not None and info.state == "CANCELLED":
        note_cancelled(attempt.run.events_file, attempt.job)


def note_cancelled(events: Path, job: str) -> None:
    """Records that a job was cancelled, once."""
    if not any(event.job == job for event in EventLog.load(events).of(Cancelled)):
        append(events, Cancelled(job=job))


def log_file(attempt: Attempt, rank: int) -> Path:
    """Where a rank's output goes; commands that follow each other share it."""
    return attempt.run.logs / attempt.job / f"attempt_{attempt.number}_rank_{rank}.log"
