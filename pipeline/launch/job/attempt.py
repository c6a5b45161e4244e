"""Runs once per attempt in the batch script: records what ended the attempt before, and decides what follows this one.

    python -m pipeline.launch.job.attempt begin SPEC     prints shell lines for the tasks; status 1: do not start
    python -m pipeline.launch.job.attempt end SPEC RC    requeues or not; its status is the job's

It runs on the first node, outside the image, where Slurm's commands are available.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.checkpoint.layout import published, step_of
from pipeline.data.layout import published_slices
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE, PipelineError
from pipeline.launch.job.causes import (
    bad_nodes_in_words,
    memory_in_words,
    ran_out_of_memory,
    rank_in_words,
    said_by_slurm,
    slurm_log,
)
from pipeline.launch.job.charges import record_charges
from pipeline.launch.job.messages import tell_failed, tell_finished, tell_gave_up
from pipeline.launch.job.requeue import requeue
from pipeline.launch.job.spec import Attempt, this_attempt
from pipeline.launch.slurm import client as slurm
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, AttemptEvent, RankFailed, RankStopped
from pipeline.run.events import (
    BadNode,
    Event,
    EventLog,
    Failed,
    Finished,
    GaveUp,
    NodeLost,
    Preempted,
    Requeued,
    StartBegan,
    append,
)
from pipeline.run.world import DEADLINE_VARIABLE
from pipeline.text_format import echo

# The signal comes at most a quarter of a short time limit before its end.
_LIMIT_IS_NEAR = 0.25
_KILLED = frozenset({128 + signal.SIGKILL})
# srun returns these after killing ranks that had no signal handler yet.
_ENDED_BY_SIGNAL = frozenset({128 + signal.SIGTERM, 128 + signal.SIGUSR2})


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


def begin(attempt: Attempt) -> str | None:
    """Records that an attempt begins and which nodes killed the one before.

    Returns:
        Shell lines for the batch script; None if the job was restarted too often.
    """
    earlier = _killed_before(attempt)
    if earlier is not None:
        lost = slurm.lost_nodes(slurm.hostnames(earlier.nodes))
        if lost:
            _record(attempt, NodeLost(job=attempt.job, nodes=lost))
            tell_failed(attempt, f"lost {', '.join(lost)}", earlier.attempt)
    gpus, cpus = attempt.requested()
    began = AttemptBegan(
        **attempt.about(), nodes=attempt.nodes, gpus=gpus, cpus=cpus, beside=attempt.beside,
        log_bytes=journal.size(slurm_log(attempt)),
    )  # fmt: skip
    _record(attempt, began)
    if attempt.stage == "evaluate" and attempt.site.accounting and not attempt.beside:
        record_charges(attempt)
    limit = attempt.site.requeue.max_restarts
    if attempt.number > limit:
        _give_up(attempt, f"the job was restarted {attempt.number} times; requeue.max_restarts of the site is {limit}")
        return None
    ends = slurm.end_time(attempt.raw_job)
    return "" if ends is None else f"export {DEADLINE_VARIABLE}={math.floor(ends)}\n"


def end(attempt: Attempt, code: int) -> int:
    """Decides what follows an attempt whose tasks ended with this status; returns the exit status of the job.

    It does not return where the job is requeued: Slurm kills the batch script.
    """
    taken = _taken_over_by(attempt) if code != EXIT_OK else None
    if taken is not None:
        return _end_superseded(attempt, code, taken)
    verdict = judge(attempt, code)
    nodes = [] if verdict.outcome == "done" else slurm.hostnames(attempt.nodes)
    lost = slurm.lost_nodes(nodes)
    # A lost node does not count as a failure, and neither does a stop, unless the time limit causes every one.
    failed = verdict.outcome == "failed" or (verdict.outcome == "stopped" and _limit_is_near(attempt))
    counts = failed and not lost
    before = _failures_without_progress(attempt)
    reached = progress(attempt)
    ended = AttemptEnded(
        **attempt.about(), outcome=verdict.outcome, reason=verdict.reason, code=code, progress=reached, lost=lost,
        counts=counts,
    )  # fmt: skip
    _record(attempt, ended)
    if verdict.outcome == "done":
        if attempt.stage == "train":
            tell_finished(attempt)
        return EXIT_OK
    why_not = _reason_to_give_up(attempt, verdict, before + 1 if counts else 0)
    if why_not is not None:
        _give_up(attempt, why_not)
        return verdict.status
    if lost:
        _record(attempt, NodeLost(job=attempt.job, nodes=lost))
    _record(attempt, Requeued(job=attempt.job, reason=verdict.reason))
    if verdict.outcome == "failed":
        tell_failed(attempt, verdict.reason)
    if not requeue(attempt, nodes, sorted({*lost, *_lost_before(attempt), *_named_by_preflight(attempt)})):
        _give_up(attempt, "the job could not be requeued; submit it again: it resumes from its last checkpoint")
    return verdict.status


def _taken_over_by(attempt: Attempt) -> StartBegan | None:
    """Returns the start outside this attempt that trains the run now; None if the newest start was this attempt's."""
    newest = _events(attempt).last(StartBegan) if attempt.stage == "train" else None
    own = newest is None or (newest.job == attempt.raw_job and newest.restart == attempt.number)
    return None if own else newest


