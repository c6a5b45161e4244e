"""Plain values that the ranks of a start exchange through the store they share."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Protocol, TypeVar

T = TypeVar("T")


class Store(Protocol):
    """What is asked of the store."""

    def add(self, key: str, value: int) -> int:
        """Adds to a number and returns the sum."""

    def set(self, key: str, value: str) -> None:
        """Stores a value."""

    def get(self, key: str) -> bytes:
        """Returns a value, waiting until there is one."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Waits until there are all of these values."""

    def delete_key(self, key: str) -> bool:
        """Forgets a value."""


def gather_values(
    store: Store, name: str, value: T, rank: int, world_size: int, timeout: timedelta | None = None
) -> list[T]:
    """Returns the values of all ranks, in the order of the ranks, on every rank.

    Args:
        store: The store of all ranks.
        name: What is gathered; all ranks gather it equally often.
        value: This rank's: a value of JSON, because nothing that is received is executed. Tuples arrive as lists.
        rank: This rank.
        world_size: Number of ranks.
        timeout: How long to wait for a rank; the store's own limit if None.
    """
    number = store.add(f"{name}/of_rank_{rank}", 1)
    key = f"{name}/{number}"
    if rank != 0:
        store.set(f"{key}/{rank}", json.dumps(value))
    else:  # one rank reads them all: a thousand that did would ask a million times
        others = [f"{key}/{other}" for other in range(1, world_size)]
        if timeout is not None:
            store.wait(others, timeout)
        store.set(key, json.dumps([value, *(json.loads(store.get(other)) for other in others)]))
        # Every rank has read the last ones before it came here.
        for old in (*others, f"{name}/{number - 1}"):
            store.delete_key(old)
    if timeout is not None:
        store.wait([key], timeout)
    values: list[T] = json.loads(store.get(key))
    return values
