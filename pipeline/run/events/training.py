"""What happens in a start of a run; recorded by training."""

from __future__ import annotations

from dataclasses import field

from pipeline.run.events.event import Event, optional


class StartBegan(Event, kind="attempt"):
    """A training process began."""

    number: int = 0
    step: int = 0
    """Finished steps of the state it continues from."""
    reached: int = 0
    """Finished steps of the furthest start before it; more than `step` means that steps will be repeated."""
    began: float | None = None
    """When the process was created, in Unix seconds: earlier than `time` by the imports."""
    last_seen: float | None = None
    """When the start before it logged its last line, in Unix seconds."""
    host: str = ""
    job: str | None = None
    restart: int = 0
    """How often Slurm had restarted the job that it runs in."""
    requeued: bool = False
    """Whether Slurm restarted the job that it runs in."""


class BadNode(Event, kind="bad_node"):
    """Preflight found nodes on which training must not start."""

    nodes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Ready(Event):
    """Everything is ready for the first step: `started`, or `resumed` from a checkpoint of its own."""

    step: int = 0
    world_size: int = 0


class Started(Ready, kind="started"):
    """Training starts from fresh weights, or from what `init` names."""


class Resumed(Ready, kind="resumed"):
    """Training resumes from a checkpoint."""


class CheckpointRejected(Event, kind="checkpoint_rejected"):
    """A checkpoint was quarantined at start-up."""

    problem: str = ""


class CheckpointFailed(Event, kind="checkpoint_failed"):
    """A checkpoint could not be saved."""

    step: int = 0
    error: str | None = None


class BadBatch(Event):
    """A guard reported the batch of a step."""

    step: int = 0
    loss: str = ""
    norm: str = ""
    batch: int = 0
    """Index of the global batch."""
    path: str | None = None
    """Where the batch was recorded; None if that failed."""
    error: str | None = optional()


class BadStep(BadBatch, kind="bad_step"):
    """A loss or gradient was not finite; the step was skipped."""


class Spike(BadBatch, kind="spike"):
    """A loss was far above those before it."""


class RolledBack(Event, kind="rollback"):
    """Training rolled back to a checkpoint and skips batches."""

    step: int = 0
    to: int = 0
    skipped: list[int] = field(default_factory=list)


class Repeating(Event, kind="repeating"):
    """Steps up to `reached` are done again from here."""

    step: int = 0
    reached: int = 0


class CaughtUp(Event, kind="caught_up"):
    """From here on steps are done for the first time."""

    step: int = 0


class Network(Event, kind="network"):
    """Preflight measured the network between the ranks."""

    transport: str = ""
    """For example `gloo over TCP`, `NCCL over IB`."""
    gb_per_s: float = 0.0
    """Bytes that each rank sent per second in a sum over all ranks, in 10^9."""
    ranks: int = 0
    nodes: int = 0
    warning: str | None = optional()


class Hang(Event, kind="hang"):
    """No rank moves any longer; the ranks named are those that the other ranks wait for."""

    step: int = 0
    ranks: list[int] = field(default_factory=list)
    """Those that did not come; empty if all have come equally far."""
    hosts: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    """What each of them was doing when it was last heard."""
    waited_s: float = 0.0
    path: str = ""
    """The folder with the stacks of all ranks that answered."""


class HangEnded(Event, kind="hang_ended"):
    """The ranks move again."""

    seconds: float = 0.0
    """How long none moved."""


class ProfileBegan(Event, kind="profile_began"):
    """The ranks began to record a profile."""

    request: str = ""
    step: int = 0
    """Finished steps before the first one that is recorded."""


class Profiled(Event, kind="profiled"):
    """A profile is written, or failed; training continues in any case."""

    request: str = ""
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Accounted(Event):
    """An event that carries the checkpoint stall since the one before it."""

    step: int = 0
    stall_s: float | None = optional()
    """Seconds for which steps waited for a checkpoint."""


class Checkpointed(Accounted, kind="checkpointed"):
    """A checkpoint was published."""

    path: str | None = optional()
    digest: str | None = optional()
    seconds: float | None = optional()
    """From the beginning of the save until it was durable."""


class Preempted(Accounted, kind="preempted"):
    """The start stopped on request with everything saved."""

    reason: str | None = None


class Finished(Accounted, kind="finished"):
    """The last step is done."""


class Failed(Accounted, kind="failed"):
    """The start ended with an error."""

    error: str = ""
