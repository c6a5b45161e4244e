"""Another user of the node connects to the ports of a training: it gets nothing, changes nothing and delays nothing."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - the other user may not be able to read the library
import os
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests import processes
from tests.experiment import events, last_step
from tests.processes import wait_until
from tests.train.conftest import Lab

STRANGER = 65534

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user"),
]


def ports_of(pid: int | None) -> list[int]:
    """Where a process listens."""
    return sorted({c.laddr.port for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"})


def attack(ports: list[int], seconds: float) -> int:
    """What another user tries in that time; returns 0 if nothing comes of it."""
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    until = time.monotonic() + seconds
    silent: list[socket.socket] = []
    while time.monotonic() < until:
        for port in ports:
            with contextlib.suppress(OSError):
                silent.append(socket.create_connection(("127.0.0.1", port), timeout=2))
                silent[-1].sendall(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
        time.sleep(0.02)
        if len(silent) > 200:
            for each in silent:
                each.close()
            silent.clear()
    for port in ports:
        with contextlib.suppress(RuntimeError):
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=2))
            store.set("broadcast/1", "theirs")
            return 1
    return 0


def test_a_training_under_attack_from_its_first_moment_ends_as_if_alone(lab: Lab, tmp_path: Path) -> None:
    config = lab.config("attacked")
    run = config.parent / "runs" / "attacked"
    ranks = processes.start(["train", str(config)], 2, tmp_path / "log")
    try:
        first = ranks.processes[0].pid
        assert wait_until(lambda: bool(ports_of(first)) or ranks.poll(), 60), ranks.words()
        attacker = os.fork()
        if attacker == 0:
            try:
                os._exit(attack(ports_of(first), 3.0))
            except BaseException:
                traceback.print_exc()
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(attacker, 0)[1]) == 0
        assert ranks.wait(120) and set(ranks.codes.values()) == {0}, ranks.words()
    finally:
        ranks.end()
    assert events(run, "finished") and not events(run, "failed")
    assert last_step(run) == last_step(lab.uninterrupted(2, 0))
