"""The store that the ranks share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import PrefixStore

from pipeline.train.ranks.store import HostedStore, RemoteStore, SharedStore

LIMIT = timedelta(seconds=20)


@pytest.fixture(params=["rank 0", "rank 1", "through PyTorch"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[SharedStore, SharedStore]]:
    """A store as one rank sees it, and as another one does."""
    host = HostedStore(0, b"secret", 2, LIMIT)
    remote = RemoteStore("127.0.0.1", host.port, b"secret", 1, LIMIT)
    seen = {"rank 0": host, "rank 1": remote, "through PyTorch": PrefixStore("", remote)}[request.param]
    yield seen, host  # type: ignore[misc]
    remote.close()
    host.close()


def test_values_are_bytes_that_every_rank_reads(pair: tuple[SharedStore, SharedStore]) -> None:
    one, _ = pair
    one.set("text", "Grüße")
    assert one.get("text").decode() == "Grüße"
    assert one.check(["text"]) and not one.check(["text", "other"])
    one.wait(["text"])
    assert (one.add("number", 2), one.add("number", -5), one.get("number")) == (2, -3, b"-3")
    assert one.delete_key("text") and not one.delete_key("text") and not one.check(["text"])


def test_a_value_that_does_not_come_is_an_error_within_the_limit(pair: tuple[SharedStore, SharedStore]) -> None:
    one, _ = pair
    with pytest.raises(RuntimeError, match="timeout"):
        one.wait(["never"], timedelta(seconds=0.05))


def test_a_thread_that_waits_keeps_no_other_from_asking(pair: tuple[SharedStore, SharedStore]) -> None:
    one, _ = pair
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(one.get("late")))
    waiting.start()
    time.sleep(0.1)
    one.set("late", "now")
    waiting.join(10)
    assert found == [b"now"]


def test_bytes_of_any_value_survive() -> None:
    host = HostedStore(0, b"secret", 2, LIMIT)
    host.set("bytes", bytes(range(256)))
    assert host.get("bytes") == bytes(range(256))
    host.close()


def test_without_rank_0_the_other_ranks_end_with_an_error() -> None:
    host = HostedStore(0, b"secret", 2, LIMIT)
    remote = RemoteStore("127.0.0.1", host.port, b"secret", 1, LIMIT)
    waiting = threading.Thread(target=host.close)
    waiting.start()
    with pytest.raises(RuntimeError, match="rank 0"):
        remote.get("never")
    with pytest.raises(RuntimeError, match="rank 0"):
        remote.set("key", "value")
    waiting.join(10)
