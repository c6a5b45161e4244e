"""The connections that ranks watch each other by."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import EXIT_FAILED, PipelineError
from pipeline.run.world import World
from pipeline.train.ranks import peers
from pipeline.train.ranks.peers import Peers
from tests import processes
from tests.processes import wait_until


@dataclass
class Pair:
    """Two ranks in this process, each with the list of what ended it."""

    first: Peers
    second: Peers
    exits: list[int]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Rank 0 and rank 1 of two, connected over the loopback; a parameter limits their silence."""
    told: dict[int, queue.Queue[Any]] = {0: queue.Queue()}

    def broadcast(value: Any, world: World) -> Any:
        if world.is_first:
            told[0].put(value)
            return value
        return told[0].get(timeout=5)

    exits: list[int] = []
    monkeypatch.setattr(peers.group, "broadcast", broadcast)
    monkeypatch.setattr(peers, "SILENCE_S", getattr(request, "param", 60.0))
    monkeypatch.setattr(peers, "GRACE_S", 0.1)
    monkeypatch.setattr(peers, "GOODBYE_S", 0.1)
    monkeypatch.setattr(peers, "LAST_WORDS_S", 0.5)
    monkeypatch.setattr(peers, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(peers.os, "_exit", exits.append)
    with ThreadPoolExecutor(2) as threads:
        ranks = [threads.submit(Peers, World(rank=rank, size=2)) for rank in range(2)]
        first, second = (rank.result(timeout=10) for rank in ranks)
    yield Pair(first, second, exits)
    first.close()
    second.close()


def test_a_rank_that_says_goodbye_is_not_lost(pair: Pair) -> None:
    pair.second.close()
    time.sleep(0.15)
    assert pair.first.lost is None and pair.exits == []


@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_a_rank_becomes_that_of_the_other(pair: Pair, failing: int) -> None:
    ranks = [pair.first, pair.second]
    ranks[failing].close("shard 7 is gone")
    lost = ranks[1 - failing].cause_of(RuntimeError("a broken collective"))
    assert lost is not None
    assert lost.startswith(f"rank {failing}") and lost.endswith("failed: shard 7 is gone")


def test_a_connection_that_breaks_is_a_rank_that_died(pair: Pair) -> None:
    pair.second._sockets[0].shutdown(socket.SHUT_RDWR)
    lost = pair.first.cause_of(RuntimeError("a broken collective"))
    assert lost is not None
    assert lost.startswith(f"rank 1 on {socket.gethostname()} ended without")


@pytest.mark.parametrize("pair", [1.0], indirect=True)
def test_a_rank_that_keeps_its_connection_and_says_nothing_is_lost(pair: Pair) -> None:
    with pair.second._sending:  # no heartbeat leaves
        assert wait_until(lambda: pair.first.lost is not None, 10)
    assert "rank 1" in str(pair.first.lost) and "silent for 1 seconds" in str(pair.first.lost)


def test_a_main_thread_that_hangs_is_ended_with_its_records_written(pair: Pair, capsys: Any) -> None:
    reasons: list[str] = []
    pair.first.at_exit = reasons.append
    pair.second.close("out of memory")
    assert wait_until(lambda: bool(pair.exits), 5)
    assert pair.exits == [EXIT_FAILED]
    assert reasons == [pair.first.lost]
    assert capsys.readouterr().err == f"pipeline: error: {pair.first.lost}\n"


def test_a_main_thread_that_fails_by_itself_is_left_alone(pair: Pair) -> None:
    pair.second.close("out of memory")
    assert wait_until(lambda: pair.first.lost is not None, 5)
    pair.first.close()
    time.sleep(0.3)
    assert pair.exits == []


@pytest.mark.timing
def test_only_a_broken_collective_is_waited_for(pair: Pair) -> None:
    """Any other error is the rank's own."""
    began = time.monotonic()
    assert pair.first.cause_of(ValueError("a bug")) is None
    assert time.monotonic() - began < 0.4
    assert pair.first.cause_of(RuntimeError("a bug in torch")) is None
    assert time.monotonic() - began >= 0.5


def test_without_the_store_of_torchrun_a_rank_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(peers, "AGENT_S", 0.01)
    monkeypatch.setattr(peers, "GRACE_S", 60.0)
    alone = Peers(World())
    store: Any = SimpleNamespace(check=check)
    alone.watch(lambda: peers._without_agent(store), peers.AGENT_S)
    assert wait_until(lambda: alone.lost is not None, 5)
    assert "torchrun" in str(alone.lost)
    alone.close()


def test_alone_nothing_is_listened_to() -> None:
    alone = Peers(World())
    assert alone.cause_of(RuntimeError("a bug")) is None
    alone.close()


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


@pytest.mark.timing
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


@pytest.mark.slow
def test_a_rank_that_does_not_connect_is_missed_within_the_limit(tmp_path: Path) -> None:
    first, second = processes.on_ranks(waiting_for_one_that_never_comes, 2, tmp_path / "log")
    assert first.startswith("0 of 1 ranks ") and "rank 0 at 127.0.0.1, port " in first and "firewall" in first
    assert second == ""
