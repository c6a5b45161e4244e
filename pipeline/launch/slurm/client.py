"""Slurm's commands, run with a time limit, and their answers as plain values."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pipeline.errors import PipelineError
from pipeline.files import naming
from pipeline.launch.slurm.inputs import without_inputs

# A state that is in neither of these sets, such as RESV_DEL_HOLD, or one of a newer Slurm, is that of a waiting job.
_ENDED = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
     "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL")
)  # fmt: skip
_ON_NODES = frozenset(
    ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
)
_TIMEOUT_S = 60.0
# What follows a dash would be an option: `scancel --me` cancels every job of the user.
JOB_ID = r"^[0-9]+(_[0-9]+)?$"
_NODES = r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*"
_LOST_STATES = ("down", "drain", "fail", "err", "unk", "power")


class SlurmError(PipelineError):
    """A command of Slurm failed; the message is its own."""


@dataclass(frozen=True)
class JobInfo:
    """What Slurm reports about a job."""

    id: str
    """`12`, or `12_3` for a task of an array."""
    state: str
    """`PENDING`, `RUNNING`, `COMPLETED` ..."""
    reason: str = ""
    """Why it waits, or why it ended as it did; empty if Slurm does not say."""
    nodes: str = ""
    """Slurm's short form of the node list; empty before it has nodes."""
    restarts: int | None = None
    """How often it was requeued; None where the source does not tell."""
    left: str = ""
    """Time left, in Slurm's notation; empty if unknown."""
    name: str = ""

    @property
    def active(self) -> bool:
        """Whether it is in the queue, waiting or running."""
        return self.state not in _ENDED

    @property
    def on_nodes(self) -> bool:
        """Whether it has begun and not ended."""
        return self.state in _ON_NODES


def installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def call(*command: str, given: str = "") -> str:
    """Runs one of Slurm's commands with this on its standard input, and returns its output.

    Raises:
        SlurmError: It is not installed, failed, or did not answer within a minute.
    """
    try:
        with naming(command[0], "cannot be run", "is this a machine with Slurm?", SlurmError):
            done = subprocess.run(
                command,
                env=without_inputs(os.environ),
                input=given,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]}: no answer within {_TIMEOUT_S:.0f} seconds; try `scontrol ping`") from error
    if done.returncode != 0:
        said = "; ".join(dict.fromkeys(line.strip() for line in done.stderr.splitlines() if line.strip()))
        raise SlurmError(f"{command[0]}: {said or f'exit status {done.returncode}'}")
    return done.stdout


def queued(ids: Iterable[str]) -> dict[str, JobInfo]:
    """Returns the jobs among these that wait or run, by id, array tasks one by one; a single call of squeue.

    Raises:
        SlurmError: Slurm does not answer.
    """
    bases = sorted({base(job) for job in valid(ids)})
    if not bases:
        return {}
    try:
        text = call("squeue", "--noheader", "--array", "--jobs", ",".join(bases), "--format", "%i|%T|%r|%N|%L|%j")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # none of them is left
            return {}
        raise
    table = rows(text, 6)
    found = [JobInfo(i, state, _plain(r), n, left=left, name=name) for i, state, r, n, left, name in table]
    return {info.id: info for info in found}


def names_in_queue(ids: Iterable[str]) -> dict[str, str]:
    """Returns the names of the jobs among these that wait or run, by id, array tasks one by one.

    Raises:
        SlurmError: Slurm does not answer.
    """
    return {info.id: info.name for info in queued(ids).values() if info.active}


def ended(ids: Iterable[str], accounting: bool) -> dict[str, JobInfo]:
    """Returns what is known about jobs that have left the queue, by id; jobs that Slurm has forgotten are missing."""
    wanted = valid(ids)
    if not wanted:
        return {}
    if accounting:
        try:
            return _from_sacct(wanted)
        except SlurmError:
            pass  # the database is down: slurmctld remembers jobs for a while
    found = {}
    for job in wanted:
        for info in _show_all(job):
            about = JobInfo(
                job, info["JobState"], _plain(info.get("Reason", "")), restarts=int(info["Restarts"]),
                name=info["JobName"],
            )  # fmt: skip
            for task in _ids_of(info["ArrayJobId"], info["ArrayTaskId"]) if "ArrayTaskId" in info else [job]:
                found[task] = replace(about, id=task)
    return found


