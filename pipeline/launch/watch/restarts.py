"""Why a job runs again, waits, or is silent: what ended the attempt before, and which nodes Slurm has lost."""

from __future__ import annotations

import time
from datetime import datetime

from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm.client import JobInfo
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, AttemptEvent
from pipeline.run.events import EventLog, Failed, NodeLost, StartBegan
from pipeline.run.folder import Run
from pipeline.tracking.goodput import longest_silence_s

_NO_RECORD = "attempt {} left no record of its end, as when Slurm requeues a job by itself"


def why_begun(run: Run, job: str, attempt: int) -> str:
    """Returns what ended the attempt before this one of a job, in words; empty for the first."""
    if attempt == 0:
        return ""
    notes = _notes(run, job)
    if not notes:
        return ""
    ended = next((note for note in reversed(notes.of(AttemptEnded)) if note.attempt == attempt - 1), None)
    if ended is not None and not ended.lost:
        return f"attempt {attempt - 1} ended: {ended.reason}"
    lost = ended.lost if ended is not None else _recorded_as_lost(run, notes, attempt)
    return _were_lost(lost) or _NO_RECORD.format(attempt - 1)


def why_waiting(run: Run, info: JobInfo) -> str:
    """Returns why a job waits that has run before, and when it starts again; empty for one that has not."""
    began = _notes(run, info.id).last(AttemptBegan)
    if began is None:
        return ""
    why = why_begun(run, info.id, began.attempt + 1)
    if why == _NO_RECORD.format(began.attempt):
        why = _were_lost(_silent(began.nodes)) or why  # only the next attempt will record it
    at = slurm.start_time(info.id)
    expected = "" if at is None else f" at {datetime.fromtimestamp(at):%H:%M}"
    if info.reason in ("BeginTime", "None", ""):
        return f"{why}; starts again{expected or ' soon'}"
    return f"{why}; waits for {info.reason}" + (f", expected to start{expected}" if expected else "")


def why_silent(run: Run, events: EventLog, info: JobInfo) -> str:
    """Returns why a running training does not train: it starts again, it has failed, or a node does not answer."""
    began, start = _notes(run, info.id).last(AttemptBegan), events.last(StartBegan, Failed)
    if began is not None and began.attempt > 0 and (start is None or start.time < began.time):
        return f"starts again: {why_begun(run, info.id, began.attempt)}"
    if start is None:
        return ""
    last, longest = journal.last_step(run.metrics_file), longest_silence_s(run, events)
    heard = max(start.time, float(last["time"]) if last else 0.0)
    failed = f"ends: {start.error}" if isinstance(start, Failed) else ""
    if not failed and (longest is None or time.time() - heard <= longest):
        return ""
    nodes = _silent(info.nodes)
    return f"{', '.join(nodes)} {'does' if len(nodes) == 1 else 'do'} not answer" if nodes else failed


def _notes(run: Run, job: str) -> EventLog:
    return EventLog(note for note in attempts.every(run).of(AttemptEvent) if note.job == job)


def _recorded_as_lost(run: Run, notes: EventLog, attempt: int) -> list[str]:
    """Returns the nodes that this attempt recorded as lost, when it began, by the one before it."""
    began = {note.attempt: note for note in notes.of(AttemptBegan)}
    before, after = began.get(attempt - 1), began.get(attempt)
    if before is None or after is None:
        return []
    lost = [event for event in EventLog.load(run.events_file).of(NodeLost) if event.job == before.job]
    return [node for event in lost if before.time <= event.time <= after.time for node in event.nodes]


def _silent(nodes: str) -> list[str]:
    """Returns those of these nodes, in Slurm's short form, that are down or do not answer."""
    try:
        return slurm.lost_nodes(slurm.hostnames(nodes))
    except slurm.SlurmError:
        return []


def _were_lost(nodes: list[str]) -> str:
    return f"{', '.join(nodes)} {'was' if len(nodes) == 1 else 'were'} lost" if nodes else ""
