"""`pipeline profile`: asks a running training for a profile and waits until it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.launch.watch.run_status import RunStatus
from pipeline.launch.watch.status import statuses
from pipeline.run import journal
from pipeline.run.events import EventLog, ProfileBegan, Profiled, Ready, StartBegan, parse
from pipeline.run.folder import Run
from pipeline.run.profile_request import ProfileRequest, new_request, publish, withdraw
from pipeline.text_format import duration

WAIT_S = 600.0
# A validation or a save may come in between, and recording slows a step down.
TIMES_STEPS = 20
LOOK_S = 0.5
STATUS_S = 10.0

HOW_TO_OPEN = (
    "traces: open https://ui.perfetto.dev and drop the file there (it stays in your browser), or chrome://tracing; "
    "memory_*.pickle: https://pytorch.org/memory_viz; memory_*.txt: text"
)


def profile_run(run: Run, steps: int, ranks: list[int], show: Callable[[str], None]) -> list[Path]:
    """Returns the files of a profile of the next steps once the training has written them.

    Args:
        run: A run that is training, on this machine or in a job.
        steps: Number of steps.
        ranks: The ranks that record.
        show: Shows a line of progress.

    Raises:
        UsageError: The run is not training, has no such rank, or is recording already.
        PipelineError: It ended, did not answer in time, or a rank could not record; the message names what is written.
    """
    limit_s = WAIT_S + TIMES_STEPS * steps * _step_s(_training(run))
    _refuse_missing_ranks(run, ranks)
    request = new_request(steps, sorted(set(ranks)), limit_s)
    since = journal.size(run.events_file)
    publish(run, request)
    try:
        return _wait(run, request, since, show)
    finally:
        withdraw(run, request.id)


def _training(run: Run) -> RunStatus:
    status = statuses([run])[0]
    if status.state == "running" and status.stage == "train":
        return status
    stage = f" ({status.stage})" if status.stage else ""
    raise UsageError(f"{run.path}: is not training now, it is {status.state}{stage}; a profile needs a run that trains")


def _step_s(status: RunStatus) -> float:
    left = status.max_iters - status.step
    return status.eta_s / left if status.eta_s is not None and left > 0 else 0.0


def _refuse_missing_ranks(run: Run, ranks: list[int]) -> None:
    ready = EventLog.load(run.events_file).last(Ready, StartBegan)
    if isinstance(ready, Ready) and max(ranks) >= ready.world_size:
        raise UsageError(
            f"--ranks {max(ranks)}: the run trains on {ready.world_size} ranks, 0 to {ready.world_size - 1}"
        )


def _wait(run: Run, request: ProfileRequest, since: int, show: Callable[[str], None]) -> list[Path]:
    show(f"asked {run.path} for {request.steps} steps; it answers at the beginning of a step")
    asked = time.time()
    looked = time.monotonic()
    while True:
        # Looked at before the events: what a run wrote last, it wrote before it ended.
        ended = False
        if time.monotonic() - looked > STATUS_S:
            looked = time.monotonic()
            ended = statuses([run])[0].state != "running"
        lines = list(journal.read(run.events_file, since))
        since = lines[-1].end if lines else since
        for event in (parse(line.record) for line in lines):
            if isinstance(event, ProfileBegan) and event.request == request.id:
                ranks = ", ".join(map(str, request.ranks))
                show(f"recording from step {event.step + 1} on, on rank {ranks}; then the files are written")
            if isinstance(event, Profiled) and event.request == request.id:
                return _files(event)
        if ended:
            raise PipelineError(f"{run.path}: ended before the profile was written")
        if time.time() > request.until:
            raise PipelineError(
                f"{run.path}: no answer within {duration(time.time() - asked)}; the request is withdrawn. If "
                "`pipeline status` shows no new steps, the run hangs, or its code is older than this command"
            )
        time.sleep(LOOK_S)


def _files(event: Profiled) -> list[Path]:
    if event.problems:
        written = f"; written: {', '.join(event.files)}" if event.files else ""
        raise PipelineError(f"the profile is not complete: {'; '.join(event.problems)}{written}")
    return [Path(file) for file in event.files]