def show(job: str) -> dict[str, str] | None:
    """Returns the fields of `scontrol show job`; None where slurmctld does not know it or does not answer."""
    return next(iter(_show_all(job)), None)


def _show_all(job: str) -> list[dict[str, str]]:
    """Like `show`, for every task of an array; waiting tasks share one entry."""
    try:
        text = call("scontrol", "--oneliner", "show", "job", job)
    except SlurmError:
        return []
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines() if line.strip()]


def _ids_of(array: str, tasks: str) -> list[str]:
    """Expands Slurm's short form of array tasks: `12`, `3,5-7%2` -> `12_3`, `12_5`, `12_6`, `12_7`."""
    found = []
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += [f"{array}_{number}" for number in range(int(first), int(last or first) + 1)]
    return found


def end_time(job: str) -> float | None:
    """Returns when a running job reaches its time limit, in Unix seconds; None without a limit or an answer."""
    return _time_of(job, "EndTime")


def start_time(job: str) -> float | None:
    """Returns when a waiting job is expected to start, in Unix seconds; None where Slurm does not say."""
    return _time_of(job, "StartTime")


def _time_of(job: str, field: str) -> float | None:
    value = (show(job) or {}).get(field, "Unknown")
    try:
        return datetime.fromisoformat(value).timestamp()  # both in this machine's time zone
    except ValueError:
        return None


def hostnames(nodes: str) -> list[str]:
    """Returns the node names of Slurm's short form."""
    return call("scontrol", "show", "hostnames", nodes).split() if re.fullmatch(_NODES, nodes) else []


def lost_nodes(names: Sequence[str]) -> list[str]:
    """Returns which of these nodes are down, draining, or not answering."""
    if not names:
        return []
    return sorted({name for name, state, _ in _nodes("--nodes", ",".join(names)) if _is_lost(state)})


def usable_nodes(partition: str, like: Sequence[str]) -> set[str]:
    """Returns the working nodes of a partition, busy or not, that have the devices and features of a named one.

    Empty where Slurm does not answer.
    """
    if not partition:
        return set()
    nodes = _nodes("--partition", partition)
    kinds = {kind for name, _, kind in nodes if name in like}
    return {name for name, state, kind in nodes if kind in kinds and not _is_lost(state)}


def _nodes(*which: str) -> list[tuple[str, str, str]]:
    """Returns name, state, and what distinguishes kinds of nodes."""
    try:
        text = call("sinfo", "--noheader", "--Node", *which, "--format", "%N|%T|%G|%f")
    except SlurmError:
        return []
    return [(name, state, kind) for name, state, kind in rows(text, 3)]


def rows(text: str, columns: int) -> list[list[str]]:
    """Returns the cells of lines; other lines are words of a site around Slurm's command."""
    rows = [line.split("|", columns - 1) for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]


def _is_lost(state: str) -> bool:
    return state.endswith("*") or state.lower().startswith(_LOST_STATES)


def cancel(ids: Iterable[str]) -> None:
    """Cancels jobs; jobs that have already ended are not affected.

    Raises:
        SlurmError: Slurm does not answer.
    """
    wanted = valid(ids)
    if wanted:
        call("scancel", *wanted)


def valid(ids: Iterable[str]) -> list[str]:
    """Returns these ids of jobs; raises SlurmError for what would be an option or a list."""
    wanted = list(ids)
    wrong = next((job for job in wanted if not re.fullmatch(JOB_ID, job)), None)
    if wrong is not None:
        raise SlurmError(f"{wrong!r} is not the id of a job; nothing was asked of Slurm")
    return wanted


def base(job: str) -> str:
    """Returns the id of the array that a task belongs to, or of the plain job itself."""
    return job.partition("_")[0]


def _from_sacct(ids: Sequence[str]) -> dict[str, JobInfo]:
    jobs = ",".join(sorted({base(job) for job in ids}))
    fields = "JobID,State,NodeList,JobName"
    text = call("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", jobs, "--format", fields)
    found = {}
    for job, state, nodes, name in rows(text, 4):
        waiting = re.fullmatch(r"(\d+)_\[([\d,%-]+)\]", job)  # tasks that never ran are one line
        for task in _ids_of(waiting[1], waiting[2]) if waiting else [job]:
            # "CANCELLED by 0"
            found[task] = JobInfo(
                task, state.partition(" ")[0], nodes="" if nodes == "None assigned" else nodes, name=name
            )
    return found


def _plain(reason: str) -> str:
    return "" if reason in ("None", "(null)") else reason
