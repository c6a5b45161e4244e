"""The host's side of a rank: submitit calls `run_rank` in every task of a job, outside the image.

It starts the real command as a child (in the container, where the config names an image), forwards signals, keeps
the child's output in the run folder, and exits with the child's status. The batch script decides once per job whether
it is requeued (`attempt.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config.sections import Config
from pipeline.errors import EXIT_STOPPED, PipelineError, UsageError
from pipeline.launch.container.caches import make_cache_folder
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.container.image import runtime_problem
from pipeline.launch.job.beside import beside_training
from pipeline.launch.job.causes import MOST_LOGS, last_words
from pipeline.launch.job.spec import Attempt, this_attempt
from pipeline.launch.site import Site
from pipeline.launch.slurm import client as slurm
from pipeline.processes import end_with_parent
from pipeline.run import attempts, journal
from pipeline.run.attempts import RankFailed, RankStopped
from pipeline.run.events import Cancelled, EventLog, append
from pipeline.run.folder import Run
from pipeline.run.world import ATTEMPT_VARIABLE, DEADLINE_VARIABLE, GPUS_VARIABLE, World, world_from_srun
from pipeline.text_format import echo

_POLL_S = 0.1
# A signal that arrives while Python starts is lost or fatal; a repeated one is neither.
_REPEAT_S = 5.0


class _Signals:
    """Remembers that this task was asked to stop; the handler does nothing else."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        # submitit's own handlers would save in the middle of its function and requeue by themselves.
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)


def run_rank(spec_file: str) -> None:
    """Runs the commands of one task in order; submitit pickles this function, so its name and argument are plain.

    Raises:
        SystemExit: A command ended with a status other than 0.
    """
    signals = _Signals()
    attempt = this_attempt(spec_file)
    world = world_from_srun(os.environ)
    environment = _environment(attempt, world)
    for command in attempt.task.commands:
        try:
            code = _run(attempt, world, command, environment, signals)
        except PipelineError as error:  # before there is a log: the config cannot be read, for example
            _note_failure(attempt, world, error.exit_code, str(error))
            echo(f"pipeline: error: {error}", sys.stderr)
            code = error.exit_code
        if code == 0 and signals.received and command is not attempt.task.commands[-1]:
            code = EXIT_STOPPED
        if code != 0:
            raise SystemExit(code)


def _environment(attempt: Attempt, world: World) -> dict[str, str]:
    """Returns the variables that the launcher gives a rank, inside the image and outside, besides those of the site."""
    variables = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", ATTEMPT_VARIABLE: str(attempt.number)}
    world.export(variables)
    if "OMP_NUM_THREADS" not in attempt.site.environment:
        # Otherwise every process would start one thread per core of the node, not per core of its own share.
        threads = os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        variables["OMP_NUM_THREADS"] = threads
    if attempt.resources.gpus_per_node:
        variables[GPUS_VARIABLE] = str(attempt.resources.gpus_per_node)
    if os.environ.get(DEADLINE_VARIABLE):
        variables[DEADLINE_VARIABLE] = os.environ[DEADLINE_VARIABLE]
    return variables


def _whole_environment(site: Site, variables: dict[str, str]) -> dict[str, str]:
    """Returns what the command is started with; a site's variables may be secrets and are on no command line."""
    return container_environment(site.container, {**os.environ, **site.environment, **variables}, site.environment)


def command_line(
    config: Config, site: Site, run: Run, command: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """Returns what a task starts: a command of `pipeline`, in the container where the config names an image."""
    if config.container.image is None:
        return [site.python or sys.executable, "-m", "pipeline", *command]
    return container_argv(
        config, site.container, run, ["pipeline", *command], environment=environment, code=run.code,
        scratch=_scratch(site), elsewhere=site.environment,
    )  # fmt: skip


def _scratch(site: Site) -> Path | None:
    return Path(site.scratch) if site.scratch else None


def _run(attempt: Attempt, world: World, command: Sequence[str], environment: dict[str, str], signals: _Signals) -> int:
    """Starts a command, waits for it, and returns the status that this task ends with."""
    config = attempt.run.config()
    log = log_file(attempt, world)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        try:
            argv = _usable_command_line(attempt, config, command, environment)
        except PipelineError as error:
            out.write(f"pipeline: error: {error}\n".encode())
            _note_failure(attempt, world, error.exit_code, str(error))
            return error.exit_code
        printed, seen = out.tell(), journal.size(attempt.run.events_file)
        child = subprocess.Popen(
            argv,
            env=_whole_environment(attempt.site, environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent(signal.SIGKILL),  # whatever Slurm uses to track processes
        )
        with beside_training(attempt, seen) if world.is_first else contextlib.nullcontext():
            _wait(child, attempt, world, signals)
    code = child.returncode
    status = code if code >= 0 else 128 - code
    if signals.received is not None and status == 128 + signals.received:
        # The signal killed it before it had a handler: there was nothing to save yet.
        attempts.note(attempt.run, RankStopped(**_about(attempt, world), status=EXIT_STOPPED))
        return EXIT_STOPPED
    if status not in (0, EXIT_STOPPED) and signals.received is None:
        _note_failure(attempt, world, status, last_words(log, printed))
    return status


def _usable_command_line(
    attempt: Attempt, config: Config, command: Sequence[str], environment: dict[str, str]
) -> list[str]:
    """Returns the command line, if this node can run it.

    Raises:
        UsageError: The container runtime or the image is missing on this node, or the folder for caches is not safe.
    """
    if config.container.image is not None:
        problem = runtime_problem(attempt.site.container)
        if problem is not None:
            raise UsageError(problem)
        make_cache_folder(_scratch(attempt.site))
    return command_line(config, attempt.site, attempt.run, command, environment)


def _about(attempt: Attempt, world: World) -> dict[str, Any]:
    return {**attempt.about(), "rank": world.rank, "host": socket.gethostname()}


def _note_failure(attempt: Attempt, world: World, status: int, said: str) -> None:
    attempts.note(attempt.run, RankFailed(**_about(attempt, world), status=status, said=said))


def _wait(child: subprocess.Popen[bytes], attempt: Attempt, world: World, signals: _Signals) -> None:
    """Waits until the child has ended and forwards signals: a handler must not wait for a process."""
    forwarded = 0.0
    while child.poll() is None:
        if signals.received is not None and time.monotonic() - forwarded > _REPEAT_S:
            first, forwarded = not forwarded, time.monotonic()
            child.send_signal(signals.received)
            if first and world.is_first:  # after forwarding: accounting may take a minute to answer
                _record_if_cancelled(attempt)
        time.sleep(_POLL_S)


def _record_if_cancelled(attempt: Attempt) -> None:
    """Asks Slurm's accounting, which knows at once whether the signal came from `scancel` or from preemption."""
    info = slurm.ended([attempt.job], attempt.site.accounting).get(attempt.job)
    if info is not None and info.state == "CANCELLED" and not attempt.beside:
        record_cancelled(attempt.run.events_file, attempt.job)


def record_cancelled(events: Path, job: str) -> None:
    """Records that a job was cancelled, once."""
    if not any(event.job == job for event in EventLog.load(events).of(Cancelled)):
        append(events, Cancelled(job=job))


def log_file(attempt: Attempt, world: World) -> Path:
    """Returns the file for a rank's output; all commands of a task share it.

    Of many ranks, those of a node share the file of the first one there: thousands of files would tell no more.
    """
    shared = world.size > MOST_LOGS
    number = world.rank - world.local_rank if shared else world.rank
    return attempt.run.logs / attempt.job / f"attempt_{attempt.number}_rank_{number}.log"
