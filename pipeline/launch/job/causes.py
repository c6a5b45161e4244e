"""How an attempt ended and why, from what training recorded and what Slurm and the tasks left in their logs."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, PipelineError
from pipeline.files import naming, open_regular
from pipeline.launch.job.spec import Attempt
from pipeline.launch.site import TrainResources
from pipeline.launch.slurm import accounting
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEvent, RankFailed, RankStopped
from pipeline.run.events import BadNode, EventLog, Failed, Finished, Preempted
from pipeline.text_format import printable

# More ranks write one log per node.
MOST_LOGS = 64
_LAST_SIGNAL = 128 + 64
_KILLED = frozenset({128 + signal.SIGKILL})
# srun returns these after killing ranks that had no signal handler yet.
_ENDED_BY_SIGNAL = frozenset({128 + signal.SIGTERM, 128 + signal.SIGUSR2})
_TAIL = 16 << 10
_LONGEST = 300  # characters of a line
# slurmstepd of the node, in two versions' words, and srun for every node.
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|OOM Killed|task \d+: Out Of Memory")
# What srun says when it ends the other tasks: no cause.
_AFTERMATH = re.compile(
    r"Exited with exit code|Terminat|CANCELLED|Killed|Force|Job step aborted|^submitit|^\s*$|launch/slurm"
)
# The last line of a traceback, our own messages, Apptainer's.
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b|FATAL|pipeline: error")
_FAILED_TASK = re.compile(r"task (\d+): Exited with exit code")


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended."""

    outcome: Literal["done", "stopped", "failed"]
    """`stopped` means on request, with everything saved."""
    reason: str
    """In words; empty for `done`."""
    status: int
    """Exit status of the job if it is not requeued."""
    most_failures: int | None = None
    """Failures without progress after which it is given up; None for as many as the site allows."""


def judge(attempt: Attempt, code: int) -> Verdict:
    """Returns how this attempt ended.

    srun's status alone does not tell: when the first rank ends, it kills the other ranks and returns the highest
    status. What training recorded comes first, then the ranks that ended without having been asked to.
    """
    events = own_events(attempt) if attempt.stage == "train" else EventLog()
    if code == EXIT_OK or events.of(Finished):
        return Verdict("done", "", EXIT_OK)
    preempted = events.last(Preempted)
    if preempted is not None:
        return Verdict("stopped", preempted.reason or "asked to stop", EXIT_STOPPED)
    culprits = own_notes(attempt).of(RankFailed)
    if ran_out_of_memory(attempt, asks=code in _KILLED or any(note.status in _KILLED for note in culprits)):
        return Verdict("failed", memory_in_words(attempt, culprits), EXIT_FAILED, most_failures=2)
    failed = events.last(Failed)
    said = failed.error if failed is not None else bad_nodes_in_words(events.last(BadNode))
    if culprits:
        return Verdict("failed", said or rank_in_words(culprits[0]), culprits[0].status)
    if said:
        return Verdict("failed", said, EXIT_FAILED)
    stopped = bool(own_notes(attempt).of(RankStopped))
    if code == EXIT_STOPPED or (stopped and code in _ENDED_BY_SIGNAL):
        return Verdict("stopped", "asked to stop", EXIT_STOPPED)
    said = said_by_slurm(attempt) or f"see {slurm_log(attempt)}"
    return Verdict("failed", f"srun ended with status {code}: {said}", code)


def slurm_log(attempt: Attempt) -> Path:
    """Returns the file that receives the messages of Slurm, of srun and of the batch script."""
    return attempt.folder / f"{attempt.job}_0_log.err"


def ran_out_of_memory(attempt: Attempt, asks: bool) -> bool:
    """Returns whether the kernel killed a process of this attempt because the job had used up its memory.

    Args:
        attempt: The attempt.
        asks: Whether to ask accounting too, if Slurm's log does not say so.
    """
    if any(_OUT_OF_MEMORY.search(line) for line in _lines_of_slurm(attempt)):
        return True
    return asks and attempt.site.accounting and accounting.had_step_out_of_memory(attempt.raw_job)


