"""Connections between ranks, on which both sides prove that they know the secret of their start.

Any process that reaches a port can connect to it: another user of the node, or what scans ports. Each connection
therefore begins with a challenge in both directions, HMAC-SHA256 over fresh nonces (ISO/IEC 9798-4). The secret itself
is never sent, and nothing that a stranger says is parsed. Strangers are heard in threads of their own, so that one that
says nothing delays no rank.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

HELLO_S = 5.0
"""How long either side waits for the other one's proof."""

_NONCE = 32
_PROOF = 32
_LONGEST_HELLO = 1000
# More than this many strangers at a time push the oldest out: a rank answers within milliseconds.
_MOST_STRANGERS = 64
_PAUSE_S = 0.05

Admit = Callable[[socket.socket, dict[str, Any]], None]


class Door:
    """The port that rank 0 listens at, for as long as the ranks belong together.

    Args:
        port: The port; 0 lets the kernel choose.
        secret: The secret of this start.
        world_size: Number of ranks, which may all come at once.
        admit: Is called with each connection that has proved the secret, and with what it said of itself, in a thread
            of that connection.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, port: int, secret: bytes, world_size: int, admit: Admit) -> None:
        self._secret = secret
        self._admit = admit
        self._most = 2 * world_size + _MOST_STRANGERS
        self._strangers: dict[socket.socket, None] = {}  # in the order of their coming
        self._lock = threading.Lock()
        self._closed = False
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        backlog = max(world_size, socket.SOMAXCONN)
        self._server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=backlog)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._listen, name="door", daemon=True).start()

    def close(self) -> None:
        """Stops listening and sends the strangers away."""
        self._closed = True
        _shut(self._server)
        with self._lock:
            for stranger in self._strangers:
                _shut(stranger)
        self._server.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed; or the other side has left again; or no file descriptor is free
                time.sleep(_PAUSE_S)
                continue
            with self._lock:
                self._strangers[connection] = None
                if len(self._strangers) > self._most:
                    _shut(next(iter(self._strangers)))
            threading.Thread(target=self._hear, args=(connection,), name="door", daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        try:
            hello = _challenge(connection, self._secret)
        except (OSError, ValueError):
            hello = None
        with self._lock:
            del self._strangers[connection]
        if hello is None or self._closed:
            connection.close()
            return
        self._admit(connection, hello)


def knock(host: str, port: int, secret: bytes, hello: dict[str, Any]) -> socket.socket:
    """Returns a connection to rank 0, which has proved that it knows the secret.

    Args:
        host: The name or address of rank 0's node.
        port: The port of its `Door`.
        secret: The secret of this start.
        hello: What this rank says of itself, at most some hundred bytes.

    Raises:
        OSError: Nothing listens there, or something that does not know the secret.
    """
    said = json.dumps(hello).encode()
    connection = socket.create_connection((host, port), timeout=HELLO_S)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.monotonic() + HELLO_S
        asked, nonce = _exactly(connection, _NONCE, until), secrets.token_bytes(_NONCE)
        connection.sendall(nonce + _proof(secret, b"rank", asked, nonce, said) + len(said).to_bytes(2, "big") + said)
        if not hmac.compare_digest(_exactly(connection, _PROOF, until), _proof(secret, b"rank 0", asked, nonce, said)):
            raise ConnectionRefusedError("what listens there does not know the secret of this start")
        connection.settimeout(None)
        return connection
    except BaseException:
        connection.close()
        raise


def _challenge(connection: socket.socket, secret: bytes) -> dict[str, Any] | None:
    """Returns what a rank says of itself; None for anything that does not know the secret."""
    until = time.monotonic() + HELLO_S
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    asked = _exactly(connection, _NONCE, until)
    proof = _exactly(connection, _PROOF, until)
    length = int.from_bytes(_exactly(connection, 2, until), "big")
    if length > _LONGEST_HELLO:
        return None
    said = _exactly(connection, length, until)
    if not hmac.compare_digest(proof, _proof(secret, b"rank", nonce, asked, said)):
        return None
    connection.sendall(_proof(secret, b"rank 0", nonce, asked, said))
    connection.settimeout(None)
    hello: dict[str, Any] = json.loads(said)
    return hello


def _proof(secret: bytes, role: bytes, *parts: bytes) -> bytes:
    # The role keeps either side from sending the other one's proof back; the nonces have a fixed length.
    return hmac.digest(secret, role + b"\0" + b"".join(parts), "sha256")


def _exactly(connection: socket.socket, count: int, until: float) -> bytes:
    """Reads bytes; the limit holds for all of them, so that one byte a second does not help."""
    received = b""
    while len(received) < count:
        connection.settimeout(max(0.001, until - time.monotonic()))
        piece = connection.recv(count - len(received))
        if not piece:
            raise ConnectionResetError("the connection was closed before the proof")
        received += piece
    return received


def _shut(connection: socket.socket) -> None:
    # `close` would not wake a thread that waits for the socket.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
