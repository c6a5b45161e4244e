"""A computed permutation is one, and looks random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.permutation import derive_key, mix64, permute

sizes = st.integers(1, 5000)
keys = st.integers(0, 2**64 - 1)


@given(size=sizes, key=keys)
def test_permute_is_a_permutation_for_every_size(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537, 1 << 20])
def test_permute_is_a_permutation_around_powers_of_two(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@given(size=st.integers(2**33, 2**62), key=keys)
@settings(max_examples=30)
def test_permute_of_sizes_beyond_memory_stays_in_range_and_distinct(size: int, key: int) -> None:
    places = permute(np.arange(1000), size, key)
    assert places.min() >= 0 and places.max() < size and len(np.unique(places)) == 1000


@given(size=sizes, key=keys, data=st.data())
def test_permute_of_a_part_is_a_part_of_the_permutation(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int64)
    assert np.array_equal(permute(positions, size, key), permute(np.arange(size), size, key)[positions])


def test_permute_looks_random() -> None:
    size = 10_000
    places = permute(np.arange(size), size, 3)
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.03
    # Neighbours stay neighbours only by chance: about twice in `size`.
    assert (np.abs(np.diff(places)) == 1).sum() < 12
    other = permute(np.arange(size), size, 4)
    assert (places == other).sum() < 10
    counts, _ = np.histogram(places[:1000], bins=10, range=(0, size))
    assert counts.min() > 60


def test_keys_depend_on_every_part_and_its_position() -> None:
    made = {derive_key(*parts) for parts in [(), (0,), (0, 0), (1, 0), (0, 1), (1,), (1, 2, 3), (3, 2, 1), (2**63,)]}
    assert len(made) == 9
    assert derive_key(5) == int(mix64(np.array([5 + 0x9E3779B97F4A7C15], np.uint64))[0])
