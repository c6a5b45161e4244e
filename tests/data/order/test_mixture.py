"""Samples are divided among sources by their weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.mixture import MIXTURE_BLOCK, mixture, quotas

seeds = st.integers(0, 2**31)


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), seed=seeds)
@settings(max_examples=20)
def test_weighted_mixing_has_the_right_shares(weights: list[float], seed: int) -> None:
    counts = np.bincount(mixture(np.arange(MIXTURE_BLOCK), weights, seed)[0], minlength=len(weights))
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts / MIXTURE_BLOCK - shares).max() <= (len(weights) + 1) / MIXTURE_BLOCK
    # Part of a block has the shares too, within six standard deviations.
    some = np.bincount(mixture(np.arange(4096), weights, seed)[0], minlength=len(weights)) / 4096
    assert (np.abs(some - shares) < 6 * np.sqrt(shares * (1 - shares) / 4096) + 1 / 4096).all()


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), seed=seeds, start=st.integers(0, 3 * MIXTURE_BLOCK)
)
@settings(max_examples=20)
def test_the_draws_of_a_source_are_consecutive(weights: list[float], seed: int, start: int) -> None:
    sources, draws = mixture(np.arange(start, start + 2000), weights, seed)
    for source in range(len(weights)):
        mine = draws[sources == source]
        assert len(mine) == 0 or np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50))
def test_quotas_fill_a_block_and_include_every_source(weights: list[float]) -> None:
    made = quotas(weights)
    assert sum(made) == MIXTURE_BLOCK and min(made) >= 1
