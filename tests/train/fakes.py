"""A session without DeepSpeed, data or helper process: its parts only note what they are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.run.events import Event
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.engine.step_numbers import PendingNumbers
from pipeline.train.guard import Guard
from pipeline.train.profile.on_request import ProfileOnRequest
from pipeline.train.ranks.activity import Activity, Roster
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.session import Session
from tests.test_bad_input import experiment

CPU = torch.device("cpu")
INTERVALS = {"train.max_iters": 100, "train.log_interval": 10, "train.val_interval": 25}


class Tracker:
    """Notes what it would record."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.events: list[Event] = []
        self.closed: list[str] = []
        self.rewound: list[int] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.append((step, metrics))

    def event(self, event: Event) -> None:
        self.events.append(event)

    def rewind(self, step: int) -> None:
        self.rewound.append(step)

    def mlflow_run_id(self) -> str:
        return "an id"

    def close(self, status: str) -> None:
        self.closed.append(status)


class Progress:
    """Notes what a person would see."""

    def __init__(self) -> None:
        self.reached: list[int] = []
        self.shown: list[int] = []
        self.messages: list[str] = []

    def advance(self, step: int) -> None:
        self.reached.append(step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.shown.append(step)

    def message(self, text: str) -> None:
        self.messages.append(text)


class Saver:
    """Notes which steps it would save."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.waits: list[float | None] = []

    def save(self, step: int, fragments: list[Any], state: dict[str, Any]) -> None:
        self.saved.append((step, state))

    def superseded(self) -> str | None:
        return None

    def wait(self, timeout_s: float | None = None) -> None:
        self.waits.append(timeout_s)


class Counts:
    """Counts ten tokens of one source in each batch."""

    def before(self, batch: int, skipped: tuple[int, ...] = ()) -> dict[str, int]:
        return {"text": 10 * (batch - sum(index < batch for index in skipped))}

    def restore(self, state: dict[str, Any] | None) -> None:
        self.restored = state

    def state(self) -> dict[str, Any]:
        return {"batches": 1, "tokens": {"text": 10}}


def tiny_config(folder: Path, **changes: Any) -> Config:
    """The tiny experiment with long intervals; its data are not prepared."""
    return load_config(experiment(folder, **(INTERVALS | {"train.checkpoint_interval": 20} | changes)))


def fake_session(folder: Path, world: World | None = None, **changes: Any) -> Session:
    """A session at step 0 whose config is changed by dotted keys."""
    config = tiny_config(folder, **changes)
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    engine = SimpleNamespace(device=CPU, optimizer_steps=7, fragments=list, module=model, loss=None)
    run, activity, tracker = Run(folder / "runs" / "tiny"), Activity(CPU), Tracker()
    return Session(
        config=config,
        world=world or World(),
        run=run,
        reader=None,  # type: ignore[arg-type]
        validation=SimpleNamespace(sources=(None,)),  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        saver=Saver(),  # type: ignore[arg-type]
        stop=StopRequest(),
        activity=activity,
        roster=Roster(activity),
        profile=ProfileOnRequest(run, world or World(), CPU, HashStore(), activity, tracker.event),
        tracker=tracker,  # type: ignore[arg-type]
        progress=Progress(),  # type: ignore[arg-type]
        data_digest="d" * 64,
        tokenizer_digest="e" * 64,
        guard=Guard(config.guard),
        source_counts=Counts(),  # type: ignore[arg-type]
        step=0,
        tokens_seen=0,
        initialization=2,
    )


def pending(loss: float = 2.0, norm: float = 1.0, stop: int = 0) -> PendingNumbers:
    """The numbers of a step, with so many ranks that were asked to stop."""
    return PendingNumbers(torch.tensor([loss, norm, float(stop)]))
