"""Batches hold the tokens of the shards, and a dataset that does not fit the run is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.data_sections import DataConfig
from pipeline.config.sections import Config
from pipeline.data import dataset as module
from pipeline.data import manifest as manifests
from pipeline.data.build.build import prepare
from pipeline.data.dataset import (
    TokenDataset,
    get_batch,
    open_dataset,
    open_splits,
    refuse_other_tokenizer,
)
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.validation import validation_windows
from pipeline.errors import DataError
from tests.data.helpers import a_shard, config, documents, one_source, write

CONTEXT = 16


def _data(made: Config, **changes: Any) -> DataConfig:
    return made.data.model_copy(update=changes)


def _all_tokens(path: str, split: str, source: str | None = None) -> np.ndarray:
    manifest = DatasetManifest.load(path)
    shards = [s for s in manifest.splits[split].shards if source in (None, s.source)]
    return np.concatenate([np.fromfile(Path(path) / s.file, manifest.numpy_dtype) for s in shards])


def _reader(made: Config, *, seed: int = 1, batch_size: int = 8, **changes: Any) -> BatchReader:
    dataset = open_dataset(made.data.path, "train")
    return BatchReader(dataset, _data(made, **changes), seed=seed, context_length=CONTEXT, batch_size=batch_size)


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("mixing", ["proportional", "weighted"])
def test_batches_hold_the_tokens_at_the_offsets_they_describe(order: str, mixing: str, made: Config) -> None:
    reader = _reader(made, order=order, mixing=mixing)
    per_source = {name: _all_tokens(made.data.path, "train", name) for name in ("a", "b")}
    whole = _all_tokens(made.data.path, "train")
    for index in range(20):
        x, y = reader.batch(index, 0, 8)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, CONTEXT)
        assert x.is_contiguous() and y.is_contiguous() and x.device.type == "cpu"
        assert torch.equal(x[:, 1:], y[:, :-1])
        for row, place in enumerate(reader.describe(index, 0, 8)):
            shard = np.fromfile(Path(made.data.path) / place["shard"], "<u2")
            piece = shard[place["offset"] : place["offset"] + CONTEXT]
            assert x[row, : len(piece)].tolist() == piece.tolist()
            # The whole window is contiguous in the tokens of its source (weighted) or of all sources.
            tokens = per_source[place["source"]] if mixing == "weighted" else whole
            assert _contains(tokens, [*x[row].tolist(), int(y[row, -1])])


def _contains(tokens: np.ndarray, window: list[int]) -> bool:
    return np.array(window, tokens.dtype).tobytes() in tokens.tobytes()


def test_rows_do_not_depend_on_how_ranks_divide_them(made: Config) -> None:
    reader, again = _reader(made), _reader(made)
    whole = reader.batch(7, 0, 8)
    for start, stop in ((0, 4), (4, 8), (3, 5), (8, 8)):
        part = again.batch(7, start, stop)
        assert torch.equal(part[0], whole[0][start:stop]) and torch.equal(part[1], whole[1][start:stop])
    assert not torch.equal(_reader(made, seed=2).batch(7, 0, 8)[0], whole[0])


def test_an_epoch_holds_every_window_of_the_data_once(made: Config) -> None:
    reader = _reader(made, batch_size=1)
    tokens = _all_tokens(made.data.path, "train")
    windows = (len(tokens) - 1) // CONTEXT
    seen = torch.cat([reader.batch(i, 0, 1)[0] for i in range(windows)])
    shift = next(
        s for s in range(CONTEXT) if _sorted_rows(tokens[s : s + windows * CONTEXT]) == _sorted_rows(seen.numpy())
    )
    assert shift <= (len(tokens) - 1) % CONTEXT


def _sorted_rows(tokens: np.ndarray) -> list[list[int]]:
    return sorted(tokens.reshape(-1, CONTEXT).tolist())


def test_weighted_batches_have_their_shares_and_never_cross_sources(made: Config) -> None:
    reader = _reader(made, mixing="weighted", batch_size=400)
    sources = [place["source"] for index in range(10) for place in reader.describe(index, 0, 400)]
    assert abs(sources.count("b") / len(sources) - 0.75) < 0.03


@pytest.mark.parametrize("kind", ["memmap", "array", "dataset"])
def test_get_batch_draws_uniformly_and_reaches_both_ends(kind: str, made: Config, tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.uint16)
    if kind == "memmap":
        values.tofile(tmp_path / "t.bin")
        values = np.memmap(tmp_path / "t.bin", np.uint16, "r")
    data: Any = open_dataset(made.data.path, "train") if kind == "dataset" else values
    x, y = get_batch(data, 4000, CONTEXT, "cpu", torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (4000, CONTEXT) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    if kind != "dataset":
        assert torch.equal(y, x + 1)
        counts = torch.bincount(x[:, 0], minlength=24)
        assert len(counts) == 24 and counts.min() > 100
    again, _ = get_batch(data, 4000, CONTEXT, "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_get_batch_raises_torchs_own_error_for_a_bad_device() -> None:
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        get_batch(np.arange(100), 2, 8, "cuda:99")
    assert "CUDA" in str(caught.value)
    with pytest.raises(RuntimeError, match="nowhere"):
        get_batch(np.arange(100), 2, 8, "nowhere")


def test_wide_tokens_are_stored_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"some text that is long enough")
    manifest = prepare(config(tmp_path / "out", [one_source(path)], dtype="uint32"))
    assert manifest.dtype == "uint32"
    dataset = open_dataset(tmp_path / "out", "train")
    assert bytes(dataset.stream.gather(np.array([0]), 9)[0].tolist()) == b"some text"


def test_a_dataset_knows_its_length_and_its_bytes(made: Config) -> None:
    dataset = open_dataset(made.data.path, "train")
    assert isinstance(dataset, TokenDataset)
    assert len(dataset) == len(_all_tokens(made.data.path, "train"))
    texts = documents(300, seed=1) + documents(60, seed=2)
    both = dataset.bytes + open_dataset(made.data.path, "validation").bytes
    assert both == sum(len(t.encode()) for t in texts)


def test_data_shorter_than_a_window_is_refused(made: Config) -> None:
    with pytest.raises(DataError, match="context_length"):
        get_batch(np.arange(8), 2, 8, "cpu")
    get_batch(np.arange(9), 2, 8, "cpu")
    dataset = open_dataset(made.data.path, "train")
    with pytest.raises(DataError, match="context_length"):
        BatchReader(dataset, made.data, seed=0, context_length=len(dataset), batch_size=2)
    shortest = len(_all_tokens(made.data.path, "train", "b"))
    with pytest.raises(DataError, match=rf"b: {shortest} tokens .*{shortest + 1}"):
        BatchReader(dataset, _data(made, mixing="weighted"), seed=0, context_length=shortest, batch_size=2)
    with pytest.raises(DataError, match="validation split: .*context_length"):
        validation_windows(open_dataset(made.data.path, "validation"), 10**6)


def test_a_source_without_a_weight_is_refused(made: Config) -> None:
    with pytest.raises(DataError, match=f"{made.data.path}: .*'b'.* only names a"):
        _reader(made, mixing="weighted", sources=made.data.sources[:1])


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(path)]}]))
    with pytest.raises(DataError, match=rf"{tmp_path / 'out'}: .*validation.*data\.validation_fraction"):
        open_dataset(tmp_path / "out", "validation")


def test_opening_both_splits_reads_each_file_and_looks_at_each_shard_once(
    made: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(made.data.path)
    manifest = DatasetManifest.load(folder)
    looked_at, hashed, loaded = Counter[Path](), [], []
    size, sha256_file, load = manifests.size_of_regular, module.sha256_file, DatasetManifest.load
    monkeypatch.setattr(manifests, "size_of_regular", lambda *a: (looked_at.update([a[0]]), size(*a))[1])
    monkeypatch.setattr(module, "sha256_file", lambda *a: (hashed.append(a[0]), sha256_file(*a))[1])
    monkeypatch.setattr(DatasetManifest, "load", lambda path: (loaded.append(path), load(path))[1])
    splits = open_splits(folder)
    shards = [folder / name for shard in manifest.shards for name in shard.sizes(manifest.numpy_dtype)]
    assert {file: looked_at[file] for file in shards} == dict.fromkeys(shards, 1)
    assert hashed == [folder / TOKENIZER] and loaded == [folder]
    assert splits["train"].manifest is splits["validation"].manifest


def test_a_damaged_shard_is_refused_only_where_its_split_is_opened(copy: Path) -> None:
    shard = a_shard(copy)
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(DataError, match=f"^{shard}: "):
        open_dataset(copy, "train")
    open_dataset(copy, "validation")


def test_another_tokenizer_is_refused(copy: Path) -> None:
    manifest = DatasetManifest.load(copy)
    with pytest.raises(DataError, match=f"^{copy}: .*{manifest.tokenizer_digest[:12]}.*000000000000"):
        open_splits(copy, tokenizer_digest="0" * 64)
    open_splits(copy, tokenizer_digest=manifest.tokenizer_digest)
    refuse_other_tokenizer(copy, manifest, manifest.tokenizer_digest)
    file = copy / TOKENIZER
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match=f"^{file}: .*digest"):
        open_dataset(copy, "train")
    file.unlink()
    with pytest.raises(DataError, match=f"^{file}: is missing"):
        open_dataset(copy, "train")


def test_token_ids_beyond_the_vocabulary_are_refused(copy: Path) -> None:
    open_dataset(copy, "train", vocab_size=257)
    for refused in (200, 256):
        with pytest.raises(DataError, match=f"token id 256, .* {refused}; set it to 257"):
            open_dataset(copy, "train", vocab_size=refused)
