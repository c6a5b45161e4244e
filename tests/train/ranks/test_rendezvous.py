"""How the ranks of a start find each other."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.errors import EXIT_STOPPED, PipelineError, StopRequested, UsageError
from pipeline.run.world import World
from pipeline.train.ranks import rendezvous
from pipeline.train.ranks.rendezvous import meet
from tests import processes
from tests.processes import free_port, wait_until
from tests.train.conftest import Lab

STRANGER = 65534
LIMIT = timedelta(seconds=20)
SOON = timedelta(seconds=0.3)


def never() -> str | None:
    """No signal has come."""
    return None


def met(file: Path, size: int = 2) -> list[bytes]:
    """What ranks that meet through the file read from their store."""
    with ThreadPoolExecutor(size) as threads:
        asked = [threads.submit(meet, World(rank, rank, size), file, LIMIT, never) for rank in reversed(range(size))]
        stores = [each.result(timeout=30) for each in reversed(asked)]
    stores[0].set("key", "value")
    read = [store.get("key") for store in stores]
    for store in reversed(stores):
        store.close()
    return read


def test_ranks_meet_whoever_comes_first_and_leave_no_file(tmp_path: Path) -> None:
    file = tmp_path / "run" / "launch" / "meeting.json"
    assert met(file, 3) == [b"value"] * 3
    assert list(tmp_path.iterdir()) == [], "not even the folders"


def test_the_file_of_a_killed_start_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "meeting.json"
    with socket.create_server(("127.0.0.1", 0)) as other:  # its port has been taken by another process since
        stale = {"hosts": ["127.0.0.1"], "port": other.getsockname()[1], "secret": "00"}
        file.write_text(json.dumps(stale))
        file.chmod(0o600)
        other.listen()
        threading.Thread(target=refuse, args=(other,), daemon=True).start()
        assert met(file) == [b"value"] * 2


def refuse(server: socket.socket) -> None:
    """Accepts a connection and closes it."""
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def test_only_the_user_can_read_the_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "meeting.json"
    old = os.umask(0)
    try:
        with rendezvous._published(file, {"secret": "00"}):
            assert file.stat().st_mode & 0o777 == 0o600
            if os.geteuid() == 0:
                assert reads_as(STRANGER, file) is False
    finally:
        os.umask(old)


def reads_as(uid: int, file: Path) -> bool:
    """Whether another user can read a file."""
    code = "import os, sys; os.setuid(int(sys.argv[1])); sys.exit(not os.access(sys.argv[2], os.R_OK))"
    # No fork of this process: other tests may have left it too large for a copy.
    return subprocess.run([sys.executable, "-c", code, str(uid), file]).returncode == 0


@pytest.mark.parametrize("how", ["mode", "owner"])
def test_a_file_that_others_could_have_written_is_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "meeting.json"
    file.write_text(json.dumps({"hosts": ["127.0.0.1"], "port": free_port(), "secret": "00"}))
    file.chmod(0o622 if how == "mode" else 0o600)
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        os.chown(file, STRANGER, STRANGER)
    with pytest.raises(UsageError, match="meeting.json"):
        meet(World(1, 1, 2), file, LIMIT, never)


def test_a_fifo_in_place_of_the_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "meeting.json", 0o600)
    with pytest.raises(PipelineError, match="meeting.json"):
        meet(World(1, 1, 2), tmp_path / "meeting.json", SOON, never)


def test_rank_0_names_the_ranks_that_do_not_come(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"^rank 1, 2 "):
        meet(World(0, 0, 3), tmp_path / "meeting.json", SOON, never)
    assert list(tmp_path.iterdir()) == []


def test_without_rank_0_the_others_end_within_the_limit(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="meeting.json: rank 1 "):
        meet(World(1, 1, 2), tmp_path / "meeting.json", SOON, never)


def test_storage_that_does_not_answer_is_not_waited_for_as_long_as_ranks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(rendezvous, "_NO_ANSWER_S", 0.3)
    monkeypatch.setattr(rendezvous, "open_regular", stale)
    began = time.monotonic()
    with pytest.raises(PipelineError, match=r"meeting.json: could not be read .*Stale file handle.* rank 1 "):
        meet(World(1, 1, 2), tmp_path / "meeting.json", LIMIT, never)
    assert time.monotonic() - began < LIMIT.total_seconds() / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_ends_the_waiting(tmp_path: Path, rank: int) -> None:
    asked = iter([None, None, "SIGTERM"])
    with pytest.raises(StopRequested, match="SIGTERM"):
        meet(World(rank, rank, 2), tmp_path / "meeting.json", LIMIT, lambda: next(asked))
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_a_usage_error(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"MASTER_PORT={port}"):
            meet(World(0, 0, 2, "127.0.0.1", port), tmp_path / "meeting.json", SOON, never)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_ranks_are_missing_ends_training_with_85(lab: Lab, tmp_path: Path, rank: int) -> None:
    config = lab.config(f"alone_{rank}")
    launch = config.parent / "runs" / f"alone_{rank}" / "launch"
    environ = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = processes._forked(processes.command, (["train", str(config)],), [environ], tmp_path / "log")
    try:
        waiting = (lambda: list(launch.glob("meeting_*.json"))) if rank == 0 else (lambda: joins(ranks))
        assert wait_until(lambda: bool(waiting()), 30), ranks.words()
        sent = time.monotonic()
        ranks.kill(signal.SIGTERM)
        assert ranks.wait(30) and time.monotonic() - sent < 5
    finally:
        ranks.end()
    assert ranks.codes == {0: EXIT_STOPPED}, ranks.words()
    assert "SIGTERM" in ranks.words() and "Traceback" not in ranks.words()
    assert not launch.exists()


def joins(ranks: processes.Ranks) -> bool:
    """Whether the process has a handler for SIGTERM, which it has from just before the rendezvous."""
    status = Path(f"/proc/{ranks.processes[0].pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
