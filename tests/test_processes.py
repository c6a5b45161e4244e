"""A child ends with its parent, however the parent ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.cli.test_main import ROOT

PARENT = """
import signal, subprocess, sys, time
from pipeline.processes import end_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent(signal.SIGKILL))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        assert child.name and child.exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "the child is still running"
        time.sleep(0.01)
