"""A session without DeepSpeed, data or helper process: its parts only note what they are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.run.events import Event
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.engine.step_numbers import PendingNumbers
from pipeline.train.guard import Guard
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.session import Session
from tests.test_bad_input import experiment

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


def tiny_config(folder: Path, **changes: Any) -> Config:
    """The tiny experiment with long intervals; its data are not prepared."""
    return load_config(experiment(folder, **(INTERVALS | {"train.checkpoint_interval": 20} | changes)))


def fake_session(folder: Path, world: World | None = None, **changes: Any) -> Session:
    """A session at step 0 whose config is changed by dotted keys."""
    config = tiny_config(folder, **changes)
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    engine = SimpleNamespace(device=torch.device("cpu"), optimizer_steps=7, fragments=list, module=model, loss=None)
    return Session(
        config=config,
        world=world or World(),
        run=Run(folder / "runs" / "tiny"),
        reader=None,  # type: ignore[arg-type]
        validation=None,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        saver=Saver(),  # type: ignore[arg-type]
        stop=StopRequest(),
        tracker=Tracker(),  # type: ignore[arg-type]
        progress=Progress(),  # type: ignore[arg-type]
        data_digest="d" * 64,
        guard=Guard(config.guard),
        step=0,
        tokens_seen=0,
        initialization=2,
    )


def pending(loss: float = 2.0, norm: float = 1.0, stop: int = 0) -> PendingNumbers:
    """The numbers of a step, with so many ranks that were asked to stop."""
    return PendingNumbers(torch.tensor([loss, norm, float(stop)]))
