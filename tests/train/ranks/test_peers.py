"""The connections that ranks watch each other by."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeline.errors import EXIT_FAILED, PipelineError
from pipeline.run.world import World
from pipeline.train.ranks import peers
from pipeline.train.ranks.activity import Activity
from pipeline.train.ranks.peers import Peers
from pipeline.train.ranks.store import HostedStore, RemoteStore
from tests.processes import wait_until


def idle() -> Activity:
    """A rank that does nothing."""
    return Activity(torch.device("cpu"))


@dataclass
class Pair:
    """Two ranks in this process, each with the list of what ended it."""

    first: Peers
    second: Peers
    exits: list[int]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Rank 0 and rank 1 of two, connected over the loopback; a parameter limits their silence."""
    exits: list[int] = []
    monkeypatch.setattr(peers, "SILENCE_S", getattr(request, "param", 60.0))
    monkeypatch.setattr(peers, "GRACE_S", 0.1)
    monkeypatch.setattr(peers, "GOODBYE_S", 0.1)
    monkeypatch.setattr(peers, "LAST_WORDS_S", 0.5)
    monkeypatch.setattr(peers, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(peers.os, "_exit", exits.append)
    limit = timedelta(seconds=5)
    host = HostedStore(0, b"secret", 2, limit)
    remote = RemoteStore("127.0.0.1", host.port, b"secret", 1, limit)
    with ThreadPoolExecutor(2) as threads:
        ranks = [
            threads.submit(Peers, World(rank=rank, size=2), store, idle()) for rank, store in enumerate((host, remote))
        ]
        first, second = (rank.result(timeout=10) for rank in ranks)
    yield Pair(first, second, exits)
    first.close()
    second.close()
    remote.close()
    host.close()


def test_closing_waits_for_a_watcher_that_is_asking(pair: Pair) -> None:
    """Python ends a thread that is inside C++ code when the process exits: by SIGABRT, after a finished training."""
    asking, asked = threading.Event(), list[float]()

    def cause() -> None:
        asking.set()
        time.sleep(0.3)
        asked.append(time.monotonic())

    pair.first.watch(cause, 0.01)
    assert asking.wait(10)
    pair.first.close()
    closed = time.monotonic()
    time.sleep(0.5)
    assert asked and asked[-1] <= closed


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
    alone = Peers(World(), HashStore(), idle())
    store: Any = SimpleNamespace(check=check)
    alone.watch(lambda: peers._without_agent(store), peers.AGENT_S)
    assert wait_until(lambda: alone.lost is not None, 5)
    assert "torchrun" in str(alone.lost)
    alone.close()


def test_alone_nothing_is_listened_to() -> None:
    alone = Peers(World(), HashStore(), idle())
    assert alone.cause_of(RuntimeError("a bug")) is None
    alone.close()


def test_a_rank_that_does_not_connect_is_missed_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SILENCE_S", 0.3)
    store = HostedStore(0, b"secret", 2, timedelta(seconds=1))
    with pytest.raises(PipelineError, match="^0 of 1 ranks"):
        Peers(World(size=2), store, idle())
    store.close()
