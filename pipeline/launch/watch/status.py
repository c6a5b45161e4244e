"""The state of runs, from their folders and from Slurm where it answers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pins import pins
from pipeline.config.sections import Config
from pipeline.errors import PipelineError
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.client import JobInfo
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.watch.logs import last_message
from pipeline.launch.watch.restarts import why_silent, why_waiting
from pipeline.launch.watch.run_status import RunStatus, Slowest, State
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, Charged
from pipeline.run.events import (
    Cancelled,
    EventLog,
    Failed,
    Finished,
    GaveUp,
    Hang,
    HangEnded,
    Preempted,
    Requeued,
    StartBegan,
)
from pipeline.run.folder import Run
from pipeline.run.records import ancestry
from pipeline.text_format import echo
from pipeline.tracking.goodput import goodput
from pipeline.tracking.upload.sync import is_alive
from pipeline.tracking.usage import usage

# Where the last logged step and the last validation are looked for: lines are about 400 bytes, more with many sources.
_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class _Known:
    """The state of a run, the reason for it, and the job that it refers to."""

    state: State
    reason: str = ""
    stage: str = ""
    job: str | None = None
    nodes: str = ""


def statuses(runs: Sequence[Run]) -> list[RunStatus]:
    """Returns the status of each run; Slurm is asked once for all of them."""
    chains: dict[Path, list[Job]] = {}
    for run in runs:
        with contextlib.suppress(PipelineError):  # raised again, and reported, for this run alone
            chains[run.path] = job_records.last_chain(run)
    infos = _ask_slurm([job for chain in chains.values() for job in chain])
    found = []
    for run in runs:
        try:
            chain = chains.get(run.path) or job_records.last_chain(run)
            found.append(_of_run(run, chain, infos, alone=len(runs) == 1))
        except PipelineError as error:  # a damaged run folder must not hide the other runs
            found.append(RunStatus(str(run.path), "unknown", str(error)))
    return found


def _of_run(run: Run, chain: Sequence[Job], infos: dict[str, JobInfo] | None, *, alone: bool) -> RunStatus:
    events = EventLog.load(run.events_file)
    known = _known(run, events, chain, infos)
    try:
        charged = _charges(run, known.state) if alone else []
        return _status(run, events, known, run.config(), ancestry(run.origin()), charged)
    except PipelineError as error:  # the rest may still be there
        return _status(run, events, replace(known, state="unknown", reason=str(error)), None, [])


def _ask_slurm(jobs: Sequence[Job]) -> dict[str, JobInfo] | None:
    """Returns what Slurm reports about these jobs; None where it is not installed or does not answer."""
    if not jobs:
        return {}
    if not slurm.installed():
        return None
    try:
        infos = slurm.queued(job.id for job in jobs)
    except slurm.SlurmError as error:
        echo(f"pipeline: {error}; the status below comes from the run folder alone", sys.stderr)
        return None
    gone = [job for job in jobs if not any(_belongs(info, job) for info in infos.values())]
    for accounting in (True, False):
        infos |= slurm.ended([job.id for job in gone if job.accounting is accounting], accounting)
    return infos


def _charges(run: Run, state: State) -> list[Charged]:
    """Asks Slurm's accounting what the jobs of a run cost that has ended; until then the run folder knows enough."""
    if state in ("running", "queued") or not slurm.installed():
        return []
    try:
        return job_records.charges(job_records.jobs(run))
    except slurm.SlurmError:
        return []


def _belongs(info: JobInfo, job: Job) -> bool:
    return job.holds(info.id) and job.is_named(info.name)


def _known(run: Run, events: EventLog, chain: Sequence[Job], infos: dict[str, JobInfo] | None) -> _Known:
    newest = chain[-1] if chain else None
    if newest is None:
        origin = None if run.events_file.exists() else run.origin()
        if origin is not None and "checkpoints" in origin:
            return _Known("finished", f"not trained: the {origin['what']}")
        return _from_folder(run, events, None) or _Known("stopped", "its process ended and left no record")
    if infos is None:
        return _from_folder(run, events, newest) or _Known(
            "unknown", "Slurm does not answer here", newest.stage, newest.id
        )
    of_job = {job.id: [info for info in infos.values() if _belongs(info, job)] for job in chain}
    active = [(job, info) for job in chain for info in of_job[job.id] if info.active]
    for job, info in active:
        if info.on_nodes:
            why = why_silent(run, events, info) if job.stage == "train" else ""
            return _Known("running", why, job.stage, info.id, info.nodes)
    if active:
        job, info = active[0]
        return _Known("queued", _why_it_waits(run, events, job, info), job.stage, info.id)
    for job in chain:
        for info in of_job[job.id]:
            if info.state != "COMPLETED" and job.stage != "evaluate" and isinstance(events.end(), Finished):
                return _Known("finished", "its job was not", job.stage, info.id)  # a user finished it by hand
            if info.state == "CANCELLED":
                return _Known("cancelled", _reason(events, GaveUp), job.stage, info.id, info.nodes)
            if info.state != "COMPLETED":
                # A batch script that could not even start its Python has recorded nothing.
                said = _reason(events, GaveUp, Failed) or ": ".join(
                    filter(None, (info.state, last_message(run, info.id)))
                )
                return _Known("failed", said, job.stage, info.id, info.nodes)
    if all(of_job[job.id] for job in chain):
        return _Known("finished", stage=newest.stage, job=newest.id)
    gone = _Known("stopped", "its jobs are no longer in the queue", newest.stage, newest.id)
    return _from_folder(run, events, newest) or gone


