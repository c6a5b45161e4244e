"""What a stranger who connects to rank 0 gets: nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.train.ranks import door
from pipeline.train.ranks.door import Door, knock
from pipeline.train.ranks.store import HostedStore, RemoteStore

SECRET = b"of this start"
LIMIT = timedelta(seconds=20)
RUBBISH = (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\xfe\n", b"", b"x" * 5000, b"\0" * 66 + b'{"purpose": "store"}')


class Room:
    """A door, and who came in by it."""

    def __init__(self) -> None:
        self.came: list[dict[str, Any]] = []
        self.door = Door(0, SECRET, 2, self.admit)

    def admit(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        """Says a word to whoever comes in."""
        self.came.append(hello)
        connection.sendall(b"welcome")
        connection.close()


@pytest.fixture
def room() -> Iterator[Room]:
    """An open door."""
    made = Room()
    yield made
    made.door.close()


def stranger(port: int) -> socket.socket:
    """A connection of one who knows no secret."""
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def all_that_is_said(connection: socket.socket) -> bytes:
    """What is sent until the connection ends."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1000):
            said += piece
    return said


def test_a_rank_that_knows_the_secret_comes_in(room: Room) -> None:
    with knock("127.0.0.1", room.door.port, SECRET, {"rank": 1}) as connection:
        assert all_that_is_said(connection) == b"welcome"
    assert room.came == [{"rank": 1}]


@pytest.mark.parametrize("words", RUBBISH)
def test_a_stranger_gets_a_nonce_and_nothing_else(room: Room, words: bytes) -> None:
    with stranger(room.door.port) as connection:
        assert len(connection.recv(32, socket.MSG_WAITALL)) == 32
        with contextlib.suppress(OSError):  # the door may have closed already
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
        assert all_that_is_said(connection) == b""
    assert room.came == []


def test_another_secret_is_refused_on_both_sides(room: Room) -> None:
    with pytest.raises(OSError):
        knock("127.0.0.1", room.door.port, b"another secret", {})
    assert room.came == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impersonate, args=(server,))
        thread.start()
        with pytest.raises(ConnectionRefusedError):
            knock("127.0.0.1", server.getsockname()[1], SECRET, {})
        thread.join(10)


def impersonate(server: socket.socket) -> None:
    """Answers a rank as rank 0 would, without the secret: with its own proof."""
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"n" * 32)
        said = connection.recv(1000)
        connection.sendall(said[32:64])
        connection.recv(1)


def test_a_recorded_proof_opens_nothing(room: Room) -> None:
    """Whoever overheard a rank's words sends them again."""
    said: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as between:

        def overhear() -> None:
            connection, _ = between.accept()
            with connection, stranger(room.door.port) as onward:
                connection.sendall(onward.recv(32))
                said.append(connection.recv(1000))

        thread = threading.Thread(target=overhear)
        thread.start()
        with pytest.raises(OSError):
            knock("127.0.0.1", between.getsockname()[1], SECRET, {"rank": 1})
        thread.join(10)
    with stranger(room.door.port) as connection:
        connection.sendall(said[0])
        assert len(all_that_is_said(connection)) == 32
    assert room.came == []


@pytest.mark.timing
def test_strangers_that_say_nothing_delay_no_rank(room: Room) -> None:
    silent = [stranger(room.door.port) for _ in range(500)]
    began = time.monotonic()
    knock("127.0.0.1", room.door.port, SECRET, {"rank": 1}).close()
    assert time.monotonic() - began < 1
    for each in silent:
        each.close()


def test_one_byte_at_a_time_wins_no_time(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HELLO_S", 0.5)
    with stranger(room.door.port) as connection, contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)
        pytest.fail("the connection is still open")


def test_pytorchs_client_can_neither_read_nor_write_nor_stop_the_store() -> None:
    store = HostedStore(0, SECRET, 2, LIMIT)
    store.set("key", "value")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=2)).set("key", "theirs")
    ours = RemoteStore("127.0.0.1", store.port, SECRET, 1, LIMIT)
    assert ours.get("key") == b"value"
    ours.close()
    store.close()


def test_nothing_executable_is_understood() -> None:
    """The words of the store are JSON: what is not ends the connection of whoever said it."""
    store = HostedStore(0, SECRET, 3, LIMIT)
    with knock("127.0.0.1", store.port, SECRET, {"purpose": "store", "rank": 1}) as connection:
        connection.sendall(b"cos\nsystem\n(S'true'\ntR.\n")
        assert all_that_is_said(connection) == b""
    with knock("127.0.0.1", store.port, SECRET, {"purpose": "store", "rank": 2}) as connection:
        connection.sendall(json.dumps({"do": "check", "keys": []}).encode() + b"\n")
        assert connection.recv(100) == b"true\n"
    store.close()
