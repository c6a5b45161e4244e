"""What is prefetched arrives in order, errors included, and no more than allowed is fetched."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.data.read.prefetch import prefetch

pytestmark = pytest.mark.timeout(30)


def _prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_arrive_in_order_and_the_thread_ends() -> None:
    with prefetch(iter(range(100)), depth=3) as items:
        assert list(items) == list(range(100))
    assert not _prefetching()


def test_an_exception_is_raised_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise ValueError("five")

    seen = []
    with prefetch(failing()) as items, pytest.raises(ValueError, match="five"):
        seen.extend(iter(lambda: next(items), None))
    assert seen == list(range(5))


def test_a_consumer_that_stops_early_ends_the_thread_and_no_more_than_the_depth_was_fetched() -> None:
    fetched: list[int] = []

    def counting() -> Iterator[int]:
        for number in range(1000):
            fetched.append(number)
            yield number

    with prefetch(counting(), depth=2) as items:
        assert next(items) == 0
    assert not _prefetching()
    assert len(fetched) <= 1 + 2 + 1
