"""Runs once per attempt in the batch script: records what ended the attempt before, and decides what follows this one.

    python -m pipeline.launch.job.attempt begin SPEC     prints shell lines for the tasks; status 1: do not start
    python -m pipeline.launch.job.attempt end SPEC RC    requeues or not, or begins the next attempt in this allocation
                                                         as above; if it prints nothing, its status is the job's

It runs on the first node, outside the image, where Slurm's commands are available.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from pipeline.checkpoint.layout import published, step_of
from pipeline.data.layout import published_slices
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, PipelineError
from pipeline.launch.job.causes import Verdict, judge, notes_of_job, own_events, own_notes, slurm_log
from pipeline.launch.job.charges import record_charges
from pipeline.launch.job.messages import tell_failed, tell_finished, tell_gave_up
from pipeline.launch.job.requeue import holds_its_nodes, requeue
from pipeline.launch.job.spec import Attempt, this_attempt
from pipeline.launch.slurm import client as slurm
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, AttemptEvent
from pipeline.run.events import BadNode, Event, EventLog, GaveUp, NodeLost, Requeued, Restarted, StartBegan, append
from pipeline.run.world import ATTEMPT_VARIABLE, DEADLINE_VARIABLE
from pipeline.text_format import echo

# The signal comes at most a quarter of a short time limit before its end.
_LIMIT_IS_NEAR = 0.25


def begin(attempt: Attempt) -> str | None:
    """Records that an attempt begins and which nodes killed the one before.

    Returns:
        Shell lines for the batch script; None if the job was restarted too often.
    """
    earlier = _killed_before(attempt)
    before = [note.attempt + 1 for note in notes_of_job(attempt).of(AttemptEvent)]
    attempt = replace(attempt, number=max([attempt.allocation, *before]))
    if earlier is not None:
        lost = slurm.lost_nodes(slurm.hostnames(earlier.nodes))
        if lost:
            _record(attempt, NodeLost(job=attempt.job, nodes=lost))
            tell_failed(attempt, f"lost {', '.join(lost)}", earlier.attempt)
    gpus, cpus = attempt.requested()
    began = AttemptBegan(
        **attempt.about(), nodes=attempt.nodes, gpus=gpus, cpus=cpus, allocation=attempt.allocation,
        beside=attempt.beside, log_bytes=journal.size(slurm_log(attempt)),
    )  # fmt: skip
    _record(attempt, began)
    if attempt.stage == "evaluate" and attempt.site.accounting and not attempt.beside:
        record_charges(attempt)
    limit = attempt.site.requeue.max_restarts
    if attempt.number > limit:
        _give_up(attempt, f"the job was restarted {attempt.number} times; requeue.max_restarts of the site is {limit}")
        return None
    ends = slurm.end_time(attempt.raw_job)
    deadline = "" if ends is None else f"export {DEADLINE_VARIABLE}={math.floor(ends)}\n"
    return f"export {ATTEMPT_VARIABLE}={attempt.number}\n{deadline}"


def end(attempt: Attempt, code: int) -> int | None:
    """Decides what follows an attempt whose tasks ended with this status.

    Returns:
        The exit status of the job; None if its tasks start again at once. Where the job is requeued it does not
        return: Slurm kills the batch script.
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
    bad = {*lost, *_named_by_preflight(attempt)}
    at_once = not before and not bad and _may_start_at_once(attempt, verdict)
    _record(attempt, (Restarted if at_once else Requeued)(job=attempt.job, reason=verdict.reason))
    if verdict.outcome == "failed":
        tell_failed(attempt, verdict.reason)
    if at_once:
        return None
    if not requeue(attempt, nodes, sorted({*bad, *_lost_before(attempt)})):
        _give_up(attempt, "the job could not be requeued; submit it again: it resumes from its last checkpoint")
    return verdict.status


def _may_start_at_once(attempt: Attempt, verdict: Verdict) -> bool:
    """Returns whether the tasks may start again on the same nodes, without the queue, where the job could lose them.

    A second failure without progress goes through the queue: nodes that have a fault may be others then. What could
    not be recorded would be forgotten, and repeated without end.
    """
    failed = verdict.outcome == "failed" and verdict.most_failures is None
    return failed and bool(own_notes(attempt).of(AttemptEnded)) and holds_its_nodes(attempt)


def _taken_over_by(attempt: Attempt) -> StartBegan | None:
    """Returns the start outside this attempt that trains the run now; None if the newest start was this attempt's."""
    newest = own_events(attempt).last(StartBegan) if attempt.stage == "train" else None
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
    ended = [note for note in notes_of_job(attempt).of(AttemptEnded) if note.attempt != attempt.number]
    return sum(1 for note in ended if note.counts and note.progress == now)


def _limit_is_near(attempt: Attempt) -> bool:
    """Whether the time limit, and not preemption, must have stopped this attempt."""
    deadline = float(os.environ.get(DEADLINE_VARIABLE, math.inf))
    began = max((note.time for note in own_notes(attempt).of(AttemptBegan)), default=-math.inf)
    return deadline - time.time() <= _LIMIT_IS_NEAR * (deadline - began) < math.inf


def _killed_before(attempt: Attempt) -> AttemptBegan | None:
    """Returns the attempt before this one if it left no record of its end: its node died, or Slurm killed it."""
    before = notes_of_job(attempt)
    began = before.last(AttemptBegan)
    if began is None or any(note.attempt == began.attempt for note in before.of(AttemptEnded)):
        return None
    return began


def _lost_before(attempt: Attempt) -> list[str]:
    """Returns the nodes that this job lost in earlier attempts, which Slurm requeued before this script could act."""
    events = EventLog.load(attempt.run.events_file).of(NodeLost)
    return [node for event in events if event.job == attempt.job for node in event.nodes]


def _named_by_preflight(attempt: Attempt) -> list[str]:
    return [node for event in own_events(attempt).of(BadNode) for node in event.nodes]


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
        status = end(attempt, int(arguments[2])) if arguments[0] == "end" else None
        if status is not None:
            return status
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
