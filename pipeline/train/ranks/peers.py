"""Notices within seconds that a rank has died, whatever the backend does.

gloo fails as soon as a connection breaks; NCCL waits for a collective that never ends. Every rank therefore keeps one
TCP connection to rank 0, which the kernel closes with the process, however that ends. Rank 0 tells the other ranks
which rank ended and what its last error was.

Under torchrun the store that all ranks share lives in torchrun's agent. If that is killed, the ranks survive it and
could save nothing more: each looks at the store every second.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from torch._C._distributed_c10d import Store

from pipeline.errors import EXIT_FAILED, PipelineError
from pipeline.run.world import World
from pipeline.train.ranks import group

HEARTBEAT_S = 2.0
AGENT_S = 1.0
SILENCE_S = 60.0
HELLO_S = 5.0
GRACE_S = 5.0
LAST_WORDS_S = 3.0
GOODBYE_S = 1.0

_LONGEST_HELLO = 1000
_UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


class Peers:
    """The other ranks, as seen from this one.

    Args:
        world: This process's place.
    """

    def __init__(self, world: World) -> None:
        # Called with the reason before this process is ended because its main thread hangs in a collective.
        self.at_exit: Callable[[str], None] = lambda lost: None
        self.lost: str | None = None  # which rank ended too early and why, once known
        self._world = world
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        if world.size == 1:
            return
        token = group.broadcast(os.urandom(16).hex(), world)
        if world.is_first:
            self._listen(token)
        else:
            self._connect(group.broadcast(("", 0), world), token)
        self._start(self._beat)
        if _UNDER_TORCHRUN in os.environ:
            store = group.store()
            self.watch(lambda: _without_agent(store), AGENT_S)

    def cause_of(self, error: BaseException) -> str | None:
        """Returns which rank's end caused this error, waiting a moment for the news; None if the error is our own.

        A broken collective raises a RuntimeError, whose cause is the error of another rank.
        """
        deadline = time.monotonic() + (LAST_WORDS_S if isinstance(error, RuntimeError) else 0.0)
        while self._world.size > 1 and self.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.lost

    def watch(self, cause: Callable[[], str | None], every_s: float) -> None:
        """Ends all ranks as soon as `cause`, which a thread of this rank asks from now on, returns a reason."""

        def look() -> None:
            while not self._closing.wait(every_s):
                found = cause()
                if found is not None and not self._closing.is_set():
                    self._end(found, self._tell_all if self._world.is_first else lambda lost: None)
                    return

        self._start(look)

    def close(self, error: str | None = None) -> None:
        """Says goodbye; with an error, the other ranks end too and show it."""
        self._closing.set()
        self._send_all({"bye": True, "error": error})
        for connection in self._sockets:
            connection.close()

    # ---- rank 0 ------------------------------------------------------------------------------

    def _listen(self, token: str) -> None:
        deadline = time.monotonic() + SILENCE_S
        with socket.create_server(("", 0), backlog=self._world.size) as server:
            address = (self._world.master_addr, server.getsockname()[1])
            group.broadcast(address, self._world)
            while len(self._sockets) < self._world.size - 1:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise PipelineError(
                        f"{len(self._sockets)} of {self._world.size - 1} ranks connected to rank 0 at {address[0]}, "
                        f"port {address[1]}, within {SILENCE_S:.0f} seconds: if the output of the missing ranks shows "
                        "no error, a firewall between the nodes must let their processes reach each other at any port"
                    ) from None
                stream = connection.makefile("r", encoding="utf-8")
                hello = _hello(connection, stream, token)
                if hello is None:
                    connection.close()
                    continue
                self._sockets.append(connection)
                self._start(self._hear, stream, f"rank {hello['rank']} on {hello['host']}", self._tell_all)

    def _tell_all(self, lost: str) -> None:
        self._send_all({"lost": lost})

    # ---- every other rank ------------------------------------------------------------------

    def _connect(self, address: tuple[str, int], token: str) -> None:
        connection = socket.create_connection(address, timeout=SILENCE_S)
        _send(connection, {"token": token, "rank": self._world.rank, "host": socket.gethostname()})
        self._sockets.append(connection)
        self._start(self._hear, connection.makefile("r", encoding="utf-8"), "rank 0", lambda lost: None)

    # ---- every rank ------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            self._send_all({})

    def _send_all(self, message: dict[str, Any]) -> None:
        with self._sending:  # lines of two threads must not mix
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    _send(connection, message)

    def _hear(self, stream: TextIO, who: str, tell: Callable[[str], None]) -> None:
        lost = f"{who} ended without an error message (killed, out of memory, or its node is gone)"
        try:
            for line in stream:
                message = json.loads(line)
                if "lost" in message:
                    lost = message["lost"]
                    break
                if message.get("bye"):
                    if message["error"] is None:
                        return
                    lost = f"{who} failed: {message['error']}"
                    break
        except TimeoutError:
            lost = f"{who} has been silent for {SILENCE_S:.0f} seconds (stopped, or its node hangs)"
        except (OSError, ValueError):
            pass  # the connection broke: `lost` says so already
        if not self._closing.is_set():
            self._end(lost, tell)

    def _end(self, lost: str, tell: Callable[[str], None]) -> None:
        """Gives the main thread a few seconds to fail by itself, then ends the process."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = lost
        tell(lost)
        if self._closing.wait(GRACE_S):
            return
        self.at_exit(lost)
        # `at_exit` has waited for a main thread that was still writing its last records, which exits by itself.
        if not self._closing.wait(GOODBYE_S):
            print(f"pipeline: error: {lost}", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, name="peers", daemon=True).start()


def _hello(connection: socket.socket, stream: TextIO, token: str) -> dict[str, Any] | None:
    """Returns how a rank introduced itself; None for anything else, for example a port scanner."""
    connection.settimeout(HELLO_S)
    try:
        hello = json.loads(stream.readline(_LONGEST_HELLO))
    except (ValueError, OSError):
        return None
    connection.settimeout(SILENCE_S)
    return hello if isinstance(hello, dict) and hello.get("token") == token else None


def _without_agent(store: Store) -> str | None:
    try:
        store.check(["agent"])
    except RuntimeError:
        return "torchrun was killed, and the store that the ranks share with it"
    return None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall((json.dumps(message) + "\n").encode())
