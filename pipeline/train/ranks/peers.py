"""Notices within seconds that a rank has died, whatever the backend does.

gloo fails as soon as a connection breaks; NCCL waits for a collective that never ends. Every rank therefore keeps one
TCP connection to rank 0, which the kernel closes with the process, however that ends. Rank 0 tells the other ranks
which rank ended and what its last error was.

If torchrun's agent is killed, the ranks survive it, and nothing would end them: each looks every second whether the
store that the agent keeps is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torch._C._distributed_c10d import Store, TCPStore

from pipeline.errors import EXIT_FAILED, NothingToDo, PipelineError, StopRequested, in_words
from pipeline.files import naming
from pipeline.run.events import Event
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.ranks.activity import Activity, Doing, Roster
from pipeline.train.ranks.hangs import HangWatch, leave_stacks
from pipeline.train.ranks.store import HostedStore, RemoteStore

HEARTBEAT_S = 2.0
AGENT_S = 1.0
LOOK_S = 1.0
SILENCE_S = 60.0
GRACE_S = 5.0
LAST_WORDS_S = 3.0
GOODBYE_S = 1.0
WATCHER_S = 5.0

_AGENT_HAS_STORE = "TORCHELASTIC_USE_AGENT_STORE"


class Peers:
    """The other ranks, as seen from this one.

    Args:
        world: This process's place.
        store: What all ranks share; rank 0's listens.
        activity: What this rank is doing, which it tells rank 0 with each heartbeat.

    Raises:
        PipelineError: A rank does not connect.
    """

    def __init__(self, world: World, store: Store, activity: Activity) -> None:
        # Called with the reason before this process is ended because its main thread hangs in a collective.
        self.at_exit: Callable[[str], None] = lambda lost: None
        self.lost: str | None = None  # which rank ended too early and why, once known
        self.hanging: Callable[[], str | None] = lambda: None  # which rank the other ranks wait for, where it is known
        self.roster = Roster(activity)  # complete on rank 0
        self._world = world
        self._activity = activity
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        self._watchers: list[threading.Thread] = []
        if isinstance(store, HostedStore):
            self._receive(store)
        elif isinstance(store, RemoteStore):
            self._connect(store)
        else:
            return
        self._start(self._beat)
        if os.environ.get(_AGENT_HAS_STORE) == "True":
            agent = _agent_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            self.watch(lambda: _without_agent(agent), AGENT_S)

    def cause_of(self, error: BaseException) -> str | None:
        """Returns which rank's end caused this error, waiting a moment for the news; None if the error is our own.

        A broken collective raises a RuntimeError, whose cause is the error of another rank, or a rank that hangs.
        """
        deadline = time.monotonic() + (LAST_WORDS_S if isinstance(error, RuntimeError) else 0.0)
        while self._world.size > 1 and self.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.lost or (self.hanging() if isinstance(error, RuntimeError) else None)

    def repeat(self, do: Callable[[], None], every_s: float) -> None:
        """Calls a function in a thread of this rank from now on."""

        def calls() -> None:
            while not self._closing.wait(every_s):
                do()

        self._start(calls)

    def watch_for_hangs(
        self, run: Run, record: Callable[[Event], None], show: Callable[[str], None], first: int
    ) -> None:
        """Looks every second whether any rank still moves (rank 0); takes the arguments of `HangWatch`."""
        if self._world.size > 1:
            hangs = HangWatch(run, self.roster, self.ask_for_stacks, record, show, first)
            self.hanging = lambda: hangs.hang
            self.repeat(hangs.look, LOOK_S)

    def ask_for_stacks(self, folder: Path) -> None:
        """Makes every rank that still answers leave its stacks in a folder (rank 0)."""
        self._send_all({"stacks": str(folder)})
        self._leave_stacks(folder)

    def watch(self, cause: Callable[[], str | None], every_s: float) -> None:
        """Ends all ranks as soon as `cause`, which a thread of this rank asks from now on, returns a reason."""

        def look() -> None:
            while not self._closing.wait(every_s):
                found = cause()
                if found is not None and not self._closing.is_set():
                    self._end(found, self._tell_all if self._world.is_first else lambda lost: None)
                    return

        self._watchers.append(self._start(look))

    def close(self, error: str | None = None) -> None:
        """Says goodbye; with an error, the other ranks end too and show it."""
        self._closing.set()
        self._send_all({"bye": True, "error": error})
        for connection in self._sockets:
            connection.close()
        for watcher in self._watchers:
            # At the exit of the process, a thread inside C++ code, such as the agent's store, ends it by SIGABRT.
            watcher.join(WATCHER_S)

    # ---- rank 0 ------------------------------------------------------------------------------

    def _receive(self, store: HostedStore) -> None:
        deadline = time.monotonic() + SILENCE_S
        while len(self._sockets) < self._world.size - 1:
            try:
                connection, hello = store.peers.get(timeout=max(0.001, deadline - time.monotonic()))
            except queue.Empty:
                raise PipelineError(
                    f"{len(self._sockets)} of {self._world.size - 1} ranks connected to rank 0 at "
                    f"{self._world.master_addr}, port {store.port}, within {SILENCE_S:.0f} seconds: the output of the "
                    "missing ranks shows why"
                ) from None
            self._add(connection, hello["rank"], hello["host"], self._tell_all)

    def _tell_all(self, lost: str) -> None:
        self._send_all({"lost": lost})

    # ---- every other rank ------------------------------------------------------------------

    def _connect(self, store: RemoteStore) -> None:
        with naming("rank 0", "does not answer", "its output shows why"):
            connection = store.connect("peers")
        self._add(connection, 0, "", lambda lost: None)

    # ---- every rank ------------------------------------------------------------------------

    def _add(self, connection: socket.socket, rank: int, host: str, tell: Callable[[str], None]) -> None:
        connection.settimeout(SILENCE_S)
        self._sockets.append(connection)
        self._start(self._hear, connection.makefile("r", encoding="utf-8"), rank, host, tell)

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            self._send_all({} if self._world.is_first else {"doing": self._activity.now().to_json()})

    def _leave_stacks(self, folder: Path) -> None:
        # In a thread of its own: asking a device that hangs may hang too, and this rank is to hear and to beat on.
        self._start(leave_stacks, folder, self._world.rank, self._activity)

    def _send_all(self, message: dict[str, Any]) -> None:
        with self._sending:  # lines of two threads must not mix
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    _send(connection, message)

    def _hear(self, stream: TextIO, rank: int, host: str, tell: Callable[[str], None]) -> None:
        who = f"rank {rank} on {host}" if host else f"rank {rank}"
        lost = f"{who} ended without an error message (killed, out of memory, or its node is gone)"
        try:
            for line in stream:
                message = json.loads(line)
                if "doing" in message:
                    self.roster.hear(rank, host, Doing(**message["doing"]))
                if "stacks" in message:
                    self._leave_stacks(Path(message["stacks"]))
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
        except (OSError, ValueError, TypeError):
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

    def _start(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="peers", daemon=True)
        thread.start()
        return thread


@contextlib.contextmanager
def watched(world: World, store: Store, activity: Activity) -> Iterator[Peers]:
    """Watches the other ranks; the error of the rank that failed first becomes the error of all.

    Args:
        world: This process's place.
        store: What all ranks share.
        activity: What this rank is doing.
    """
    peers = Peers(world, store, activity)
    try:
        yield peers
    except (StopRequested, NothingToDo):
        peers.close()
        raise
    except BaseException as error:
        lost = peers.cause_of(error)
        if lost is not None:
            peers.close()
            raise PipelineError(lost) from error
        peers.close(in_words(error) or type(error).__name__)
        raise
    peers.close()


def _agent_store(host: str, port: int) -> Store:
    # Only to see whether it is there: others can reach it too, and no value of ours is in it.
    return TCPStore(host, port, is_master=False, wait_for_workers=False)


def _without_agent(store: Store) -> str | None:
    try:
        store.check(["agent"])
    except RuntimeError:
        return "torchrun was killed"
    return None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall((json.dumps(message) + "\n").encode())
