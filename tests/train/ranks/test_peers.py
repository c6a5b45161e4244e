"""The connections that ranks watch each other by."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.run.world import World
from pipeline.train.ranks import peers
from pipeline.train.ranks.peers import Peers
from tests import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RUBBISH = (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\xfe\n", b"", b"x" * 5000, b'{"token": "another"}\n')


def connected_among_scanners(world: World) -> tuple[str | None, float]:
    """Which rank is lost after rank 0 was connected to by all sorts of things, and the seconds it took."""
    peers.HELLO_S = 0.5
    strangers: list[socket.socket] = []
    connect = Peers._connect

    def late(self: Peers, address: tuple[str, int], token: str) -> None:
        strangers.append(socket.create_connection(address))  # and never says a word
        for words in RUBBISH:
            with socket.create_connection(address) as stranger:
                stranger.sendall(words)
        connect(self, address, token)

    Peers._connect = late  # type: ignore[method-assign]
    began = time.monotonic()
    watching = Peers(world)
    took = time.monotonic() - began
    time.sleep(0.5)
    watching.close()
    return watching.lost, took


def test_what_scans_ports_does_not_end_start_up(tmp_path: Path) -> None:
    answers = processes.on_ranks(connected_among_scanners, 2, tmp_path / "log")
    assert [lost for lost, _ in answers] == [None, None]
    assert max(took for _, took in answers) < 10


def waiting_for_one_that_never_comes(world: World) -> str:
    """What rank 0 says."""
    peers.SILENCE_S = 1.0
    Peers._connect = lambda self, address, token: None  # type: ignore[method-assign]
    try:
        Peers(world).close()
    except PipelineError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_connect_is_missed_within_the_limit(tmp_path: Path) -> None:
    first, second = processes.on_ranks(waiting_for_one_that_never_comes, 2, tmp_path / "log")
    assert first.startswith("0 of 1 ranks connected to rank 0 at 127.0.0.1, port ") and "firewall" in first
    assert second == ""
