"""Phases: exact shares in each, no window twice in an epoch, and no past that a later phase could change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data_sections import DataConfig, PhaseConfig
from pipeline.config.sections import Config
from pipeline.data.adopt.adopt import adopt
from pipeline.data.adopt.find import find_sources
from pipeline.data.build.build import prepare
from pipeline.data.dataset import open_dataset
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.draws import Order, Phase, sample_numbers
from pipeline.data.order.mixture import MIXTURE_BLOCK, quotas
from pipeline.data.order.source_counts import SourceCounts
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError
from tests.data.adopt.foreign import DOCUMENTS, tokens_of, write_raw
from tests.data.helpers import config, documents, jsonl, write

TOKENS = (40_001, 9_001, 2_002)
CONTEXT = 8

weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any).map(tuple)


@st.composite
def orders(draw: st.DrawFn, kind: str = "shuffle", longest: int = 3 * MIXTURE_BLOCK // 2) -> Order:
    """Up to four phases, some shorter and some longer than a block of the mixture."""
    lengths = draw(st.lists(st.integers(1, longest), max_size=3))
    later = tuple(Phase(int(start), draw(weights)) for start in np.cumsum(lengths))
    return Order(kind, TOKENS, draw(weights), CONTEXT, draw(st.integers(0, 2**31)), later)  # type: ignore[arg-type]


def _phases(order: Order) -> list[Phase]:
    assert order.weights is not None
    return [Phase(0, order.weights), *order.later]


def _end(order: Order) -> int:
    return _phases(order)[-1].start + MIXTURE_BLOCK + 1000


@given(order=orders())
@settings(max_examples=15, deadline=None)
def test_every_block_of_a_phase_has_exactly_its_shares_and_absent_sources_have_none(order: Order) -> None:
    phases, end = _phases(order), _end(order)
    for phase, stop in zip(phases, [p.start for p in phases[1:]] + [end], strict=True):
        sources, _ = order.draw(np.arange(phase.start, stop))
        for first in range(0, stop - phase.start - MIXTURE_BLOCK + 1, MIXTURE_BLOCK):
            block = np.bincount(sources[first : first + MIXTURE_BLOCK], minlength=3)
            assert block.tolist() == quotas(phase.weights)
        assert not set(np.unique(sources)) & {i for i, weight in enumerate(phase.weights) if weight == 0}


@given(order=orders())
@settings(max_examples=15, deadline=None)
def test_no_window_is_drawn_twice_in_an_epoch_over_any_border(order: Order) -> None:
    samples = np.arange(_end(order))
    sources, starts = order.draw(samples)
    epochs = order.epochs(samples)
    for source, windows in enumerate(order.windows):
        mine = starts[sources == source]
        assert np.array_equal(epochs[sources == source], np.arange(len(mine)) // windows), "epochs follow each other"
        for first in range(0, len(mine), windows):
            epoch = mine[first : first + windows]
            assert len(np.unique(epoch)) == len(epoch)
    assert np.array_equal(order.counts(len(samples)), np.bincount(sources, minlength=3))


@given(order=orders(longest=3000), layout=st.sampled_from([(1, 24), (2, 12), (3, 8), (4, 3), (24, 1)]), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_world_size_and_any_resume_point_see_the_same_batches(
    order: Order, layout: tuple[int, int], data: st.DataObject
) -> None:
    """Batches of 24; the ranks and micro-batches ask for parts of one, without those before it."""
    ranks, micro = layout
    share = 24 // ranks
    batch = data.draw(st.integers(0, _end(order) // 24 - 1))
    whole = [column[24 * batch : 24 * (batch + 1)] for column in order.draw(np.arange(_end(order)))]
    parts = [
        order.draw(sample_numbers(batch, start, min(start + micro, (rank + 1) * share), 24))
        for rank in range(ranks)
        for start in range(rank * share, (rank + 1) * share, micro)
    ]
    for column in range(2):
        assert np.array_equal(whole[column], np.concatenate([part[column] for part in parts]))


@given(order=orders(), other=orders(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_another_future_leaves_the_past_as_it_was(order: Order, other: Order, data: st.DataObject) -> None:
    now = data.draw(st.integers(0, _end(order)))
    kept = [phase for phase in order.later if phase.start < now]
    later = (*kept, *(Phase(now + phase.start, phase.weights) for phase in other.later))
    changed = Order("shuffle", TOKENS, order.weights, CONTEXT, order.seed, later)
    for before, after in zip(order.draw(np.arange(now)), changed.draw(np.arange(now)), strict=True):
        assert np.array_equal(before, after)


def test_a_single_phase_is_today_s_mixing() -> None:
    order = Order("shuffle", TOKENS, (3.0, 1.0, 2.0), CONTEXT, 5)
    never = Order("shuffle", TOKENS, (3.0, 1.0, 2.0), CONTEXT, 5, (Phase(10**6, (0.0, 1.0, 0.0)),))
    for before, after in zip(order.draw(np.arange(1000)), never.draw(np.arange(1000)), strict=True):
        assert np.array_equal(before, after)


def test_random_windows_follow_the_phases_too() -> None:
    order = Order("random", TOKENS, (1.0, 1.0, 0.0), CONTEXT, 5, (Phase(50_000, (0.0, 1.0, 3.0)),))
    sources, _ = order.draw(np.arange(100_000))
    first, second = (np.bincount(part, minlength=3) / 50_000 for part in (sources[:50_000], sources[50_000:]))
    assert np.abs(first - [0.5, 0.5, 0]).max() < 0.01 and np.abs(second - [0, 0.25, 0.75]).max() < 0.01
    assert first[2] == second[0] == 0
    assert order.counts(100_000).tolist() == [25_000, 37_500, 37_500]


# ---- the batches of a dataset ----------------------------------------------------------------------


def _reader(made: Config, phases: list[dict[str, Any]]) -> BatchReader:
    given = tuple(PhaseConfig.model_validate(phase) for phase in phases)
    data = made.data.model_copy(update={"phases": given})
    return BatchReader(open_dataset(made.data.path, "train"), data, seed=1, context_length=CONTEXT, batch_size=8)


def test_a_phase_begins_with_its_global_batch(made: Config) -> None:
    reader = _reader(made, [{"from_step": 0, "weights": {"a": 1.0}}, {"from_step": 7, "weights": {"b": 2.0}}])
    sources = [{row["source"] for row in reader.describe(index, 0, 8)} for index in range(12)]
    assert sources == [{"a"}] * 7 + [{"b"}] * 5


def test_the_sources_weights_are_one_phase_from_step_0(made: Config) -> None:
    weighted = made.data.model_copy(update={"mixing": "weighted"})
    dataset = open_dataset(made.data.path, "train")
    plain = BatchReader(dataset, weighted, seed=1, context_length=CONTEXT, batch_size=8)
    phased = _reader(made, [{"from_step": 0, "weights": {"b": 3.0, "a": 1.0}}])
    for index in range(20):
        assert torch.equal(plain.batch(index, 0, 8)[0], phased.batch(index, 0, 8)[0])


def test_a_phase_with_a_source_that_has_no_training_text_is_refused(made: Config) -> None:
    with pytest.raises(DataError, match=r"data\.phases names the source 'c', .*to a, b only, in data\.phases"):
        _reader(made, [{"from_step": 0, "weights": {"a": 1.0, "c": 1.0}}])


def test_a_weight_of_a_source_without_training_text_is_refused_and_phases_can_leave_it_out(tmp_path: Path) -> None:
    sources = [
        {"name": "a", "paths": [str(write(tmp_path / "a.jsonl", jsonl(documents(20))))]},
        {"name": "b", "paths": [str(write(tmp_path / "b.jsonl", jsonl([" "])))]},
    ]
    made = config(tmp_path / "out", sources, mixing="weighted")
    prepare(made)
    with pytest.raises(DataError, match=r"data\.mixing: weighted .* 'b', .*to a only, in data\.phases$"):
        _reader(made, [])
    assert _reader(made, [{"from_step": 0, "weights": {"a": 1.0}}]).order.weights == (1.0,)


def test_phases_name_the_sources_of_an_adopted_manifest(tmp_path: Path) -> None:
    given = [f"{name}={write_raw(tmp_path / f'{name}.bin', DOCUMENTS)}" for name in ("a", "b", "c")]
    tokenizer = Tokenizer.load(tokens_of(tmp_path))
    adopt(find_sources("raw", given, [], "uint16"), "raw", tokenizer, tmp_path / "out", 0.1, lambda done, total: None)
    dataset = open_dataset(tmp_path / "out", "train", token_folder=str(tmp_path))

    def reader(**weights: float) -> BatchReader:
        later = {"from_step": MIXTURE_BLOCK // 8, "weights": {"c": 1.0}}
        phases = [{"from_step": 0, "weights": weights}, later]
        data = DataConfig.model_validate({"path": str(dataset.path), "token_folder": str(tmp_path), "phases": phases})
        return BatchReader(dataset, data, seed=1, context_length=CONTEXT, batch_size=8)

    found = reader(b=1.0, a=3.0)
    step = MIXTURE_BLOCK // 8
    tokens = MIXTURE_BLOCK * CONTEXT
    assert found.count_sources(0, step) == {"a": tokens * 3 // 4, "b": tokens // 4, "c": 0}
    assert {row["shard"] for row in found.describe(step, 0, 8)} == {"c.bin"}
    with pytest.raises(DataError, match=r"data\.phases names the source 'z', .*to a, b, c only"):
        reader(a=1.0, z=1.0)


@pytest.mark.parametrize("mixing", ["proportional", "weighted"])
def test_tokens_per_source_are_those_of_the_batches(made: Config, mixing: str) -> None:
    """Whether they are counted at once, step by step, or from a checkpoint on; skipped batches do not count."""
    dataset = open_dataset(made.data.path, "train")
    data = made.data.model_copy(update={"mixing": mixing})
    reader = BatchReader(dataset, data, seed=1, context_length=CONTEXT, batch_size=8)
    spans = dataset.source_streams() if mixing == "weighted" else {"all": dataset.stream}
    owner = {name: np.concatenate([[s.source] * s.tokens for s in stream.shards]) for name, stream in spans.items()}
    found = {"a": 0, "b": 0}
    for index in (0, 1, 2, 4, 5, 6, 7, 8):
        for source, start in zip(*(c.tolist() for c in reader.order.draw(sample_numbers(index, 0, 8, 8))), strict=True):
            names, counts = np.unique(list(owner.values())[source][start : start + CONTEXT], return_counts=True)
            for name, count in zip(names.tolist(), counts.tolist(), strict=True):
                found[name] += count
    at_once = SourceCounts(reader)
    assert at_once.before(9, (3,)) == found and sum(found.values()) == 8 * 8 * CONTEXT
    by_step = SourceCounts(reader)
    for index in range(5):
        by_step.before(index, (3,))
    resumed = SourceCounts(reader, by_step.state())
    assert resumed.before(9, (3,)) == found
    resumed.restore(by_step.state())
    assert resumed.before(9, (3,)) == found


def test_counting_reads_no_token(made: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader = _reader(made, [{"from_step": 0, "weights": {"a": 1.0}}])
    monkeypatch.setattr(reader._streams[0], "gather", lambda *_: pytest.fail("read"))
    assert reader.count_sources(0, 100) == {"a": 100 * 8 * CONTEXT, "b": 0}
