"""The store that all ranks share: small values by name, held by rank 0, for this project and for PyTorch.

PyTorch's own TCPStore serves whoever connects: any user of the network could read and change where the ranks meet and
what they tell each other. This one answers only connections that have proved the secret of the start (`door.py`).
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

from pipeline.train.ranks.door import Door, knock

# A node that is gone closes no connection, which `peers` notices sooner. A rank 0 that is busy may be late.
_ANSWER_S = 600.0
_GOODBYE_S = 2.0
_PAUSE_S = 0.005


class SharedStore(Store):
    """What PyTorch and this project ask of the store, on any rank and in any thread.

    Values are bytes; text is encoded. Where a value does not come in time, or rank 0 is gone, all methods raise
    `DistStoreError`, a `RuntimeError`.

    Args:
        timeout: How long `get` and `wait` wait for a value.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__()
        self._timeout = timeout

    def set(self, key: str, value: str | bytes) -> None:
        """Stores a value and wakes whoever waits for it."""
        self._ask(do="set", key=key, value=(value.encode() if isinstance(value, str) else bytes(value)).hex())

    def get(self, key: str) -> bytes:
        """Returns a value, waiting until there is one."""
        self.wait([key])
        return bytes.fromhex(self._ask(do="get", key=key))

    def add(self, key: str, value: int) -> int:
        """Adds to a number, which begins at 0, and returns the sum."""
        return int(self._ask(do="add", key=key, value=value))

    def check(self, keys: list[str]) -> bool:
        """Whether all these values are there."""
        return bool(self._ask(do="check", keys=keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all these values are there."""
        seconds = (timeout or self._timeout).total_seconds()
        if not self._ask(do="wait", keys=keys, seconds=seconds):
            raise DistStoreError(f"timeout: {', '.join(keys)} did not come within {seconds:g} s")

    def delete_key(self, key: str) -> bool:
        """Forgets a value; returns whether there was one."""
        return bool(self._ask(do="delete", key=key))

    deleteKey = delete_key  # noqa: N815 - the name by which PyTorch calls it

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long `get` and `wait` wait."""
        self._timeout = timeout

    def clone(self) -> Store:
        """Returns the store itself: it may be used by any number of threads at a time."""
        return self

    def close(self) -> None:
        """Ends the connections; nothing can be asked from now on."""
        raise NotImplementedError

    def _ask(self, **request: Any) -> Any:
        raise NotImplementedError


class HostedStore(SharedStore):
    """The store on rank 0, which answers the other ranks.

    Args:
        port: Where to listen; 0 lets the kernel choose.
        secret: The secret of this start.
        world_size: Number of ranks.
        timeout: How long `get` and `wait` wait.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, port: int, secret: bytes, world_size: int, timeout: timedelta) -> None:
        super().__init__(timeout)
        self.peers: queue.Queue[tuple[socket.socket, dict[str, Any]]] = queue.Queue()
        """The connections by which ranks are watched, each with the rank and its host."""
        self._values = _Values()
        self._connections: set[socket.socket] = set()
        self._door = Door(port, secret, world_size, self._admit)
        self.port = self._door.port

    def close(self) -> None:
        """Stops listening and ends the connections of all ranks, except those by which they are watched.

        A rank that is still reading what rank 0 said last has a moment to do so.
        """
        until = time.monotonic() + _GOODBYE_S
        while self._connections and time.monotonic() < until:
            time.sleep(_PAUSE_S)
        self._door.close()
        for connection in list(self._connections):
            _end(connection)

    def _ask(self, **request: Any) -> Any:
        return self._values.answer(request)

    def _admit(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        if hello["purpose"] == "peers":
            self.peers.put((connection, hello))
            return
        self._connections.add(connection)
        self._values.answer({"do": "set", "key": joined(hello["rank"]), "value": ""})
        try:
            with connection, connection.makefile("rb") as requests:
                for line in requests:
                    connection.sendall(_line(self._values.answer(json.loads(line))))
        except (OSError, ValueError, KeyError):
            pass  # the rank is gone, which `peers` notices, or has asked for nonsense
        finally:
            self._connections.discard(connection)


class RemoteStore(SharedStore):
    """The store as seen from every other rank.

    Args:
        host: Rank 0's node.
        port: Its port.
        secret: The secret of this start.
        rank: This rank.
        timeout: How long `get` and `wait` wait.

    Raises:
        OSError: Nothing answers there that knows the secret.
    """

    def __init__(self, host: str, port: int, secret: bytes, rank: int, timeout: timedelta) -> None:
        super().__init__(timeout)
        self._place = (host, port, secret)
        self._rank = rank
        # One connection per thread that asks: a thread that waits must not keep others from asking.
        self._idle = [_Connection(self.connect("store"))]

    def connect(self, purpose: str) -> socket.socket:
        """Returns another connection to rank 0.

        Raises:
            OSError: Rank 0 cannot be reached.
        """
        return knock(*self._place, {"purpose": purpose, "rank": self._rank, "host": socket.gethostname()})

    def close(self) -> None:
        """Ends the connections."""
        while self._idle:
            self._idle.pop().close()

    def _ask(self, **request: Any) -> Any:
        try:
            connection = self._take()
            answer = connection.ask(request)
        except (OSError, ValueError) as error:
            raise DistStoreError(f"rank 0, which holds the store of all ranks, does not answer ({error})") from error
        self._idle.append(connection)
        return answer

    def _take(self) -> _Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return _Connection(self.connect("store"))


def joined(rank: int) -> str:
    """Returns the key that exists as soon as a rank has reached the store."""
    return f"joined/{rank}"


class _Connection:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._answers = connection.makefile("rb")

    def ask(self, request: dict[str, Any]) -> Any:
        try:
            self._socket.settimeout(request.get("seconds", 0.0) + _ANSWER_S)
            self._socket.sendall(_line(request))
            return json.loads(self._answers.readline())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class _Values:
    """The values themselves, and who waits for which."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        # One condition per key: with a thousand ranks that wait, a common one would wake them all for each value.
        self._arrivals: dict[str, threading.Condition] = {}

    def answer(self, request: dict[str, Any]) -> Any:
        """Answers one request: values and answers are those of JSON, bytes in hexadecimal."""
        do, key = request["do"], request.get("key", "")
        with self._lock:
            if do == "wait":
                return self._wait(request["keys"], request["seconds"])
            if do == "check":
                return all(each in self._values for each in request["keys"])
            if do == "get":
                return self._values[key]
            if do == "delete":
                return self._values.pop(key, None) is not None
            if do == "add":
                total = int(bytes.fromhex(self._values.get(key, "")) or b"0") + request["value"]
                self._put(key, str(total).encode().hex())
                return total
            self._put(key, request["value"])
            return None

    def _put(self, key: str, value: str) -> None:
        self._values[key] = value
        arrival = self._arrivals.pop(key, None)
        if arrival is not None:
            arrival.notify_all()

    def _wait(self, keys: Sequence[str], seconds: float) -> bool:
        until = time.monotonic() + seconds
        for key in keys:
            while key not in self._values:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._arrivals.setdefault(key, threading.Condition(self._lock)).wait(left)
        return True


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)