def _end_superseded(attempt: Attempt, code: int, by: StartBegan) -> int:
    """Ends an attempt whose run belongs to another start: no requeue, and no event among the other's."""
    where = f"on {by.host}" + (f" in job {by.job}" if by.job else "")
    why = f"another start of the run, {where}, has taken over"
    ended = AttemptEnded(**attempt.about(), outcome="failed", reason=why, code=code, progress=progress(attempt))
    _record(attempt, ended)
    echo(f"pipeline: error: {attempt.stage}: {why}; this job is not requeued", sys.stderr)
    return EXIT_FAILED


def judge(attempt: Attempt, code: int) -> Verdict:
    """Returns how this attempt ended.

    srun's status alone does not tell: when the first rank ends, it kills the other ranks and returns the highest
    status. What training recorded comes first, then the ranks that ended without having been asked to.
    """
    events = _events(attempt) if attempt.stage == "train" else EventLog()
    if code == EXIT_OK or events.of(Finished):
        return Verdict("done", "", EXIT_OK)
    preempted = events.last(Preempted)
    if preempted is not None:
        return Verdict("stopped", preempted.reason or "asked to stop", EXIT_STOPPED)
    culprits = _own_notes(attempt).of(RankFailed)
    if ran_out_of_memory(attempt, asks=code in _KILLED or any(note.status in _KILLED for note in culprits)):
        return Verdict("failed", memory_in_words(attempt, culprits), EXIT_FAILED, most_failures=2)
    failed = events.last(Failed)
    said = failed.error if failed is not None else bad_nodes_in_words(events.last(BadNode))
    if culprits:
        return Verdict("failed", said or rank_in_words(culprits[0]), culprits[0].status)
    if said:
        return Verdict("failed", said, EXIT_FAILED)
    stopped = bool(_own_notes(attempt).of(RankStopped))
    if code == EXIT_STOPPED or (stopped and code in _ENDED_BY_SIGNAL):
        return Verdict("stopped", "asked to stop", EXIT_STOPPED)
    said = said_by_slurm(attempt) or f"see {slurm_log(attempt)}"
    return Verdict("failed", f"srun ended with status {code}: {said}", code)


def progress(attempt: Attempt) -> int:
    """Returns what no failure can undo: the step of the newest checkpoint, or the number of finished slices."""
    run = attempt.run
    if attempt.stage == "train":
        return max((step_of(path) or 0 for path in published(run.checkpoints)), default=0)
    if attempt.stage == "prepare":
        return sum(1 for _ in published_slices(Path(run.config().data.path)))
    return 0


