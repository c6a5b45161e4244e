"""Asking Slurm: its commands, run with a time limit, and their answers as plain values."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.errors import PipelineError

ACTIVE = frozenset(
    ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
     "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
)  # fmt: skip
_TIMEOUT_S = 60.0
_LOST_STATES = ("down", "drain", "fail", "err", "unk", "power")


class SlurmError(PipelineError):
    """A command of Slurm failed; the message is its own."""


@dataclass(frozen=True)
class JobInfo:
    """What Slurm knows of a job.

    Attributes:
        id: `12`, or `12_3` for a task of an array.
        state: `PENDING`, `RUNNING`, `COMPLETED` ...
        reason: Why it waits, or why it ended as it did; empty if Slurm does not say.
        nodes: Host list; empty while there is none.
        restarts: How often it was requeued; None where the source does not know.
        left: Time left, as Slurm writes it; empty if unknown.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int | None = None
    left: str = ""

    @property
    def active(self) -> bool:
        """Whether it is still in the queue, waiting or running."""
        return self.state in ACTIVE


def installed() -> bool:
    """Whether this machine has the commands of Slurm."""
    return shutil.which("squeue") is not None


def call(*command: str) -> str:
    """Runs a command of Slurm and returns what it printed.

    Raises:
        SlurmError: It is not installed, failed, or did not answer within a minute.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except OSError as error:
        raise SlurmError(f"{command[0]}: cannot be run ({error.strerror}); is this a machine with Slurm?") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]}: no answer within {_TIMEOUT_S:.0f} seconds; try `scontrol ping`") from error
    if done.returncode != 0:
        said = "; ".join(dict.fromkeys(line.strip() for line in done.stderr.splitlines() if line.strip()))
        raise SlurmError(f"{command[0]}: {said or f'exit status {done.returncode}'}")
    return done.stdout


def queued(ids: Iterable[str]) -> dict[str, JobInfo]:
    """Jobs among these that wait or run, array tasks one by one, by id; one call, however many.

    Raises:
        SlurmError: Slurm does not answer.
    """
    bases = sorted({base(job) for job in ids})
    if not bases:
        return {}
    try:
        text = call("squeue", "--noheader", "--array", "--jobs", ",".join(bases), "--format", "%i|%T|%r|%N|%L")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them are gone
            return {}
        raise
    rows = [line.split("|") for line in text.splitlines()]
    found = [JobInfo(id=i, state=state, reason=_plain(r), nodes=n, left=left) for i, state, r, n, left in rows]
    return {info.id: info for info in found}


def ended(ids: Iterable[str], accounting: bool) -> dict[str, JobInfo]:
    """What is known of jobs that are not in the queue any more, by id; nothing of those Slurm has forgotten."""
    wanted = list(ids)
    if not wanted:
        return {}
    if accounting:
        try:
            return _from_sacct(wanted)
        except SlurmError:
            pass  # the database is away: slurmctld still knows jobs for a while
    found = {}
    for job in wanted:
        info = show(job)
        if info is not None:
            found[job] = JobInfo(job, info["JobState"], _plain(info.get("Reason", "")), restarts=int(info["Restarts"]))
    return found


def show(job: str) -> dict[str, str] | None:
    """The fields of `scontrol show job`; None where slurmctld does not know it or does not answer."""
    try:
        text = call("scontrol", "--oneliner", "show", "job", job)
    except SlurmError:
        return None
    return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0])) if text.strip() else None


def end_time(job: str) -> float | None:
    """When the time limit of a running job ends, Unix seconds; None if it has none or nobody answers."""
    value = (show(job) or {}).get("EndTime", "Unknown")
    try:
        return datetime.fromisoformat(value).timestamp()  # both in this machine's time zone
    except ValueError:
        return None


def hostnames(nodes: str) -> list[str]:
    """The names in a host list."""
    return call("scontrol", "show", "hostnames", nodes).split() if nodes else []


def lost_nodes(names: Sequence[str]) -> list[str]:
    """Which of these nodes cannot be used now: down, draining, or not answering."""
    if not names:
        return []
    states = _node_states("--nodes", ",".join(names))
    return sorted({name for name, state in states if _is_lost(state)})


def usable_nodes(partition: str) -> list[str]:
    """The nodes of a partition that work, busy or not; none where Slurm does not answer."""
    states = _node_states("--partition", partition) if partition else []
    return sorted({name for name, state in states if not _is_lost(state)})


def _node_states(*which: str) -> list[tuple[str, str]]:
    try:
        text = call("sinfo", "--noheader", "--Node", *which, "--format", "%N %T")
    except SlurmError:
        return []
    return [(name, state) for name, state in (line.split() for line in text.splitlines())]


def _is_lost(state: str) -> bool:
    return state.endswith("*") or state.lower().startswith(_LOST_STATES)


def cancel(ids: Iterable[str]) -> None:
    """Cancels jobs; those that have ended already are left alone.

    Raises:
        SlurmError: Slurm does not answer.
    """
    wanted = list(ids)
    if wanted:
        call("scancel", *wanted)


def base(job: str) -> str:
    """The id of the array a task belongs to, or of the job itself."""
    return job.partition("_")[0]


def _from_sacct(ids: Sequence[str]) -> dict[str, JobInfo]:
    jobs = ",".join(sorted({base(job) for job in ids}))
    text = call(
        "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", jobs, "--format", "JobID,State,NodeList"
    )
    found = {}
    for line in text.splitlines():
        job, state, nodes = line.split("|")
        # "CANCELLED by 0"
        found[job] = JobInfo(job, state.split()[0], nodes="" if nodes == "None assigned" else nodes)
    return found


def _plain(reason: str) -> str:
    return "" if reason in ("None", "(null)") else reason
