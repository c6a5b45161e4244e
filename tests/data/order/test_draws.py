"""The order of samples is a permutation with the right shares, however it is divided."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order.draws import Order, sample_numbers
from pipeline.data.order.permutation import permute

seeds = st.integers(0, 2**31)


def test_the_order_never_changes() -> None:
    # Resuming a run with a newer version must see the same batches: these numbers are a promise.
    assert permute(np.arange(8), 1000, 42).tolist() == PERMUTED
    order = Order("shuffle", (10_000, 3_000), (3.0, 1.0), 16, 1337)
    sources, starts = order.draw(sample_numbers(5, 0, 6, 6))
    assert (sources.tolist(), starts.tolist()) == DRAWN


@given(tokens=st.integers(9, 3000), context=st.integers(1, 8), seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_sees_every_token_once_except_less_than_a_window(
    tokens: int, context: int, seed: int, epoch: int
) -> None:
    order = Order("shuffle", (tokens,), None, context, seed)
    windows = order.windows[0]
    sources, starts = order.draw(np.arange(epoch * windows, (epoch + 1) * windows))
    assert not sources.any()
    seen = (starts[:, None] + np.arange(context)).ravel()
    assert len(np.unique(seen)) == len(seen) == windows * context > tokens - 1 - context
    assert seen.min() >= 0 and starts.max() + context + 1 <= tokens
    assert np.array_equal(np.sort(seen), np.arange(seen.min(), seen.max() + 1))


def test_the_unseen_tokens_differ_from_epoch_to_epoch() -> None:
    order = Order("shuffle", (1000,), None, 64, 0)
    windows = order.windows[0]
    firsts = {int(order.draw(np.arange(e * windows, (e + 1) * windows))[1].min()) for e in range(300)}
    assert len(firsts) > 20 and max(firsts) == (1000 - 1) % 64


@given(
    tokens=st.lists(st.integers(20, 4000), min_size=1, max_size=4),
    kind=st.sampled_from(["shuffle", "random"]),
    weighted=st.booleans(),
    seed=seeds,
    index=st.integers(0, 10_000),
    layout=st.sampled_from([(1, 24), (2, 12), (3, 8), (4, 3), (8, 1), (24, 1)]),
)
def test_any_world_size_and_micro_batch_sees_the_same_global_batch(
    tokens: list[int], kind: str, weighted: bool, seed: int, index: int, layout: tuple[int, int]
) -> None:
    order = _order(kind, tokens, weighted, seed)
    whole = order.draw(sample_numbers(index, 0, 24, 24))
    ranks, micro = layout
    share = 24 // ranks
    parts = [
        order.draw(sample_numbers(index, start, min(start + micro, (rank + 1) * share), 24))
        for rank in range(ranks)
        for start in range(rank * share, (rank + 1) * share, micro)
    ]
    for column in range(2):
        assert np.array_equal(whole[column], np.concatenate([part[column] for part in parts]))


@given(
    tokens=st.lists(st.integers(200, 4000), min_size=1, max_size=3),
    weighted=st.booleans(),
    seed=seeds,
    ranks=st.integers(1, 8),
)
def test_ranks_do_not_overlap_within_an_epoch(tokens: list[int], weighted: bool, seed: int, ranks: int) -> None:
    order = _order("shuffle", tokens, weighted, seed)
    batch = 8 * ranks
    # As many batches as every source has windows for.
    batches = min(order.windows) // batch
    drawn = [
        tuple(pair)
        for index in range(batches)
        for rank in range(ranks)
        for pair in zip(
            *(c.tolist() for c in order.draw(sample_numbers(index, rank * 8, rank * 8 + 8, batch))), strict=True
        )
    ]
    assert len(set(drawn)) == len(drawn)


def test_a_weighted_source_is_exhausted_before_it_repeats() -> None:
    order = Order("shuffle", (1601, 401), (1.0, 3.0), 4, 9)
    sources, starts = order.draw(np.arange(5000))
    for source, windows in enumerate(order.windows):
        mine = starts[sources == source]
        for epoch in range(len(mine) // windows):
            assert len(np.unique(mine[epoch * windows : (epoch + 1) * windows])) == windows
    epochs = order.epochs(np.arange(5000))
    assert epochs[0] == 0 and epochs[sources == 1].max() == (sources == 1).sum() // 100


@given(tokens=st.lists(st.integers(10, 500), min_size=1, max_size=3), weighted=st.booleans(), seed=seeds)
def test_random_windows_fit_and_reach_both_ends(tokens: list[int], weighted: bool, seed: int) -> None:
    order = _order("random", tokens, weighted, seed)
    sources, starts = order.draw(np.arange(20_000))
    for source, length in enumerate(order.tokens):
        mine = starts[sources == source]
        assert mine.min() == 0 and mine.max() == length - order.context_length - 1


def test_random_sources_have_their_weights() -> None:
    order = Order("random", (100, 100, 100), (1.0, 2.0, 7.0), 4, 0)
    shares = np.bincount(order.draw(np.arange(100_000))[0]) / 100_000
    assert np.abs(shares - [0.1, 0.2, 0.7]).max() < 0.01


def _order(kind: str, tokens: list[int], weighted: bool, seed: int) -> Order:
    if weighted:
        return Order(kind, tuple(tokens), tuple(float(i + 1) for i in range(len(tokens))), 4, seed)  # type: ignore[arg-type]
    return Order(kind, (sum(tokens),), None, 4, seed)  # type: ignore[arg-type]


PERMUTED = [783, 757, 227, 419, 70, 336, 528, 225]
DRAWN = ([0, 0, 0, 0, 0, 0], [335, 2239, 9423, 5327, 7455, 1631])
