"""A stop is requested once, by a signal or by the wall-clock limit, and nothing else happens in a handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import EXIT_STOPPED, UsageError
from pipeline.train.ranks import stop as module
from pipeline.train.ranks.stop import StopRequest
from tests.experiment import write_experiment


class Left(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands at 1000 s, and a process that raises instead of ending."""
    fake = SimpleNamespace(now=1000.0)

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: fake.now, monotonic=lambda: fake.now))
    monkeypatch.setattr(os, "_exit", leave)
    return fake


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop_and_does_nothing_else(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and stop.reason == number.name


def test_the_first_reason_wins() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):
            signal.raise_signal(number)
        assert stop.reason == "SIGUSR2"
        stop.request("time limit")
        assert stop.reason == "SIGUSR2"


def test_outside_the_context_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in module._SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in module._SIGNALS] != before
    assert [signal.getsignal(number) for number in module._SIGNALS] == before


def test_the_context_may_be_entered_again_while_it_is_open() -> None:
    before = [signal.getsignal(number) for number in module._SIGNALS]
    with StopRequest() as stop:
        with stop:
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert [signal.getsignal(number) for number in module._SIGNALS] == before


# PyTorch imports numpy from C++, where an exception is lost.
INTERRUPTED = """
import signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.version":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["pipeline", "train", sys.argv[1]]
from pipeline.cli.main import main
main()
"""


def test_a_ctrl_c_while_libraries_are_imported_ends_the_start(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tmp_path / "runs", "never")
    command = [sys.executable, "-c", INTERRUPTED, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stderr == "pipeline: stopped by SIGINT before training began; nothing was trained\n"
    assert not (tmp_path / "runs").exists()


def test_a_second_ctrl_c_by_hand_exits_at_once(clock: SimpleNamespace) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        clock.now += module._SAME_PRESS_S  # one press, delivered twice
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"
        clock.now += 0.1
        with pytest.raises(Left, match="130"):
            signal.raise_signal(signal.SIGINT)


def test_any_other_repeated_signal_never_exits(clock: SimpleNamespace) -> None:
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            clock.now += 10
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGTERM"


@pytest.mark.parametrize(
    ("step_s", "save_s", "between_s", "reason"),
    [
        (10.0, 20.0, 40.0, None),  # 30 + 30 + 40 = 100 s, which is just enough
        (10.1, 20.0, 40.0, "time limit"),
        (10.0, 20.1, 40.0, "time limit"),
        (10.0, 20.0, 40.1, "time limit"),
        (0.0, 0.0, 0.0, None),
    ],
)
def test_the_limit_leaves_time_for_three_steps_and_a_save_and_a_half(
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    step_s: float,
    save_s: float,
    between_s: float,
    reason: str | None,
) -> None:
    monkeypatch.setenv("PIPELINE_DEADLINE", "1100")
    stop = StopRequest()
    stop.check_time(step_s, save_s, between_s)
    assert stop.reason == reason


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEADLINE", "18:00")
    with pytest.raises(UsageError, match="PIPELINE_DEADLINE=18:00: must be Unix seconds"):
        StopRequest()


def test_without_a_limit_no_step_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_DEADLINE", raising=False)
    stop = StopRequest()
    stop.check_time(1e9, 1e9, 1e9)
    assert not stop.requested
