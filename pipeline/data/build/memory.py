"""Keeps the memory of a build bounded and cheap to allocate."""

from __future__ import annotations

import atexit
import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.allocator import keep_freed_memory, return_freed_memory

if TYPE_CHECKING:
    from pipeline.data.tokenize.tokenizer import Tokenizer

# Allocations between garbage collections; Python's default is 700.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000

# Growth of the process before the caches are emptied, and the text that must be encoded before the next time.
_ALLOWED_BYTES, _ALLOWED_BYTES_PER_WORKER = 128 << 20, 192 << 20
_MIN_TEXT_BETWEEN = 64_000_000


class WordCaches:
    """Empties the encoder's caches when the process has grown too large.

    gigatoken remembers every distinct word until its tokenizer is freed. On a corpus of terabytes, with its numbers,
    names and misprints, that is unbounded (240 MB of random words: 1.6 GB); ordinary English hardly ever reaches the
    limit. The ids stay the same; the next 100 MB take a fifth longer to encode.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._limit = resident_bytes() + _ALLOWED_BYTES + workers * _ALLOWED_BYTES_PER_WORKER
        self._workers = workers
        self._since = self._chunks_to_trim = 0
        self._lock = threading.Lock()

    def encoded(self, text_bytes: int) -> None:
        """Counts a chunk of encoded text; call it after every chunk."""
        with self._lock:
            self._since += text_bytes
            if self._since >= _MIN_TEXT_BETWEEN and resident_bytes() > self._limit:
                self._tokenizer.clear_caches()
                self._since, self._chunks_to_trim = 0, self._workers
            elif self._chunks_to_trim:
                # The old caches are freed when the last worker that uses them finishes its chunk. Returned at once,
                # before other objects settle in their memory and the next caches need new memory.
                self._chunks_to_trim -= 1
                if not self._chunks_to_trim:
                    return_freed_memory()


def resident_bytes() -> int:
    """Returns the memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def devote_process() -> None:
    """Tunes malloc and gc for a build-only process; call it before numpy is imported.

    malloc reuses the buffers of the last chunk instead of returning them to the kernel: a build constantly allocates
    and frees buffers of some megabytes, which took half of its system time, a tenth of all its CPU time. The peak does
    not change.

    Garbage collection runs less often, and not at exit: a vocabulary alone is some 100,000 objects that stay, and
    scanning them while they are read takes a twentieth of the CPU time of a build of 200 MB.

    numpy's linear algebra starts no threads: a build does not use them, and they spin before they sleep, 0.1 s of CPU
    time.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)
    keep_freed_memory(32 << 20, 1 << 30)
