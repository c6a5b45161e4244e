"""Freed memory is used again, which shows in the page faults of a process that allocates and frees the same buffer."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from pipeline.allocator import keep_freed_memory, return_freed_memory
from pipeline.data.build.memory import resident_bytes

def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{call}
held = [b"x" * (48 << 20) for _ in range(2)]
began = faults()
for _ in range(5):
    held.pop()
    held.append(b"x" * (48 << 20))
print(faults() - began)
held.clear()
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""


def run(call: str) -> tuple[int, int]:
    """Returns the faults of five buffers of 48 MiB, and the bytes that were returned at the end."""
    made = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], check=True, capture_output=True, text=True)
    faults, returned = map(int, made.stdout.split())
    return faults, returned


def test_a_buffer_that_is_freed_is_used_again_and_returned_when_asked() -> None:
    (default, _), (kept, returned) = run(""), run("keep_freed_memory((1 << 31) - 1, -1)")
    assert kept < 100 < 5 * (48 << 20) / (2 << 20) <= default, "even with huge pages the default maps each one again"
    assert returned >= 90 << 20


@pytest.mark.parametrize("refuses", ["largest", "everything"])
def test_a_c_library_that_refuses_keeps_its_defaults(refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import allocator

    asked: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append((parameter, value))
        return int(refuses != "largest" or value <= 32 << 20)

    library = type("Library", (), {} if refuses == "everything" else {"mallopt": staticmethod(mallopt)})
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _name: library)
    allocator.keep_freed_memory((1 << 31) - 1, -1)
    assert [value for parameter, value in asked if parameter == -3] == (
        [] if refuses == "everything" else [(1 << 31) - 1, 32 << 20]
    )
