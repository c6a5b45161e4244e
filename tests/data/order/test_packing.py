"""Packed windows: whole documents, every token once, the same index however it is made, and damage noticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import Config
from pipeline.data.dataset import open_dataset
from pipeline.data.manifest import DatasetManifest
from pipeline.data.order import packing
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.best_fit import pack
from pipeline.data.order.packing import load_packing, make_packing, packing_folder
from pipeline.data.order.source_counts import SourceCounts
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError
from tests.data.helpers import tree_digest

CONTEXT = 64
WINDOW = CONTEXT + 1


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80), capacity=st.integers(2, 40))
def test_every_token_but_a_documents_first_is_predicted_once_and_short_documents_are_whole(
    lengths: list[int], capacity: int
) -> None:
    ends = np.cumsum(lengths)
    begins = ends - lengths
    made = pack(begins, ends, capacity)
    assert made.counts.min() >= 1 and made.counts.sum() == len(made.begins)
    filled = np.add.reduceat(made.lengths, np.cumsum(made.counts) - made.counts)
    assert filled.max() <= capacity
    predicted = np.concatenate(
        [np.arange(b + 1, b + n) for b, n in zip(made.begins.tolist(), made.lengths.tolist(), strict=True)]
    )
    assert np.array_equal(np.sort(predicted), np.setdiff1d(np.arange(ends[-1]), begins))
    whole = {(b, n) for b, n in zip(begins.tolist(), lengths, strict=True) if n <= capacity}
    assert whole <= set(zip(made.begins.tolist(), made.lengths.tolist(), strict=True))
    # No two windows could be one, up to the one that best-fit left open for each room.
    assert sum(2 * int(n) <= capacity for n in filled) <= 1


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a dataset has many, which end within shards, between them and between sources."""
    monkeypatch.setattr(packing, "BLOCK", 7)


def windows(dataset: Path) -> list[list[tuple[int, int]]]:
    """The pieces of each window, as begin and length."""
    folder = packing_folder(dataset, WINDOW)
    begins, lengths, firsts, filled = (np.fromfile(folder / name, dtype) for name, dtype in packing.DTYPES.items())
    assert filled.tolist() == np.add.reduceat(lengths, firsts[:-1].astype(int)).tolist()
    pairs = list(zip(begins.tolist(), lengths.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)]


