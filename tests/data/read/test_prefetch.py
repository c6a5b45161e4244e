"""What is prefetched arrives in order, errors included, and no more than allowed is fetched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.data.read.prefetch import prefetch

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def readers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_items_arrive_in_order(readers: ThreadPoolExecutor) -> None:
    with prefetch(iter(range(100)), readers, depth=3) as items:
        assert list(items) == list(range(100))


def test_an_exception_is_raised_after_the_items_before_it(readers: ThreadPoolExecutor) -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise ValueError("five")

    seen = []
    with prefetch(failing(), readers) as items, pytest.raises(ValueError, match="five"):
        seen.extend(iter(lambda: next(items), None))
    assert seen == list(range(5))


def test_a_consumer_that_stops_early_frees_the_reader_and_no_more_than_the_depth_was_fetched(
    readers: ThreadPoolExecutor,
) -> None:
    fetched: list[int] = []

    def counting() -> Iterator[int]:
        for number in range(1000):
            fetched.append(number)
            yield number

    with prefetch(counting(), readers, depth=2) as items:
        assert next(items) == 0
    assert len(fetched) <= 1 + 2 + 1
    with prefetch(iter("next"), readers) as items:
        assert list(items) == list("next")


def test_the_same_thread_reads_one_after_the_other(readers: ThreadPoolExecutor) -> None:
    def named() -> Iterator[str]:
        yield threading.current_thread().name

    seen = []
    for _ in range(3):
        with prefetch(named(), readers) as items:
            seen += items
    assert len(set(seen)) == 1
    assert seen[0] != threading.current_thread().name
