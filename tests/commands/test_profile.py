"""`pipeline profile` waits for the answer of a training, and says what became of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.commands import profile as module
from pipeline.commands.profile import profile_run
from pipeline.errors import EXIT_FAILED, EXIT_USAGE, PipelineError
from pipeline.launch.watch.run_status import RunStatus
from pipeline.run.events import ProfileBegan, Profiled, Started, append
from pipeline.run.folder import Run
from pipeline.run.profile_request import ProfileRequest, new_request, pending, publish
from tests.processes import wait_until


class Training:
    """A run of four ranks, whose state is set by hand, and which answers when told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = Run(folder)
        self.state = "running"
        self.said: list[str] = []
        append(self.run.events_file, Started(step=0, world_size=4))
        monkeypatch.setattr(module, "statuses", lambda runs: [self.status()])
        monkeypatch.setattr(module, "LOOK_S", 0.02)
        monkeypatch.setattr(module, "STATUS_S", 0.05)

    def status(self) -> RunStatus:
        empty = dict.fromkeys(RunStatus.__annotations__)
        return RunStatus(**empty | {"state": self.state, "stage": "train", "step": 5, "max_iters": 9, "eta_s": 0.04})

    def ask(self, ranks: tuple[int, ...] = (0,)) -> list[Path]:
        return profile_run(self.run, 3, list(ranks), self.said.append)

    def asked(self) -> ProfileRequest:
        assert wait_until(lambda: pending(self.run) is not None, 10)
        request = pending(self.run)
        assert request is not None
        return request


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(tmp_path, monkeypatch)


def test_the_files_are_those_that_the_training_wrote(training: Training) -> None:
    def answers() -> None:
        request = training.asked()
        assert (request.steps, request.ranks) == (3, [1, 3])
        append(training.run.events_file, Profiled(request="another", files=["not ours"]))
        append(training.run.events_file, ProfileBegan(request=request.id, step=41))
        append(training.run.events_file, Profiled(request=request.id, files=["a", "b"]))

    thread = threading.Thread(target=answers)
    thread.start()
    assert training.ask(ranks=(3, 1, 3)) == [Path("a"), Path("b")]
    thread.join()
    assert any("42" in line for line in training.said), "it says where the recording began"
    assert not training.run.profile_request.exists()


def test_what_a_rank_could_not_write_is_an_error_that_names_what_is_there(training: Training) -> None:
    def answers() -> None:
        problems = ["rank 1: No space left on device"]
        append(training.run.events_file, Profiled(request=training.asked().id, files=["a"], problems=problems))

    threading.Thread(target=answers).start()
    with pytest.raises(PipelineError, match="No space left.*a") as error:
        training.ask(ranks=(0, 1))
    assert error.value.exit_code == EXIT_FAILED


@pytest.mark.parametrize("state", ["queued", "finished", "failed", "stopped"])
def test_a_run_that_does_not_train_is_refused(training: Training, state: str) -> None:
    training.state = state
    with pytest.raises(PipelineError, match=state) as error:
        training.ask()
    assert error.value.exit_code == EXIT_USAGE and not training.run.profile_request.exists()


def test_a_rank_that_there_is_not_is_refused(training: Training) -> None:
    with pytest.raises(PipelineError, match="--ranks 4.*0 to 3") as error:
        training.ask(ranks=(0, 4))
    assert error.value.exit_code == EXIT_USAGE and not training.run.profile_request.exists()


def test_a_second_profile_is_refused_and_the_first_one_left_alone(training: Training) -> None:
    other = new_request(7, [0], 60.0)
    publish(training.run, other)
    with pytest.raises(PipelineError, match="another profile") as error:
        training.ask()
    assert error.value.exit_code == EXIT_USAGE and pending(training.run) == other


def test_a_training_that_ends_meanwhile_is_not_waited_for(training: Training) -> None:
    def ends() -> None:
        training.asked()
        training.state = "failed"

    threading.Thread(target=ends).start()
    with pytest.raises(PipelineError, match="ended before") as error:
        training.ask()
    assert error.value.exit_code == EXIT_FAILED and not training.run.profile_request.exists()


def test_what_was_written_last_counts_even_if_the_training_has_ended(training: Training) -> None:
    def answers() -> None:
        request = training.asked()
        time.sleep(0.2)
        append(training.run.events_file, Profiled(request=request.id, files=["a"]))
        training.state = "finished"

    threading.Thread(target=answers).start()
    assert training.ask() == [Path("a")]


def test_a_request_that_nobody_answers_is_withdrawn(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.2)
    monkeypatch.setattr(module, "TIMES_STEPS", 0)
    with pytest.raises(PipelineError, match="withdrawn"):
        training.ask()
    assert list(training.run.profiles.iterdir()) == []