def _from_folder(run: Run, events: EventLog, job: Job | None) -> _Known | None:
    """Returns what the run folder alone tells: without Slurm, or about jobs that Slurm has forgotten; or None."""
    stage, job_id = (job.stage, job.id) if job else ("", None)
    if is_alive(run, events):
        return _Known("running", stage="train", job=job_id)
    match events.end():
        case Finished():
            return _Known("finished", stage=stage, job=job_id)
        case Cancelled():
            return _Known("cancelled", stage=stage, job=job_id)
        case GaveUp(reason=reason) | Failed(error=reason):
            return _Known("failed", reason, stage, job_id)
        case Preempted():
            return _Known("stopped", "everything is saved; the same command resumes it", stage, job_id)
    return None


def _status(
    run: Run,
    events: EventLog,
    known: _Known,
    config: Config | None,
    origin: list[str],
    charged: Sequence[Charged] = (),
) -> RunStatus:
    max_iters = config.train.max_iters if config is not None else 0
    tail = _last_lines(run)
    lines = [record for record in tail if "train/loss" in record]
    last = lines[-1] if lines else {}
    step = int(last.get("step", 0))
    running = known.state == "running" and known.stage == "train"
    left = max_iters - step
    recent = [float(line["time/step_s"]) for line in lines[-10:] if "time/step_s" in line]
    active, queued = known.state in ("running", "queued"), known.state == "queued"
    account = goodput(run, events, time.time() if active else None, queued)
    saved = [step_of(path) or 0 for path in published(run.checkpoints)]
    began = attempts.notes(run, "train").last(AttemptBegan)
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
        validation=_by_source(next((r for r in reversed(tail) if "val/loss" in r), {}), "val/", "/loss"),
        source_tokens=_by_source(last, "data/", "/tokens_seen"),
        tokens_per_s=last.get("train/tokens_per_s"),
        eta_s=left * sum(recent) / len(recent) if running and recent else None,
        restarts=max(0, len(events.of(StartBegan)) - 1),
        goodput=account.fraction if account is not None else None,
        wall=account,
        usage=usage(run, events, time.time() if known.state == "running" else None, charged),
        hang=_hang(events),
        slowest=_slowest(last),
        checkpoint=max(saved, default=None),
        parent=_parent(run, config) if config is not None else None,
        origin=origin,
        pinned=[pin.line() for pin in pins(run.checkpoints)],
        updated=last.get("time"),
    )


def _parent(run: Run, config: Config) -> str | None:
    folder = config.init.folder
    if folder is None or config.init.is_model_folder:
        return None
    parent = folder.parent.parent if step_of(folder) is not None else folder
    beside = run.path.with_name(parent.name)  # a relative folder is that of where the run was submitted
    return str(beside if not parent.exists() and beside.is_dir() else parent)


def _hang(events: EventLog) -> str | None:
    last = events.last(Hang, HangEnded, StartBegan, Finished)
    if not isinstance(last, Hang):
        return None
    named = [
        f"rank {rank} on {host}" + (f" (in {phase})" if phase else "")
        for rank, host, phase in zip(last.ranks, last.hosts, last.phases, strict=False)
    ]
    who = f"{', '.join(named)} did not come" if named else "all ranks have come equally far"
    return f"after step {last.step}: {who}; stacks are in {last.path}"


def _slowest(line: dict[str, Any]) -> Slowest | None:
    keys = ("ranks/slowest", "ranks/slowest_s", "ranks/median_s")
    if any(key not in line for key in keys):
        return None
    rank, seconds, median_s = (float(line[key]) for key in keys)
    return Slowest(int(rank), seconds, median_s)


def _last_lines(run: Run) -> list[dict[str, Any]]:
    """Returns the last logged steps without reading the whole history."""
    if not run.metrics_file.exists():
        return []
    start = max(0, run.metrics_file.stat().st_size - _TAIL_BYTES)
    # The tail may begin within a line: what is left of it is not a JSON object, and the reader skips it.
    return [line.record for line in journal.read_steps(run.metrics_file, start)]


def _by_source(record: Mapping[str, Any], before: str, after: str) -> dict[str, Any]:
    """Returns the numbers of a line whose keys hold the name of a source between these parts, by its name."""
    return {
        key[len(before) : -len(after)]: value
        for key, value in record.items()
        if key.startswith(before) and key.endswith(after) and len(key) > len(before) + len(after)
    }


def _reason(events: EventLog, *kinds: type[GaveUp | Failed | Requeued]) -> str:
    """Returns the reason in the newest event of these kinds since the submission."""
    event = events.since_submission().last(*kinds)
    return "" if event is None else event.error if isinstance(event, Failed) else event.reason


def _why_it_waits(run: Run, events: EventLog, job: Job, info: JobInfo) -> str:
    if info.reason == "Dependency":
        with contextlib.suppress(PipelineError):  # a damaged config is reported with the rest
            init = run.config().init
            if job.stage == "train" and init.step is not None:
                return f"waits for step {init.step} of {init.folder}"
        return "waits for the stage before it"
    known = why_waiting(run, info)
    if known:
        return known
    again = _reason(events, Requeued)
    return f"requeued after: {again}" if again and info.reason in ("BeginTime", "None", "") else info.reason