def said_by_slurm(attempt: Attempt) -> str:
    """Returns the first line of Slurm's log that names a cause, such as a missing Python; or nothing."""
    lines = _lines_of_slurm(attempt)
    for found in (_FAILED_TASK.search(line) for line in lines):
        if found is not None and found[1] != "0":  # each task has a log of its own for its node's messages
            lines = lines + _tail(attempt.folder / f"{attempt.job}_{_log_number(attempt, int(found[1]))}_log.err")
            break
    lines = [line for line in lines if not _AFTERMATH.search(line)]
    return _short(next((line for line in lines if _ERROR.match(line.strip())), (lines or [""])[0]))


def _log_number(attempt: Attempt, task: int) -> int:
    """Returns the number in the name of a task's log: its own, or of many tasks that of its node."""
    ask = attempt.resources
    if not isinstance(ask, TrainResources) or ask.nodes * ask.tasks_per_node <= MOST_LOGS:
        return task
    return task // ask.tasks_per_node


def last_words(log: Path, first: int) -> str:
    """Returns what a command printed last, from this byte of its log on: an error if it names one; or nothing."""
    lines = [line for line in _tail(log, first) if line.strip()]
    errors = [line for line in lines if _ERROR.match(line.strip())]
    return _short((errors or lines or [""])[-1]).removeprefix("pipeline: error: ")


def bad_nodes_in_words(event: BadNode | None) -> str:
    """Describes what preflight found, which ends training before it can record anything; empty if nothing."""
    return f"bad node {', '.join(event.nodes)}: {'; '.join(event.problems)}" if event else ""


def rank_in_words(note: RankFailed) -> str:
    """Describes how a rank failed, with what it printed last."""
    killed = 128 < note.status <= _LAST_SIGNAL  # above it, a program's own: 255 is Apptainer's
    how = f"was killed by signal {note.status - 128}" if killed else f"ended with status {note.status}"
    said = f": {note.said}" if note.said and not killed else ""
    return f"rank {note.rank} on {note.host} {how}{said}"


def memory_in_words(attempt: Attempt, culprits: Sequence[RankFailed]) -> str:
    """Describes that memory was used up, and the cure."""
    has = attempt.resources.mem_gb
    who = f"rank {culprits[0].rank} on {culprits[0].host}" if culprits else "a process"
    limit = f"which is {has:g} GiB per node" if has else "which is not set, so the partition's default holds"
    return f"out of memory: the kernel killed {who}; raise {attempt.stage}.mem_gb of the site, {limit}"


def notes_of_job(attempt: Attempt) -> EventLog:
    """Returns what happened to all attempts of this job."""
    notes = attempts.notes(attempt.run, attempt.stage)
    return EventLog(note for note in notes.of(AttemptEvent) if note.job == attempt.job)


def own_notes(attempt: Attempt) -> EventLog:
    """Returns what happened to this attempt."""
    return EventLog(note for note in notes_of_job(attempt).of(AttemptEvent) if note.attempt == attempt.number)


def own_events(attempt: Attempt) -> EventLog:
    """Returns what training recorded since this attempt began."""
    began = max((note.time for note in own_notes(attempt).of(AttemptBegan)), default=0.0)
    return EventLog.load(attempt.run.events_file).since(began)


def _lines_of_slurm(attempt: Attempt) -> list[str]:
    """Returns the lines of Slurm's log since this attempt began; earlier attempts wrote into the same file."""
    began = attempts.notes(attempt.run, attempt.stage).last(AttemptBegan)
    return _tail(slurm_log(attempt), 0 if began is None else began.log_bytes)


def _tail(path: Path, first: int = 0) -> list[str]:
    """Returns the last lines of a log from this byte on; none where it cannot be read: a cause is no reason to fail."""
    try:
        with naming(path, "cannot be read"), open_regular(path, path.parent) as source:
            source.seek(max(first, journal.size(path) - _TAIL))
            return source.read(_TAIL).decode(errors="replace").splitlines()
    except (OSError, PipelineError):
        return []


def _short(line: str) -> str:
    words = re.sub(r"^(slurmstepd[^:]*|srun): error: ", "", printable(line).strip())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."
