"""Requests for a profile are answered whatever happens, and never disturb the training."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeline.run.events import Event, ProfileBegan, Profiled
from pipeline.run.folder import Run
from pipeline.run.profile_request import ProfileRequest, new_request, publish
from pipeline.run.world import World
from pipeline.train.profile.on_request import ProfileOnRequest
from pipeline.train.profile.recorder import Recorder
from pipeline.train.ranks.activity import Activity
from tests.processes import wait_until
from tests.train.profile.traces import spans

CPU = torch.device("cpu")


class Training:
    """A training of one rank, without the training: its steps add two numbers."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        self.recorded: list[Event] = []
        self.activity = Activity(CPU)
        self.profile = ProfileOnRequest(self.run, World(), CPU, HashStore(), self.activity, self.recorded.append)
        self.step = 0

    def ask(self, steps: int, ranks: tuple[int, ...] = (0,), wait_s: float = 60.0) -> ProfileRequest:
        request = new_request(steps, list(ranks), wait_s)
        publish(self.run, request)
        return request

    def take(self, steps: int) -> None:
        """Trains, and hears of a request one step late, as the loop does."""
        for _ in range(steps):
            self.profile.begin_step(self.step)
            with self.activity.phase("forward"):
                torch.ones(3) + 1
            self.step += 1
            self.profile.agree(self.profile.asked)

    def answer(self) -> Profiled:
        """The only answer, once there is one."""
        assert wait_until(lambda: self.profile.look() or bool(self.answers()), 30)
        (found,) = self.answers()
        assert not self.run.profile_request.exists()
        return found

    def answers(self) -> list[Profiled]:
        return [event for event in self.recorded if isinstance(event, Profiled)]


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_so_many_steps_are_recorded_and_named(training: Training) -> None:
    request = training.ask(3)
    training.take(4)
    training.profile.look()
    training.take(8)
    assert training.answer().problems == []
    assert training.recorded[0] == ProfileBegan(request=request.id, step=5)
    trace, memory = (Path(file) for file in training.answers()[0].files)
    assert trace.parent == memory.parent == training.run.profiles / request.id
    assert [name for name, _, _ in spans(trace) if name.startswith("step")] == ["step 6", "step 7", "step 8"]
    assert sum(name == "forward" for name, _, _ in spans(trace)) == 3
    assert "aten::" in memory.read_text()
    assert not [file for file in trace.parent.iterdir() if file.name.startswith(".")]


def test_one_request_after_the_other_is_answered(training: Training) -> None:
    for _ in range(5):
        request = training.ask(1)
        training.profile.look()
        training.take(3)
        assert training.answer().request == request.id
        training.recorded.clear()


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*_: Any) -> None:
    raise RuntimeError("the profiler is broken")


@pytest.mark.parametrize("failure", [full, broken])
@pytest.mark.parametrize("place", ["start", "stop", "_write_trace"])
def test_a_profile_that_fails_is_an_answer_and_training_continues(
    training: Training, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None]
) -> None:
    whole = getattr(Recorder, place)

    def fails(self: Recorder) -> None:
        if place == "stop":
            whole(self)
        failure()

    monkeypatch.setattr(Recorder, place, fails)
    training.ask(2)
    training.profile.look()
    training.take(6)
    answer = training.answer()
    assert answer.files == [] and len(answer.problems) == 1
    assert training.step == 6
    training.take(1)
    assert not training.activity.named


def test_a_rank_that_does_not_exist_is_an_answer(training: Training) -> None:
    training.ask(2, ranks=(0, 7))
    assert "rank 7" in training.answer().problems[0]
    training.take(3)
    assert not training.run.profiles.joinpath("trace_rank_0.json.gz").exists() and training.profile.asked == 0


def test_a_request_that_nobody_waits_for_is_not_answered(training: Training) -> None:
    training.ask(2, wait_s=0.05)
    time.sleep(0.1)
    training.profile.look()
    training.take(3)
    assert training.recorded == [] and training.profile.asked == 0


def test_a_training_that_ends_meanwhile_writes_what_it_has(training: Training) -> None:
    training.ask(100)
    training.profile.look()
    training.take(5)
    training.profile.close(30.0)
    (answer,) = training.answers()
    assert answer.problems == [] and len(answer.files) == 2
    assert [name for name, _, _ in spans(Path(answer.files[0])) if name.startswith("step")][-1] == "step 5"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_training_that_ends_before_the_first_step_answers(training: Training, steps: int) -> None:
    training.ask(2)
    training.profile.look()
    training.take(steps)
    training.profile.close(30.0)
    (answer,) = training.answers()
    assert answer.files == [] and len(answer.problems) == 1
    assert not training.run.profile_request.exists()


def test_nobody_asks_and_nothing_is_touched(training: Training) -> None:
    training.profile.look()
    training.take(3)
    training.profile.close(30.0)
    assert training.recorded == [] and list(training.run.path.iterdir()) == []
