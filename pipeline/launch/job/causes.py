"""Why the tasks of an attempt ended, from what Slurm and the tasks themselves left in their logs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import naming, open_regular
from pipeline.launch.job.spec import Attempt
from pipeline.launch.site import TrainResources
from pipeline.launch.slurm import client as slurm
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, RankFailed
from pipeline.run.events import BadNode
from pipeline.text_format import printable

# More ranks write one log per node.
MOST_LOGS = 64
_LAST_SIGNAL = 128 + 64
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
    return asks and attempt.site.accounting and slurm.had_step_out_of_memory(attempt.raw_job)


def said_by_slurm(attempt: Attempt) -> str:
    """Returns the first line of Slurm's log that names a cause, such as a missing Python; or nothing."""
    lines = _lines_of_slurm(attempt)
    for found in (_FAILED_TASK.search(line) for line in lines):
        if found is not None and found[1] != "0":  # each task has a log of its own for its node's messages
            lines = lines + _tail(attempt.folder / f"{attempt.job}_{_log_number(attempt, int(found[1]))}_log.err")
            break
    return next((_short(line) for line in lines if not _AFTERMATH.search(line)), "")


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
