"""Requests for a profile: one at a time, and none is left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run.folder import Run
from pipeline.run.profile_request import new_request, pending, publish, withdraw


def test_what_is_asked_is_what_is_read(tmp_path: Path) -> None:
    run, request = Run(tmp_path), new_request(5, [0, 7], 60.0)
    assert pending(run) is None
    publish(run, request)
    assert pending(run) == request
    assert [file.name for file in run.profiles.iterdir()] == [run.profile_request.name]


def test_a_second_request_is_refused_until_the_first_is_answered(tmp_path: Path) -> None:
    run, first, second = Run(tmp_path), new_request(5, [0], 60.0), new_request(1, [0], 60.0)
    publish(run, first)
    with pytest.raises(UsageError, match="another profile"):
        publish(run, second)
    assert pending(run) == first
    withdraw(run, second.id)
    assert pending(run) == first, "it is not the second one's to remove"
    withdraw(run, first.id)
    publish(run, second)
    assert pending(run) == second


@pytest.mark.parametrize("left", ["", "{}", "[1", '{"id": "../../x", "steps": 5, "ranks": [0], "until": 9e10}'])
def test_what_is_no_request_is_nobodys_and_is_replaced(tmp_path: Path, left: str) -> None:
    run, request = Run(tmp_path), new_request(5, [0], 60.0)
    run.profiles.mkdir()
    run.profile_request.write_text(left)
    assert pending(run) is None
    publish(run, request)
    assert pending(run) == request


def test_a_request_of_a_command_that_was_killed_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)
    publish(run, new_request(5, [0], 0.05))
    time.sleep(0.1)
    assert pending(run) is None
    request = new_request(1, [0], 60.0)
    publish(run, request)
    assert pending(run) == request
