"""The state of runs, from their folders and from Slurm where it answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint.layout import published, step_of
from pipeline.errors import PipelineError, UsageError
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.client import JobInfo
from pipeline.launch.slurm.job_records import AttemptBegan, Job
from pipeline.run import journal
from pipeline.run.events import Cancelled, Event, EventLog, Failed, Finished, GaveUp, Preempted, Requeued, StartBegan
from pipeline.run.folder import Run, open_run
from pipeline.text_format import say
from pipeline.tracking.goodput import Goodput, goodput
from pipeline.tracking.upload.sync import is_alive

State = Literal["queued", "running", "finished", "cancelled", "failed", "stopped", "unknown"]

# Where the last logged step is looked for: lines are about 400 bytes.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunStatus:
    """The state of a run and its latest figures."""

    run: str
    """Its folder."""
    state: State
    """`stopped` resumes when it is submitted or started again; `unknown`: neither Slurm nor the run folder tells."""
    reason: str
    """Why it waits, failed or stopped; may be empty."""
    stage: str
    """What runs, waits or failed; empty where there is no job."""
    job: str | None
    """Its Slurm job; None for a run that is trained on this machine."""
    nodes: str
    """Where it runs, or ran last."""
    step: int
    """Finished steps, as far as they were logged."""
    max_iters: int
    loss: float | None
    """Training loss at `step`."""
    tokens_per_s: float | None
    """Throughput at `step`."""
    eta_s: float | None
    """Seconds until the last step; None unless it is training."""
    restarts: int
    """How often training was started again."""
    goodput: float | None
    """Fraction of the wall time since submission in which training made progress."""
    wall: Goodput | None
    """Where the wall time went: seconds in the queue, in start-up, in training and so on."""
    checkpoint: int | None
    """Step of the newest checkpoint; None before the first."""
    updated: float | None
    """When something was last logged, in Unix seconds."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for programs."""
        return asdict(self)


@dataclass(frozen=True)
class _Known:
    """The state of a run, the reason for it, and the job that it refers to."""

    state: State
    reason: str = ""
    stage: str = ""
    job: str | None = None
    nodes: str = ""


