"""Lets only the owner through to a page on this machine: loopback is open to every user of it.

MLflow's server reads and writes any file of its owner for whoever asks. It therefore listens on a socket in a folder
that only the owner can enter. What listens on the port is this gate, which wants a token, drawn for each start, with
each request; a browser gets it with the address, as a cookie.
"""

from __future__ import annotations

import contextlib
import hmac
import http.cookies
import io
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, parse_headers
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import discard

_COOKIE = "pipeline_ui"
_HEAD_S = 10.0
_LONGEST_HEAD = 64 << 10
_PIECE = 64 << 10
_PAUSE_S = 0.05
# The gate decides on these; the page needs none of them.
_OWN_HEADERS = frozenset({"connection", "keep-alive", "cookie", "authorization", "upgrade"})


@dataclass(frozen=True)
class _Request:
    method: str
    target: str
    version: str
    headers: Message
    body: bytes
    """What has come of it behind the head."""


class Gate:
    """Listens on loopback and passes on what carries the token.

    Args:
        port: The port; None for a free one.
        behind: The Unix socket of the server behind the gate.

    Raises:
        UsageError: The port is taken.
    """

    def __init__(self, port: int | None, behind: Path) -> None:
        self._behind = behind
        self.token = secrets.token_urlsafe(24)
        try:
            self._server = socket.create_server(("127.0.0.1", port or 0), backlog=socket.SOMAXCONN)
        except OSError as error:
            raise UsageError(
                f"port {port} is taken ({str(error.strerror).partition(' (')[0]}); choose another with --port"
            ) from error
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._closed = False
        threading.Thread(target=self._listen, name="gate", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed; or no file descriptor is free
                time.sleep(_PAUSE_S)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="gate", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answers one request; the next one needs another connection, so that none passes unseen behind it."""
        with connection, contextlib.suppress(OSError, ValueError, HTTPException):
            request = _read_head(connection)
            path, _, query = request.target.partition("?")
            given = urllib.parse.parse_qs(query).get("token", [""])[0]
            if self._is_token(given):
                # Without the token: it would stay in the browser's history.
                cookie = f"{_COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                _answer(connection, "303 See Other", "", f"Location: {path}\r\nSet-Cookie: {cookie}\r\n")
            elif self._may_pass(request.headers):
                self._pass_on(connection, request)
            else:
                _answer(connection, "401 Unauthorized", "open the address that `pipeline ui` has printed\n")

    def _may_pass(self, headers: Message) -> bool:
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given):
            return True
        cookies: http.cookies.SimpleCookie = http.cookies.SimpleCookie()
        with contextlib.suppress(http.cookies.CookieError):
            cookies.load(headers.get("Cookie", ""))
        return _COOKIE in cookies and self._is_token(cookies[_COOKIE].value)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _pass_on(self, connection: socket.socket, request: _Request) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(str(self._behind))
            except OSError:
                _answer(connection, "503 Service Unavailable", "the server has not started yet\n")
                return
            kept = [f"{k}: {v}\r\n" for k, v in request.headers.items() if k.lower() not in _OWN_HEADERS]
            head = f"{request.method} {request.target} {request.version}\r\n{''.join(kept)}Connection: close\r\n\r\n"
            server.sendall(head.encode("latin-1") + request.body)
            connection.settimeout(None)
            threading.Thread(target=_copy, args=(connection, server), name="gate", daemon=True).start()
            _copy(server, connection)
            # Closing alone would not end a connection that the other thread still reads.
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yields a new folder that only this user can enter."""
    # The path of a socket has at most 107 bytes: not in TMPDIR, which may be long.
    folder = Path("/tmp") / f"pipeline-ui-{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)  # fails if the name is taken
    try:
        yield folder
    finally:
        discard(folder)


def _read_head(connection: socket.socket) -> _Request:
    """Returns a request up to its body.

    Raises:
        OSError: It does not come in time.
        ValueError: It is no request.
    """
    until, received = time.monotonic() + _HEAD_S, b""
    while b"\r\n\r\n" not in received:
        connection.settimeout(max(0.001, until - time.monotonic()))
        piece = connection.recv(_PIECE)
        if not piece or len(received) > _LONGEST_HEAD:
            raise ValueError("no request")
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    line, _, headers = head.partition(b"\r\n")
    method, target, version = line.decode("latin-1").split(" ")
    if not target.startswith("/") or target.startswith("//"):
        raise ValueError("no path of this server")
    return _Request(method, target, version, parse_headers(io.BytesIO(headers + b"\r\n\r\n")), body)


def _answer(connection: socket.socket, status: str, text: str, headers: str = "") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\nContent-Type: text/plain\r\n{headers}"
    connection.sendall(f"{head}Connection: close\r\n\r\n{text}".encode())


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copies until the source ends, or the target is gone."""
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
