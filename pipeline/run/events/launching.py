"""What happens to the jobs of a run; recorded by the launcher and by prepare jobs."""

from __future__ import annotations

from dataclasses import field

from pipeline.run.events.event import Event


class Submitted(Event, kind="submitted"):
    """Jobs were given to the scheduler."""

    jobs: list[str] = field(default_factory=list)
    site: str = ""


class Repeated(Event):
    """The tasks of the job start again after an attempt that did not finish."""

    job: str = ""
    reason: str = ""


class Requeued(Repeated, kind="requeued"):
    """The job is back in the queue."""


class Restarted(Repeated, kind="restarted"):
    """The job keeps its nodes, and its tasks start again on them at once."""


class NodeLost(Event, kind="node_lost"):
    """Nodes of the job failed."""

    job: str = ""
    nodes: list[str] = field(default_factory=list)


class Cancelled(Event, kind="cancelled"):
    """A user cancelled the job."""

    job: str = ""


class GaveUp(Event, kind="gave_up"):
    """The job will not be started again."""

    job: str = ""
    stage: str = ""
    reason: str = ""


class BranchReleased(Event, kind="branch_released"):
    """The checkpoint that a decay begins from is published; its job need not wait for the end of this run."""

    step: int = 0
    run: str = ""
    """Name of the run that decays."""
    job: str = ""


class PrepareBegan(Event, kind="prepare_began"):
    """A prepare job began."""

    slice: str | None = None
    """Which part it prepares, for example `1/8`; None for everything."""
    job: str = ""


class PrepareEnded(Event, kind="prepare_ended"):
    """A prepare job ended."""

    slice: str | None = None
    job: str = ""
    done: bool = False
