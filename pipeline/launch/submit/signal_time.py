"""How long before the time limit Slurm must signal a job, from the step and save times that the run measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.launch.site import Site
from pipeline.run import journal
from pipeline.run.events import Checkpointed, EventLog, Ready, StartBegan
from pipeline.run.folder import Run

_UNMEASURED_S = 120
_LEAST_S = 30
# Ending takes more than a step and a save: agreeing, closing files, the last points for MLflow, srun.
_ENDING_S = 15.0


@dataclass(frozen=True)
class Measured:
    """Times of earlier attempts of a run, in seconds."""

    step_s: float
    save_s: float
    """The longest save, from its beginning until it was durable."""
    startup_s: float
    """From the beginning of the process to its first step."""


def measured(run: Run) -> Measured | None:
    """Returns what the run has measured; None before its first logged step and first save."""
    if not run.path.is_dir():
        return None
    values = [line.record.get("time/step_s") for line in journal.read(run.metrics_file)]
    steps = [float(value) for value in values if isinstance(value, (int, float))]
    events = EventLog.load(run.events_file)
    saves = [event.seconds for event in events.of(Checkpointed) if event.seconds is not None]
    if not steps or not saves:
        return None
    startup, began = 0.0, None
    for event in events:
        if isinstance(event, StartBegan):
            began = event.began
        elif isinstance(event, Ready) and began is not None:
            startup, began = max(startup, event.time - began), None
    return Measured(max(steps[-20:]), max(saves), startup)


def signal_time_s(run: Run, site: Site) -> int:
    """Returns how many seconds before the time limit of training Slurm sends the signal.

    Raises:
        UsageError: The limit leaves no time to train.
    """
    limit = site.train.time_limit_min * 60
    known = measured(run)
    if known is not None:
        needed = max(_LEAST_S, math.ceil(2 * known.step_s + 1.5 * known.save_s + _ENDING_S))
    else:
        needed = max(10, min(_UNMEASURED_S, limit // 4))
    if site.signal_before_end_s is not None:
        if known is not None and site.signal_before_end_s < known.step_s + known.save_s:
            raise UsageError(
                f"site {site.name}: signal_before_end_s: given {site.signal_before_end_s}, but a step and a save of "
                f"{run.path} took {known.step_s:.0f} + {known.save_s:.0f} s; allowed: {needed} or more, or nothing"
            )
        needed = site.signal_before_end_s
    startup = known.startup_s if known is not None else 0.0
    if needed + startup >= limit:
        raise UsageError(
            f"site {site.name}: train.time_limit_min: given {site.train.time_limit_min}, which leaves no time to "
            f"train: start-up takes {startup:.0f} s, and the signal to save comes {needed} s before the end; "
            f"allowed: {math.ceil((needed + startup) / 60) + 1} or more"
        )
    return needed
