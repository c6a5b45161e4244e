"""A child ends with its parent, however the parent ends; garbage is not collected during large imports only."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.processes import large_imports
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


def test_garbage_is_collected_again_after_imports_that_fail_too() -> None:
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), large_imports():
        assert not gc.isenabled()
        with large_imports():
            pass
        assert not gc.isenabled(), "the outer imports have not ended"
        importlib.import_module("no_such_module")
    assert gc.isenabled()
