"""Child processes that end when their parent does; imports without garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
from collections.abc import Callable, Iterator

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: little is safe between fork and exec


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Returns a `preexec_fn`: the kernel sends the child this signal when its parent ends, even by SIGKILL."""

    def ask_the_kernel() -> None:
        _PRCTL(_PR_SET_PDEATHSIG, number)

    return ask_the_kernel


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Around imports that make objects by the hundred thousand, which all stay: looking for garbage takes a tenth."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
