"""What glibc's malloc does with freed memory; another C library keeps its defaults."""

from __future__ import annotations

import ctypes

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# Before version 2.35 glibc refuses more.
_OLD_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory(largest: int, most: int) -> None:
    """Lets this process use freed memory again in place of returning it to the kernel.

    By default each buffer of some megabytes is mapped, zeroed page by page and unmapped again.

    Args:
        largest: Bytes of the largest buffer that is kept, below 2 GiB.
        most: Bytes that are kept at the end of the heap, below 2 GiB; -1 for all.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(_M_MMAP_THRESHOLD, largest):
        mallopt(_M_MMAP_THRESHOLD, min(largest, _OLD_MMAP_THRESHOLD))
    mallopt(_M_TOP_PAD, 64 << 20)
    mallopt(_M_TRIM_THRESHOLD, most)


def return_freed_memory() -> None:
    """Returns freed memory to the kernel."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
