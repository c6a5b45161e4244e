"""The training loop's tracker: `log`, `event`, `rewind` and `close` each write a line to disk and return."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.sections import Config
from pipeline.errors import PipelineError
from pipeline.run.events import Accounted, CaughtUp, Event, EventLog, Repeating, StartBegan, append
from pipeline.run.folder import Run
from pipeline.run.world import attempt_number
from pipeline.tracking import upload_state
from pipeline.tracking.helper import Helper
from pipeline.tracking.history import History
from pipeline.tracking.upload import describe
from pipeline.tracking.upload.store import resolve_uri

_log = logging.getLogger("pipeline.tracking")

CloseStatus = Literal["FINISHED", "FAILED", "KILLED", "STOPPED"]
_CLOSE_S = {"FINISHED": 30.0, "FAILED": 10.0, "KILLED": 5.0, "STOPPED": 5.0}
# All nodes of a job would wait: the evaluation job, the next start or `pipeline sync` sends the rest.
_CLOSE_IN_JOB_S = 2.0
_KEPT_LINES = 1000
_STALL = "time/checkpoint_stall_s"  # mean over the steps since the last line


class Tracker:
    """Records nothing, on all ranks but 0; on one rank of each further node a helper samples the node."""

    def __init__(self, helper: Helper | None = None) -> None:
        self._helper = helper

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics; `step` is the number of finished optimizer steps."""

    def event(self, event: Event) -> None:
        """Records an event."""

    def rewind(self, step: int) -> None:
        """Records that this process rolled back to the state after `step` and will train differently."""

    def mlflow_run_id(self) -> str | None:
        """Returns the id of the MLflow run that is fed; None while there is none."""
        return None

    def close(self, status: CloseStatus) -> None:
        """Ends tracking; STOPPED means that the run will resume."""
        if self._helper is not None:
            self._helper.close(_CLOSE_S["STOPPED"])


