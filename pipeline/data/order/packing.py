"""The index of a dataset's packed windows: made once, stored beside the dataset, read as a memory map.

DATASET/packing/WINDOW/            one folder per window of so many tokens, visible only when whole
    packing.json                   what it was made from, the windows and fractions of each source, digests
    begins.bin, lengths.bin        first token (uint64, in the training split) and length (uint32) of each piece
    windows.bin                    first piece of each window, one more than there are windows (uint64)
    filled.bin                     tokens of each window (uint32)
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from pipeline.data.manifest import DatasetManifest, Shard
from pipeline.data.order.best_fit import Packed, pack
from pipeline.data.shard_maps import mapped
from pipeline.errors import DataError, PipelineError
from pipeline.files import (
    fsync_file,
    is_regular,
    naming,
    read_json,
    sha256_bytes,
    sha256_file,
    size_of_regular,
    staged_dir,
    write_json,
)  # fmt: skip

FOLDER = "packing"
RECORD = "packing.json"
FORMAT_VERSION = 1
DTYPES = {"begins.bin": "<u8", "lengths.bin": "<u4", "windows.bin": "<u8", "filled.bin": "<u4"}

# Documents that are packed together: more would pad less and take more memory.
BLOCK = 1 << 16
# A process takes a second to start.
_BLOCKS_PER_PROCESS = 4
_CURE = "remove this folder and run `pipeline prepare CONFIG`"


@dataclass(frozen=True)
class PackedSource:
    """What packing made of one source."""

    name: str
    windows: int
    pieces: int
    documents: int
    cut: int
    """Documents that are longer than a window and were cut."""
    tokens: int
    """Tokens of the documents."""
    padding: int
    """Places in the windows that hold no token."""


@dataclass(frozen=True)
class Packing:
    """The content of packing.json."""

    dataset: str
    """Digest of the dataset."""
    window: int
    """Tokens of a window: one more than the context length."""
    block: int
    """Documents that are packed together."""
    sources: tuple[PackedSource, ...]
    """In the order of the dataset."""
    sha256: dict[str, str]
    """Digest of each file."""

    @property
    def windows(self) -> dict[str, int]:
        """Windows of each source."""
        return {source.name: source.windows for source in self.sources}

    def fractions(self) -> tuple[float, float]:
        """Returns the fraction of documents that were cut and the fraction of places that are padded."""
        places = self.window * sum(source.windows for source in self.sources)
        documents = sum(source.documents for source in self.sources)
        return sum(s.cut for s in self.sources) / documents, sum(s.padding for s in self.sources) / places


_PACKING = TypeAdapter(Packing)


def packing_folder(dataset: Path, window: int) -> Path:
    """Returns where the index of windows of so many tokens is."""
    return dataset / FOLDER / str(window)


def load_packing(dataset: Path, manifest: DatasetManifest, window: int, verify: bool = False) -> Packing:
    """Reads and checks the record of an index, and the sizes of its files.

    Args:
        dataset: The dataset folder.
        manifest: The dataset's manifest.
        window: Tokens of a window.
        verify: Also compare the SHA-256 of each file.

    Raises:
        DataError: There is none, it is damaged, or it was made from another dataset.
    """
    folder = packing_folder(dataset, window)
    file = folder / RECORD
    if not file.exists():
        raise DataError(f"{folder}: the documents are not packed yet; run `pipeline prepare CONFIG`")
    tree = read_json(file, dataset, DataError)
    content = {key: value for key, value in tree.items() if key != "digest"} if isinstance(tree, dict) else {}
    if content.pop("format_version", None) != FORMAT_VERSION or tree["digest"] != _digest(content):
        raise DataError(f"{file}: is damaged, or of another version; {_CURE}")
    try:
        found = _PACKING.validate_python(content)
    except ValidationError as error:
        raise DataError(f"{file}: is damaged; {_CURE}") from error
    if found.dataset != manifest.digest:
        raise DataError(f"{folder}: was made from the dataset {found.dataset[:12]}, not from this one; {_CURE}")
    pieces, windows = sum(s.pieces for s in found.sources), sum(s.windows for s in found.sources)
    for name, count in (
        ("begins.bin", pieces),
        ("lengths.bin", pieces),
        ("windows.bin", windows + 1),
        ("filled.bin", windows),
    ):
        path, size = folder / name, count * np.dtype(DTYPES[name]).itemsize
        with naming(path, "the packed windows cannot be read", _CURE, DataError):
            if size_of_regular(path, dataset) != size or (verify and sha256_file(path, dataset) != found.sha256[name]):
                raise DataError(f"{path}: is damaged; {_CURE}")
    return found


def packing_digests(dataset: Path) -> dict[str, str]:
    """Returns the expected SHA-256 of the files of every index of a dataset, by name relative to it.

    Raises:
        DataError: A record is damaged.
    """
    manifest = DatasetManifest.load(dataset)
    found: dict[str, str] = {}
    for folder in sorted((dataset / FOLDER).glob("[0-9]*")):
        if folder.name.isdecimal() and is_regular(folder / RECORD, dataset):
            record = load_packing(dataset, manifest, int(folder.name))
            found |= {f"{FOLDER}/{folder.name}/{name}": sha256 for name, sha256 in record.sha256.items()}
    return found


def make_packing(dataset: Path, window: int, workers: int | None = None, verify: bool = False) -> Packing:
    """Returns the index of packed windows of the training split, which is made if there is none.

    Each block of documents is packed by itself, so that the bytes depend neither on the number of processes nor on how
    often the work was killed. Memory holds a few blocks, however many documents there are.

    Args:
        dataset: The dataset folder, finished.
        window: Tokens of a window.
        workers: Processes; by default as many as there are cores, or none for little work.
        verify: Also compare the SHA-256 of each file of an index that was there.

    Raises:
        DataError: The dataset or an existing index is damaged.
        PipelineError: The index cannot be written.
    """
    manifest = DatasetManifest.load(dataset)
    folder = packing_folder(dataset, window)
    if not folder.exists():
        try:
            _make(dataset, manifest, window, workers)
        except PipelineError:
            if not folder.exists():  # else another process was faster, with the same bytes
                raise
    return load_packing(dataset, manifest, window, verify)


def _make(dataset: Path, manifest: DatasetManifest, window: int, workers: int | None) -> None:
    folder = packing_folder(dataset, window)
    shards = manifest.splits["train"].shards
    blocks = manifest.splits["train"].documents // BLOCK + 1
    count = min(len(os.sched_getaffinity(0)), blocks // _BLOCKS_PER_PROCESS) if workers is None else workers
    cure = "make room, or make the dataset folder writable"
    with naming(folder, "the packed windows cannot be written", cure), staged_dir(folder) as temp:
        sources = _write(temp, dataset, shards, window, count)
        digests = {name: sha256_file(temp / name) for name in DTYPES}
        made = Packing(manifest.digest, window, BLOCK, sources, digests)
        content = json.loads(json.dumps(asdict(made)))
        write_json(temp / RECORD, {"format_version": FORMAT_VERSION, **content, "digest": _digest(content)})


def _write(temp: Path, dataset: Path, shards: tuple[Shard, ...], window: int, workers: int) -> tuple[PackedSource, ...]:
    found: dict[str, PackedSource] = {}
    pieces = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((temp / name).open("wb")) for name in DTYPES}
        for name, begins, ends, packed in _packed(_blocks(dataset, shards), window, workers):
            files["begins.bin"].write(packed.begins.astype("<u8").tobytes())
            files["lengths.bin"].write(packed.lengths.astype("<u4").tobytes())
            firsts = np.cumsum(packed.counts) - packed.counts
            filled = np.add.reduceat(packed.lengths, firsts)
            files["windows.bin"].write((pieces + firsts).astype("<u8").tobytes())
            files["filled.bin"].write(filled.astype("<u4").tobytes())
            pieces += len(packed.begins)
            before = found.get(name) or PackedSource(name, 0, 0, 0, 0, 0, 0)
            found[name] = PackedSource(
                name,
                before.windows + len(packed.counts),
                before.pieces + len(packed.begins),
                before.documents + len(begins),
                before.cut + int((ends - begins > window).sum()),
                before.tokens + int((ends - begins).sum()),
                before.padding + len(packed.counts) * window - int(packed.lengths.sum()),
            )
        files["windows.bin"].write(np.array([pieces], "<u8").tobytes())
    for name in DTYPES:
        fsync_file(temp / name)
    return tuple(found.values())


_Block = tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _blocks(dataset: Path, shards: tuple[Shard, ...]) -> Iterator[_Block]:
    """Yields the source, begins and ends of up to `BLOCK` documents at a time, none with documents of two sources."""
    source, held, base = "", np.zeros((2, 0), np.int64), 0
    for shard in shards:
        if shard.source != source and held.size:
            yield source, *held
            held = held[:, :0]
        source = shard.source
        offsets = _offsets(dataset, shard)
        for first in range(0, shard.documents, BLOCK):
            part = offsets[first : first + BLOCK + 1].astype(np.int64)
            if (np.diff(part) <= 0).any():
                raise _damaged(dataset, shard)
            held = np.concatenate([held, [base + part[:-1], base + part[1:]]], axis=1)
            while held.shape[1] >= BLOCK:
                yield source, *held[:, :BLOCK]
                held = held[:, BLOCK:]
        base += shard.tokens
    if held.size:
        yield source, *held


def _offsets(dataset: Path, shard: Shard) -> npt.NDArray[Any]:
    offsets = mapped(dataset / shard.index, "<u8")
    if len(offsets) != shard.documents + 1 or offsets[0] != 0 or offsets[-1] != shard.tokens:
        raise _damaged(dataset, shard)
    return offsets


def _damaged(dataset: Path, shard: Shard) -> DataError:
    return DataError(
        f"{dataset / shard.index}: is damaged: it is no list of growing offsets; prepare the dataset again"
    )


def _packed(
    blocks: Iterator[_Block], window: int, workers: int
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64], Packed]]:
    """Packs blocks in this process or in several, and yields them in their order."""
    if workers < 2:
        for name, begins, ends in blocks:
            yield name, begins, ends, pack(begins, ends, window)
        return
    # Not forked: the encoder's threads may hold locks.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[tuple[_Block, Future[Packed]]] = deque()
        for block in blocks:
            waiting.append((block, pool.submit(pack, block[1], block[2], window)))
            if len(waiting) > 2 * workers:
                oldest, future = waiting.popleft()
                yield *oldest, future.result()
        for oldest, future in waiting:
            yield *oldest, future.result()


def _digest(content: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())