@pytest.mark.usefixtures("blocks")
def test_an_index_covers_the_documents_of_each_source_and_tells_what_it_cut_and_padded(copy: Path) -> None:
    made = make_packing(copy, WINDOW)
    dataset = open_dataset(copy, "train")
    documents: dict[str, list[tuple[int, int]]] = {}
    base = 0
    for shard in dataset.stream.shards:
        offsets = np.fromfile(copy / shard.index, "<u8").astype(int) + base
        documents.setdefault(shard.source, []).extend(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        base += shard.tokens
    found, first = windows(copy), 0
    for source in made.sources:
        mine = [piece for window in found[first : first + source.windows] for piece in window]
        first += source.windows
        predicted = sorted(token for begin, length in mine for token in range(begin + 1, begin + length))
        assert predicted == [token for begin, end in documents[source.name] for token in range(begin + 1, end)]
        assert source.documents == len(documents[source.name])
        assert source.cut == sum(end - begin > WINDOW for begin, end in documents[source.name]) > 0
        assert source.padding == source.windows * WINDOW - sum(length for _, length in mine)
    assert first == len(found) and [source.name for source in made.sources] == ["a", "b"]
    assert make_packing(copy, WINDOW) == made == load_packing(copy, dataset.manifest, WINDOW, verify=True)


@pytest.mark.usefixtures("blocks")
def test_the_index_is_the_same_from_any_number_of_processes(copy: Path) -> None:
    found = []
    for workers in (0, 1, 4):
        make_packing(copy, WINDOW, workers)
        found.append(tree_digest(packing_folder(copy, WINDOW)))
        for file in packing_folder(copy, WINDOW).iterdir():
            file.unlink()
        packing_folder(copy, WINDOW).rmdir()
    assert found[0] == found[1] == found[2]


def _make_slowly(dataset: Path, begun: Any) -> None:
    whole = packing.pack

    def slow(*args: Any) -> Any:
        begun.set()
        time.sleep(0.05)
        return whole(*args)

    packing.pack, packing.BLOCK = slow, 7  # type: ignore[attr-defined]
    make_packing(dataset, WINDOW, 0)


@pytest.mark.usefixtures("blocks")
def test_a_killed_computation_leaves_no_index_and_the_next_makes_the_same(copy: Path, made: Config) -> None:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_make_slowly, args=(copy, begun))
    process.start()
    assert begun.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = packing_folder(copy, WINDOW)
    assert not folder.exists() and any(folder.parent.iterdir())
    with pytest.raises(DataError, match="pipeline prepare"):
        load_packing(copy, DatasetManifest.load(copy), WINDOW)
    make_packing(copy, WINDOW)
    digest = tree_digest(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    make_packing(copy, WINDOW)
    assert tree_digest(folder) == digest


def reader(dataset: Path, made: Config, **changes: Any) -> BatchReader:
    data = made.data.model_copy(update={"path": str(dataset), "packing": "best_fit", **changes})
    opened = open_dataset(dataset, "train")
    return BatchReader(opened, data, seed=1, context_length=CONTEXT, batch_size=4, document_starts=True)


@pytest.mark.parametrize("mixing", ["proportional", "weighted"])
def test_batches_hold_packed_documents_and_padding_carries_no_target(copy: Path, made: Config, mixing: str) -> None:
    packed = make_packing(copy, WINDOW)
    read = reader(copy, made, mixing=mixing)
    tokens = open_dataset(copy, "train").stream.gather(np.array([0]), open_dataset(copy, "train").stream.tokens)[0]
    end = DatasetManifest.load(copy).end_of_text_id
    expected = []
    for window in windows(copy):
        row = np.concatenate([tokens[begin : begin + length] for begin, length in window]).astype(int)
        padding = WINDOW - len(row)
        expected.append(([*row.tolist(), *[end] * padding][:-1], [*row[1:].tolist(), *[-1] * padding]))
    first_of_b = packed.windows["a"]
    if mixing == "proportional":
        order = read.order
        assert order.windows == (len(expected),)
        seen = [read.batch(index, 0, 4) for index in range(len(expected) // 4)]
        rows = [(x.tolist(), y.tolist()) for batch in seen for x, y in zip(batch[0], batch[1], strict=True)]
        assert len({str(row) for row in rows}) == len(rows), "no window twice in an epoch"
        assert all(row in expected for row in rows)
        assert any(-1 in y for _, y in rows)
        x, _, starts = seen[0]
        assert starts.shape == x.shape and all(x[r, s - 1] == end for r, row in enumerate(starts) for s in row if s > 0)
    else:
        assert read.order.windows == tuple(packed.windows.values())
        for row, place in zip(read.batch(3, 0, 4)[0].tolist(), read.describe(3, 0, 4), strict=True):
            assert row in [x for x, _ in (expected[:first_of_b] if place["source"] == "a" else expected[first_of_b:])]
            shard = np.fromfile(copy / place["shard"], "<u2")
            assert shard[place["offset"]] == row[0]
    whole, parts = read.batch(2, 0, 4), [read.batch(2, 0, 1), read.batch(2, 1, 4)]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    counted = SourceCounts(read).before(10)
    by_source = [place["source"] for index in range(10) for place in read.describe(index, 0, 4)]
    assert counted == {name: by_source.count(name) * CONTEXT for name in ("a", "b")}


def test_without_an_index_training_data_is_refused_with_the_command_that_makes_it(copy: Path, made: Config) -> None:
    with pytest.raises(DataError, match="pipeline prepare"):
        reader(copy, made)


@pytest.mark.parametrize("damage", ["record", "short", "bits", "other"])
def test_a_damaged_index_is_named(copy: Path, made: Config, damage: str) -> None:
    make_packing(copy, WINDOW)
    folder, manifest = packing_folder(copy, WINDOW), DatasetManifest.load(copy)
    before = verify_dataset(copy)
    assert before.files == 2 * len(manifest.shards) + 5
    file = folder / "begins.bin"
    if damage == "record":
        tree = json.loads((folder / "packing.json").read_text())
        tree["sources"][0]["windows"] += 1
        (folder / "packing.json").write_text(json.dumps(tree))
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "bits":
        file.write_bytes(b"\xff" * 6 + file.read_bytes()[6:])
        load_packing(copy, manifest, WINDOW)
        with pytest.raises(DataError, match=str(folder)):
            [reader(copy, made).batch(index, 0, 4) for index in range(200)]
        with pytest.raises(DataError, match=r"begins\.bin"):
            verify_dataset(copy)
    else:
        manifest = DatasetManifest.load(Path(made.data.path))
        tree = json.loads((folder / "packing.json").read_text())
        content = {k: v for k, v in tree.items() if k not in ("digest", "format_version")} | {"dataset": "0" * 64}
        signed = {"format_version": 1, **content, "digest": packing._digest(content)}
        (folder / "packing.json").write_text(json.dumps(signed))
    with pytest.raises(DataError, match=str(folder)):
        load_packing(copy, manifest, WINDOW, verify=True)