def find_runs(paths: Sequence[str]) -> list[Run]:
    """Returns the runs at these places, each a run folder or a folder of run folders.

    Raises:
        UsageError: There is no run.
    """
    found: list[Run] = []
    for path in paths:
        inside = sorted(Path(path).glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
        if Run(Path(path)).config_file.is_file() or not inside:
            found.append(open_run(path))
        else:
            found += [Run(p.parent) for p in inside]
    if not found:
        raise UsageError("there is no run")
    return found


def statuses(runs: Sequence[Run]) -> list[RunStatus]:
    """Returns the status of each run; Slurm is asked once for all of them."""
    chains = {run.path: job_records.last_chain(run) for run in runs}
    infos = _ask_slurm([job for chain in chains.values() for job in chain])
    found = []
    for run in runs:
        events = EventLog.load(run.events_file)
        known = _known(run, events, chains[run.path], infos)
        try:
            found.append(_status(run, events, known, run.config().train.max_iters))
        except PipelineError as error:  # a damaged run folder must not hide the other runs
            found.append(_status(run, events, replace(known, state="unknown", reason=str(error)), 0))
    return found


def _ask_slurm(jobs: Sequence[Job]) -> dict[str, JobInfo] | None:
    """Returns what Slurm reports about these jobs; None where it is not installed or does not answer."""
    if not jobs:
        return {}
    if not slurm.installed():
        return None
    try:
        infos = slurm.queued(job.id for job in jobs)
    except slurm.SlurmError as error:
        say(f"pipeline: {error}; the status below comes from the run folder alone", sys.stderr)
        return None
    gone = [job for job in jobs if not any(_belongs(info, job) for info in infos.values())]
    for accounting in (True, False):
        infos |= slurm.ended([job.id for job in gone if job.accounting is accounting], accounting)
    return infos


def _belongs(info: JobInfo, job: Job) -> bool:
    return job.holds(info.id) and job.is_named(info.name)


def _known(run: Run, events: EventLog, chain: Sequence[Job], infos: dict[str, JobInfo] | None) -> _Known:
    newest = chain[-1] if chain else None
    if newest is None:
        return _from_folder(run, events, None) or _Known("stopped", "its process ended and left no record")
    if infos is None:
        return _from_folder(run, events, newest) or _Known(
            "unknown", "Slurm does not answer here", newest.stage, newest.id
        )
    of_job = {job.id: [info for info in infos.values() if _belongs(info, job)] for job in chain}
    active = [(job, info) for job in chain for info in of_job[job.id] if info.active]
    for job, info in active:
        if info.state not in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            return _Known("running", "", job.stage, info.id, info.nodes)
    if active:
        job, info = active[0]
        return _Known("queued", _why_it_waits(events, info), job.stage, info.id)
    for job in chain:
        for info in of_job[job.id]:
            if info.state != "COMPLETED" and job.stage != "evaluate" and isinstance(_end(events), Finished):
                return _Known("finished", "its job was not", job.stage, info.id)  # a user finished it by hand
            if info.state == "CANCELLED":
                return _Known("cancelled", _reason(events, GaveUp), job.stage, info.id, info.nodes)
            if info.state != "COMPLETED":
                return _Known("failed", _reason(events, GaveUp, Failed) or info.state, job.stage, info.id, info.nodes)
    if all(of_job[job.id] for job in chain):
        return _Known("finished", stage=newest.stage, job=newest.id)
    gone = _Known("stopped", "its jobs are no longer in the queue", newest.stage, newest.id)
    return _from_folder(run, events, newest) or gone


def _from_folder(run: Run, events: EventLog, job: Job | None) -> _Known | None:
    """Returns what the run folder alone tells: without Slurm, or about jobs that Slurm has forgotten; or None."""
    stage, job_id = (job.stage, job.id) if job else ("", None)
    if is_alive(run, events):
        return _Known("running", stage="train", job=job_id)
    match _end(events):
        case Finished():
            return _Known("finished", stage=stage, job=job_id)
        case Cancelled():
            return _Known("cancelled", stage=stage, job=job_id)
        case GaveUp(reason=reason) | Failed(error=reason):
            return _Known("failed", reason, stage, job_id)
        case Preempted():
            return _Known("stopped", "everything is saved; the same command resumes it", stage, job_id)
    return None


def _end(events: EventLog) -> Event | None:
    """Returns the end that counts: a cancelled training still saves, and afterwards records that it was stopped."""
    ends = events.ends()
    cancelled = None if any(isinstance(end, Finished) for end in ends) else EventLog(ends).last(Cancelled)
    return cancelled or (ends[-1] if ends else None)


def _status(run: Run, events: EventLog, known: _Known, max_iters: int) -> RunStatus:
    lines = _last_lines(run)
    last = lines[-1] if lines else {}
    step = int(last.get("step", 0))
    running = known.state == "running" and known.stage == "train"
    left = max_iters - step
    recent = [float(line["time/step_s"]) for line in lines[-10:] if "time/step_s" in line]
    account = goodput(run, events, now=time.time() if known.state in ("running", "queued") else None)
    saved = [step_of(path) or 0 for path in published(run.checkpoints)]
    began = job_records.notes(run, "train").last(AttemptBegan)
    return RunStatus(
        run=str(run.path),
        state=known.state,
        reason=known.reason,
        stage=known.stage,
        job=known.job,
        nodes=known.nodes or (began.nodes if began is not None and known.stage == "train" else ""),
        step=step,
        max_iters=max_iters,
        loss=last.get("train/loss"),
        tokens_per_s=last.get("train/tokens_per_s"),
        eta_s=left * sum(recent) / len(recent) if running and recent else None,
        restarts=max(0, len(events.of(StartBegan)) - 1),
        goodput=account.fraction if account is not None else None,
        wall=account,
        checkpoint=max(saved, default=None),
        updated=last.get("time"),
    )


def _last_lines(run: Run) -> list[dict[str, Any]]:
    """Returns the last logged steps without reading the whole history."""
    if not run.metrics_file.exists():
        return []
    start = max(0, run.metrics_file.stat().st_size - _TAIL_BYTES)
    # The tail may begin within a line: what is left of it is not a JSON object, and the reader skips it.
    found = (line.record for line in journal.read_steps(run.metrics_file, start))
    return [record for record in found if "train/loss" in record]


def _reason(events: EventLog, *kinds: type[GaveUp | Failed | Requeued]) -> str:
    """Returns the reason in the newest event of these kinds since the submission."""
    event = events.since_submission().last(*kinds)
    return "" if event is None else event.error if isinstance(event, Failed) else event.reason


def _why_it_waits(events: EventLog, info: JobInfo) -> str:
    if info.reason == "Dependency":
        return "waits for the stage before it"
    again = _reason(events, Requeued)
    return f"requeued after: {again}" if again and info.reason in ("BeginTime", "None", "") else info.reason
