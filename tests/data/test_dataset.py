"""Batches hold what the shards hold, and nothing that does not belong together is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.data_sections import DataConfig
from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from pipeline.data.dataset import BatchReader, TokenDataset, get_batch, open_dataset, validation_windows
from pipeline.data.manifest import Manifest
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError
from tests.data.helpers import config, documents, jsonl, write

CONTEXT = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two sources of different size, many shards, and a validation split."""
    folder = tmp_path_factory.mktemp("dataset")
    write(folder / "a.jsonl", jsonl(documents(300, seed=1)))
    write(folder / "b.jsonl", jsonl(documents(60, seed=2)))
    sources = [
        {"name": "a", "paths": [str(folder / "a.jsonl")], "weight": 1.0},
        {"name": "b", "paths": [str(folder / "b.jsonl")], "weight": 3.0},
    ]
    result = config(folder / "out", sources, slice_size_mb=0.004, validation_fraction=0.1)
    prepare(result)
    return result


@pytest.fixture
def copy(made: Config, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.data.path, tmp_path / "copy"))


def _data(made: Config, **changes: Any) -> DataConfig:
    return made.data.model_copy(update=changes)


def _all_tokens(path: str, split: str, source: str | None = None) -> np.ndarray:
    manifest = Manifest.load(path)
    shards = [s for s in manifest.splits[split].shards if source in (None, s.source)]
    return np.concatenate([np.fromfile(Path(path) / s.file, manifest.numpy_dtype) for s in shards])


def _reader(made: Config, *, seed: int = 1, batch_size: int = 8, **changes: Any) -> BatchReader:
    dataset = open_dataset(made.data.path, "train")
    return BatchReader(dataset, _data(made, **changes), seed=seed, context_length=CONTEXT, batch_size=batch_size)


def test_shards_open_as_plain_memmaps(made: Config) -> None:
    manifest = Manifest.load(made.data.path)
    assert manifest.dtype == "uint16" and len(manifest.splits["train"].shards) > 10
    for shard in manifest.shards:
        assert len(np.memmap(Path(made.data.path) / shard.file, "<u2", "r")) == shard.tokens
        assert len(np.memmap(Path(made.data.path) / shard.index, "<u8", "r")) == shard.documents + 1


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("mixing", ["proportional", "weighted"])
def test_batches_are_the_tokens_at_the_places_they_say(order: str, mixing: str, made: Config) -> None:
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
            # The whole window follows in the source's own tokens (weighted), or in all of them.
            tokens = per_source[place["source"]] if mixing == "weighted" else whole
            assert _contains(tokens, [*x[row].tolist(), int(y[row, -1])])


def _contains(tokens: np.ndarray, window: list[int]) -> bool:
    return np.array(window, tokens.dtype).tobytes() in tokens.tobytes()


def test_rows_are_the_same_whoever_reads_them(made: Config) -> None:
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


def test_validation_windows_are_fixed_and_do_not_overlap(made: Config) -> None:
    dataset = open_dataset(made.data.path, "validation")
    windows = validation_windows(dataset, CONTEXT)
    tokens = _all_tokens(made.data.path, "validation")
    assert windows.count == (len(tokens) - 1) // CONTEXT
    x, y = windows.batch(0, windows.count + 5)
    assert torch.equal(x.flatten(), torch.from_numpy(tokens[: windows.count * CONTEXT].astype(np.int64)))
    assert torch.equal(y.flatten(), torch.from_numpy(tokens[1 : windows.count * CONTEXT + 1].astype(np.int64)))


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


def test_data_shorter_than_a_window_is_refused(made: Config) -> None:
    message = "too few for one window of context_length"
    with pytest.raises(DataError, match=message):
        get_batch(np.arange(8), 2, 8, "cpu")
    get_batch(np.arange(9), 2, 8, "cpu")
    dataset = open_dataset(made.data.path, "train")
    with pytest.raises(DataError, match=message):
        BatchReader(dataset, made.data, seed=0, context_length=len(dataset), batch_size=2)
    shortest = len(_all_tokens(made.data.path, "train", "b"))
    with pytest.raises(DataError, match=rf"b: {shortest} tokens are {message}"):
        BatchReader(dataset, _data(made, mixing="weighted"), seed=0, context_length=shortest, batch_size=2)
    with pytest.raises(DataError, match=message):
        validation_windows(open_dataset(made.data.path, "validation"), 10**6)


