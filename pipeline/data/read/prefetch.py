"""Reads ahead in a thread, so that reading and encoding overlap."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, wait
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def prefetch(items: Iterator[T], readers: Executor, depth: int = 2) -> Iterator[Iterator[T]]:
    """Yields an iterator over the same items, fetched up to `depth` ahead by `readers`; exceptions keep their place."""
    fetched: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                fetched.put((kind, value), timeout=0.1)
                return True
        return False

    def fetch() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # raised again in the thread that consumes the items
            put("error", error)

    def consume() -> Iterator[T]:
        while True:
            kind, value = fetched.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    fetching = readers.submit(fetch)
    try:
        yield consume()
    finally:
        stopped.set()
        wait([fetching])
