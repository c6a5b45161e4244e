"""What `pipeline status` knows of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.tracking.goodput import Goodput
from pipeline.tracking.usage import Usage

State = Literal["queued", "running", "finished", "cancelled", "failed", "stopped", "unknown"]


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of a run."""

    rank: int
    seconds: float
    """Its mean time before the first collective of a step."""
    median_s: float
    """The median of all ranks."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run and its latest figures; where its folder cannot be read, nothing but the reason."""

    run: str
    """Its folder."""
    state: State
    """`stopped` resumes when it is submitted or started again; `unknown`: neither Slurm nor the run folder tells."""
    reason: str
    """Why it waits, failed or stopped; may be empty."""
    stage: str = ""
    """What runs, waits or failed; empty where there is no job."""
    job: str | None = None
    """Its Slurm job; None for a run that is trained on this machine."""
    nodes: str = ""
    """Where it runs, or ran last."""
    step: int = 0
    """Finished steps, as far as they were logged."""
    max_iters: int = 0
    loss: float | None = None
    """Training loss at `step`."""
    validation: dict[str, float] = field(default_factory=dict)
    """Validation loss of each source at the last validation; empty before the first."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each source that it has trained on."""
    tokens_per_s: float | None = None
    """Throughput at `step`."""
    eta_s: float | None = None
    """Seconds until the last step; None unless it is training."""
    restarts: int = 0
    """How often training was started again."""
    goodput: float | None = None
    """Fraction of the wall time since submission in which training made progress."""
    wall: Goodput | None = None
    """Where the wall time went: seconds in the queue, in start-up, in training and so on."""
    usage: Usage | None = None
    """What its allocations cost; None where nothing is known."""
    hang: str | None = None
    """Which rank the other ranks wait for, while none moves or if the run ended so; None otherwise."""
    slowest: Slowest | None = None
    """The rank that the other ranks wait for longest, by the last line; None on a single rank."""
    checkpoint: int | None = None
    """Step of the newest checkpoint; None before the first."""
    parent: str | None = None
    """The folder of the run that it branches from; None if it does not."""
    origin: list[str] = field(default_factory=list)
    """What it started from, and what that started from; empty where its weights were drawn."""
    pinned: list[str] = field(default_factory=list)
    """Its checkpoints that other runs or jobs hold, and pins that no longer count."""
    updated: float | None = None
    """When something was last logged, in Unix seconds."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for programs."""
        return asdict(self)