class RunTracker(Tracker):
    """Records a run, and has a helper process feed MLflow from the records; see `start` for the arguments."""

    def __init__(
        self,
        run: Run,
        config: Config,
        *,
        step: int,
        dataset: Mapping[str, Any],
        tokenizer_file: Path | None,
        superseded: Callable[[], bool],
    ) -> None:
        uri = None if config.tracking.uri == "none" else resolve_uri(config.tracking.uri)
        run.tracking.mkdir(parents=True, exist_ok=True)
        if tokenizer_file is not None and tokenizer_file.is_file() and not run.tokenizer_file.exists():
            shutil.copyfile(tokenizer_file, run.tokenizer_file)
        describe.write_environment(run)
        self._run = run
        self._superseded = superseded
        self._lock = threading.Lock()
        self._step, self._stall_s = step, 0.0
        self._history = History(run, step)
        self._repeating = self._begin(step)
        self._unwritten: deque[tuple[int, dict[str, float]]] = deque(maxlen=_KEPT_LINES)
        self._unwritten_events: deque[Event] = deque(maxlen=_KEPT_LINES)
        self._writing_events = threading.Lock()
        self._warned = 0.0
        self._uri = uri
        self._run_id: str | None = None

        def begin(s: upload_state.State) -> None:
            s.status, s.ended, s.store, s.attempt = "RUNNING", None, uri, s.attempt + 1
            s.place = upload_state.place_of(run)
            s.dataset = dict(dataset) or s.dataset
            # Held until the process ends in any way: it shows other processes that the run is alive.
            self._alive = upload_state.hold_alive(run, s.attempt)

        self._attempt = upload_state.update(run, begin).attempt
        super().__init__(Helper(run, uri, self._attempt))

    def _begin(self, step: int) -> bool:
        """Records the beginning of this start; returns whether it will repeat steps."""
        earlier = EventLog.load(self._run.events_file).of(StartBegan)
        reached = max([self._history.reached, *(start.reached for start in earlier)])
        self._history.reached = reached
        start = StartBegan(
            number=len(earlier) + 1,
            step=step,
            reached=reached,
            began=round(_process_began(), 3),
            last_seen=self._history.last_time,
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=attempt_number(os.environ),
            requeued=bool(earlier) and os.environ.get("SLURM_RESTART_COUNT", "0") != "0",
        )
        append(self._run.events_file, start)
        return reached > step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics by writing one line."""
        if self._superseded():
            return
        with self._lock:
            self._stall_s += float(metrics.get(_STALL, 0.0)) * max(0, step - self._step)
            self._step = step
        self._unwritten.append((step, {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}))
        reached = self._history.reached
        self._write_lines()
        if self._repeating and step >= reached:
            self._repeating = False
            self.event(CaughtUp(step=step))

    def event(self, event: Event) -> None:
        """Records an event; any thread may call it."""
        if self._superseded():
            return
        if isinstance(event, Accounted) and event.stall_s is None:
            with self._lock:
                event, self._stall_s = replace(event, stall_s=round(self._stall_s, 6)), 0.0
        self._unwritten_events.append(replace(event, time=event.time or round(time.time(), 3)))
        self._write_events()

    def _write_lines(self) -> None:
        """Writes the lines that are waiting; a failure leaves them for the next call."""
        try:
            while self._unwritten:
                self._history.log(*self._unwritten[0])
                self._unwritten.popleft()
        except (OSError, PipelineError) as error:
            self._warn(self._run.metrics_file, error)

    def _write_events(self) -> None:
        with self._writing_events:
            try:
                while self._unwritten_events:
                    append(self._run.events_file, self._unwritten_events[0])
                    self._unwritten_events.popleft()
            except OSError as error:
                self._warn(self._run.events_file, error)

    def rewind(self, step: int) -> None:
        """Records that this process rolled back to the state after `step` and will train differently."""
        if self._superseded():
            return
        try:
            self._history.rewind(step)
        except (OSError, PipelineError) as error:  # the next line tries again
            self._warn(self._run.metrics_file, error)
        with self._lock:
            self._step = step
        if self._history.reached > step:
            self._repeating = True
            self.event(Repeating(step=step, reached=self._history.reached))

    def mlflow_run_id(self) -> str | None:
        """Returns the id of the MLflow run, as the helper recorded it."""
        if self._uri is not None and self._run_id is None:
            try:
                self._run_id = upload_state.load(self._run).of(self._uri).run_id
            except PipelineError as error:
                _log.warning("the id of the MLflow run is unknown: %s", error)
        return self._run_id

    def close(self, status: CloseStatus) -> None:
        """Ends tracking and gives the helper a few seconds to send the rest; `pipeline sync` can do so later.

        Raises:
            PipelineError: The run is finished, and lines of metrics.jsonl could not be written.
        """
        assert self._helper is not None
        if self._superseded():
            self._close_history()
            self._helper.close(_CLOSE_S["KILLED"])
            os.close(self._alive)
            return
        self._write_lines()
        self._write_events()
        lost = len(self._unwritten) if status == "FINISHED" else 0
        self._close_history()
        if status == "STOPPED" and "SLURM_JOB_ID" not in os.environ:
            status = "KILLED"  # only a person can start it again

        def end(s: upload_state.State) -> None:
            # On a node given up as lost, an older process may end after a newer one has begun.
            if s.attempt == self._attempt:
                s.status, s.ended = status, round(time.time(), 3)

        try:
            upload_state.update(self._run, end)
        except (OSError, PipelineError) as error:  # `pipeline sync` and the next start see that this one has ended
            self._warn(self._run.mlflow_file, error)
        in_job = "SLURM_JOB_ID" in os.environ
        if not self._helper.close(_CLOSE_IN_JOB_S if in_job else _CLOSE_S[status]):
            who = "the next job of the run sends the rest, or" if in_job else "send the rest with:"
            _log.warning("MLflow has not received everything yet; %s pipeline sync %s", who, self._run.path)
        with contextlib.suppress(OSError):
            os.close(self._alive)
        if lost:
            raise PipelineError(
                f"{self._run.metrics_file}: the last {lost} lines could not be written and are lost; the run is "
                "finished, and its weights are saved"
            )

    def _close_history(self) -> None:
        try:
            self._history.close()
        except OSError as error:
            self._warn(self._run.metrics_file, error)

    def _warn(self, file: Path, error: Exception) -> None:
        now = time.monotonic()
        if now - self._warned > 60 or not self._warned:
            self._warned = now
            why = error.strerror if isinstance(error, OSError) else error
            _log.warning("%s: cannot be written (%s); the newest %d lines are kept in memory", file, why, _KEPT_LINES)


def start(
    run: Run,
    config: Config,
    *,
    step: int,
    provenance: dict[str, Any],
    dataset: dict[str, Any],
    tokenizer_file: Path | None,
    enabled: bool = True,
    samples_node: bool = False,
    superseded: Callable[[], bool] = lambda: False,
) -> Tracker:
    """Begins to record a start of a run; every rank calls it, with `enabled` on rank 0 only.

    Args:
        run: The run; its folder exists.
        config: The resolved config.
        step: Finished steps this start begins with; it is about to repeat recorded lines of later steps.
        provenance: What is known about this start; written to provenance.json unless it is there.
        dataset: What is known about the data (name, digest, tokens and so on), as plain values.
        tokenizer_file: The tokenizer.json to copy into the run folder.
        enabled: False for a tracker that records nothing.
        samples_node: Whether such a tracker records its node's system metrics: true on one rank of each further node.
        superseded: Whether another start has taken over the run: from then on nothing more is written.
    """
    if not enabled:
        return Tracker(Helper(run, None, upload_state.load(run).attempt) if samples_node else None)
    if provenance and provenance not in run.provenance():
        run.add_provenance(provenance)
    return RunTracker(run, config, step=step, dataset=dataset, tokenizer_file=tokenizer_file, superseded=superseded)


def _process_began() -> float:
    """Returns when this process started, in Unix seconds, because start-up includes the imports."""
    import psutil

    return psutil.Process().create_time()
