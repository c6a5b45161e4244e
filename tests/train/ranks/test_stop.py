"""A stop is requested once, by a signal or by the wall-clock limit, and nothing else happens in a handler."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from pipeline.train.ranks import stop as module
from pipeline.train.ranks.stop import StopRequest


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


def test_without_a_limit_no_step_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_DEADLINE", raising=False)
    stop = StopRequest()
    stop.check_time(1e9, 1e9, 1e9)
    assert not stop.requested