def _reason_to_give_up(attempt: Attempt, verdict: Verdict, failures: int) -> str | None:
    policy = attempt.site.requeue
    if attempt.number >= policy.max_restarts:
        return f"{verdict.reason}; the job was restarted {attempt.number} times, as often as the site allows"
    if verdict.status == EXIT_USAGE:
        return f"{verdict.reason}; trying again would not help"
    most = min(policy.same_step_failures, verdict.most_failures or policy.same_step_failures)
    if failures < most:
        return None
    where = f" at step {progress(attempt)}" if attempt.stage == "train" else ""
    if verdict.outcome == "stopped":
        return f"reached its time limit {failures} times{where} without progress; raise time_limit_min in the site file"
    return f"failed {failures} times{where} without progress: {verdict.reason}"


def _failures_without_progress(attempt: Attempt) -> int:
    """Counts the failed attempts of this job since it last made progress."""
    now = progress(attempt)
    ended = [note for note in _notes_of_job(attempt).of(AttemptEnded) if note.attempt != attempt.number]
    return sum(1 for note in ended if note.counts and note.progress == now)


def _limit_is_near(attempt: Attempt) -> bool:
    """Whether the time limit, and not preemption, must have stopped this attempt."""
    deadline = float(os.environ.get(DEADLINE_VARIABLE, math.inf))
    began = max((note.time for note in _own_notes(attempt).of(AttemptBegan)), default=-math.inf)
    return deadline - time.time() <= _LIMIT_IS_NEAR * (deadline - began) < math.inf


def _killed_before(attempt: Attempt) -> AttemptBegan | None:
    """Returns the attempt before this one if it left no record of its end: its node died, or Slurm killed it."""
    before = _notes_of_job(attempt)
    began = before.last(AttemptBegan)
    if began is None or any(note.attempt == began.attempt for note in before.of(AttemptEnded)):
        return None
    return began


def _notes_of_job(attempt: Attempt) -> EventLog:
    notes = attempts.notes(attempt.run, attempt.stage)
    return EventLog(note for note in notes.of(AttemptEvent) if note.job == attempt.job)


def _own_notes(attempt: Attempt) -> EventLog:
    return EventLog(note for note in _notes_of_job(attempt).of(AttemptEvent) if note.attempt == attempt.number)


def _events(attempt: Attempt) -> EventLog:
    """Returns what training recorded since this attempt began."""
    began = max((note.time for note in _own_notes(attempt).of(AttemptBegan)), default=0.0)
    return EventLog.load(attempt.run.events_file).since(began)


def _lost_before(attempt: Attempt) -> list[str]:
    """Returns the nodes that this job lost in earlier attempts, which Slurm requeued before this script could act."""
    events = EventLog.load(attempt.run.events_file).of(NodeLost)
    return [node for event in events if event.job == attempt.job for node in event.nodes]


def _named_by_preflight(attempt: Attempt) -> list[str]:
    return [node for event in _events(attempt).of(BadNode) for node in event.nodes]


def _record(attempt: Attempt, event: Event) -> None:
    """Records an event; reports a failed write: a full disk must not cost the attempt, nor the requeue after it."""
    try:
        if isinstance(event, AttemptEvent):
            attempts.note(attempt.run, event)
        elif not attempt.beside:
            append(attempt.run.events_file, event)
    except OSError as error:
        echo(f"pipeline: {error}; the outcome of this attempt is not recorded", sys.stderr)


def _give_up(attempt: Attempt, why: str) -> None:
    _record(attempt, GaveUp(job=attempt.job, stage=attempt.stage, reason=why))
    echo(f"pipeline: error: {attempt.stage}: {why}", sys.stderr)
    tell_gave_up(attempt, why)


def main(arguments: list[str]) -> int:
    """Runs `begin` or `end` for the batch script."""
    try:
        attempt = this_attempt(arguments[1])
        if arguments[0] == "end":
            return end(attempt, int(arguments[2]))
        lines = begin(attempt)
    except PipelineError as error:
        echo(f"pipeline: error: {error}", sys.stderr)
        return EXIT_FAILED
    if lines is None:
        return EXIT_FAILED
    print(lines, end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