def test_a_source_without_a_weight_is_refused(made: Config) -> None:
    with pytest.raises(DataError, match="holds the source 'b', which data.sources does not name"):
        _reader(made, mixing="weighted", sources=made.data.sources[:1])


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(path)]}]))
    with pytest.raises(DataError, match="the validation split is empty; raise data.validation_fraction"):
        open_dataset(tmp_path / "out", "validation")


def test_wide_tokens_are_stored_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"some text that is long enough")
    manifest = prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(path)]}], dtype="uint32"))
    assert manifest.dtype == "uint32"
    dataset = open_dataset(tmp_path / "out", "train")
    assert bytes(dataset.stream.gather(np.array([0]), 9)[0].tolist()) == b"some text"


def _one_shard(copy: Path) -> Path:
    return copy / Manifest.load(copy).splits["train"].shards[2].file


def test_a_truncated_shard_is_refused_by_name(copy: Path) -> None:
    shard = _one_shard(copy)
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(DataError, match=f"{shard}: has .* bytes, the manifest says"):
        open_dataset(copy, "train")
    open_dataset(copy, "validation")


def test_a_missing_shard_or_index_is_refused_by_name(copy: Path) -> None:
    shard = _one_shard(copy)
    shard.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=f"{shard.with_suffix('.idx')}: the shard cannot be read"):
        open_dataset(copy, "train")
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard}: the shard cannot be read"):
        open_dataset(copy, "train")


def test_swapped_shards_of_one_size_are_found_by_verify_and_by_the_switch(copy: Path) -> None:
    shard = _one_shard(copy)
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    index = shard.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[::-1])
    open_dataset(copy, "train")  # the size is right
    for check in (lambda: verify_dataset(copy), lambda: open_dataset(copy, "train", verify=True)):
        with pytest.raises(DataError, match=r"2 of \d+ files are not what the manifest says") as caught:
            check()
        assert str(shard) in str(caught.value) and str(index) in str(caught.value)


def test_verify_reads_everything_and_reports_progress(made: Config) -> None:
    seen: list[tuple[int, int]] = []
    done = verify_dataset(made.data.path, lambda *progress: seen.append(progress))
    manifest = Manifest.load(made.data.path)
    assert done.files == 2 * len(manifest.shards) + 1 == len(seen)
    assert seen[-1] == (done.bytes, done.bytes) and done.digest == manifest.digest


def test_another_tokenizer_is_refused(copy: Path) -> None:
    with pytest.raises(DataError, match="the run uses 000000000000"):
        open_dataset(copy, "train", tokenizer_digest="0" * 64)
    open_dataset(copy, "train", tokenizer_digest=Manifest.load(copy).tokenizer_digest)
    file = copy / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="is not the tokenizer that made these tokens"):
        open_dataset(copy, "train")
    with pytest.raises(DataError, match=r"tokenizer\.json: sha256 is"):
        verify_dataset(copy)
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: is missing"):
        open_dataset(copy, "train")


def test_token_ids_that_the_model_has_not_are_refused(copy: Path) -> None:
    open_dataset(copy, "train", vocab_size=257)
    with pytest.raises(DataError, match="holds token id 256, but model.vocab_size is 200; set it to 257"):
        open_dataset(copy, "train", vocab_size=200)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(dtype="uint32"), "was changed after it was written"),
        (lambda tree: tree["shards"][0].update(tokens=1), "was changed after it was written"),
        (lambda tree: tree.update(format_version=99), "format_version is 99, this program reads 1"),
    ],
)
def test_a_changed_manifest_is_refused(change: Any, words: str, copy: Path) -> None:
    file = copy / "manifest.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=words):
        open_dataset(copy, "train")


def test_what_is_no_dataset_is_named(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(DataError, match="there is no dataset here"):
        open_dataset(tmp_path / "nothing", "train")
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        open_dataset(copy, "train")


def test_a_slice_that_lost_bytes_is_named_by_the_next_build(made: Config) -> None:
    shard = _one_shard(Path(made.data.path))
    content = shard.read_bytes()
    try:
        os.truncate(shard, 10)
        with pytest.raises(DataError, match=f"remove the folder {shard.parent} and run"):
            prepare(made)
    finally:
        shard.write_bytes(content)


def test_a_dataset_knows_its_length_and_its_bytes(made: Config) -> None:
    dataset = open_dataset(made.data.path, "train")
    assert isinstance(dataset, TokenDataset)
    assert len(dataset) == len(_all_tokens(made.data.path, "train"))
    texts = documents(300, seed=1) + documents(60, seed=2)
    both = dataset.bytes + open_dataset(made.data.path, "validation").bytes
    assert both == dataset.manifest.bytes == sum(len(t.encode()) for t in texts)
