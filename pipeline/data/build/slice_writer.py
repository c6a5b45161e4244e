"""Writes one slice: encodes, indexes and hashes its documents, and publishes the folder by one rename."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build.slice_store import Record, remake
from pipeline.data.layout import SLICE_RECORD, SLICES, slice_name
from pipeline.data.manifest import SPLITS, Shard, shard_tree
from pipeline.data.read.chunks import Chunk
from pipeline.data.read.documents import Documents, Flags, Offsets
from pipeline.data.read.task import FileSpan
from pipeline.data.tokenize.crosscheck import CrossCheck
from pipeline.data.tokenize.tokenizer import Ids, Tokenizer
from pipeline.errors import DataError, PipelineError
from pipeline.files import discard, publish_dir, read_json, write_json

_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class _ShardWriter:
    """The tokens and the document index of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self._file = folder / f"{split}.bin"
        self._index_file = folder / f"{split}.idx"
        self._dtype = dtype
        self._out: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._digest, self._index_digest = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.documents = self.text_bytes = self.longest = self.largest_id = 0

    def add(self, tokens: npt.NDArray[Any], lengths: Offsets, text_bytes: int) -> None:
        """Writes documents of `lengths` tokens, end-of-text tokens included."""
        if not len(lengths):
            return
        if self._out is None or self._index is None:
            self._out, self._index = self._file.open("wb"), self._index_file.open("wb")
            self._write_index(np.zeros(1, np.uint64))
        content = np.ascontiguousarray(tokens).data.cast("B")
        self._out.write(content)
        self._digest.update(content)
        self._write_index((self.tokens + np.cumsum(lengths)).astype(np.uint64))
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.text_bytes += text_bytes
        self.longest = max(self.longest, int(lengths.max()))
        self.largest_id = max(self.largest_id, int(tokens.max()))

    def finish(self, folder_name: str, source: str, split: str) -> Shard | None:
        """Makes the files durable and returns the shard; None if it has no document."""
        if self._out is None or self._index is None:
            return None
        self.close(durable=True)
        return Shard(
            file=f"{SLICES}/{folder_name}/{self._file.name}",
            index=f"{SLICES}/{folder_name}/{self._index_file.name}",
            source=source,
            split=split,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            longest=self.longest,
            largest_id=self.largest_id,
            sha256=self._digest.hexdigest(),
            index_sha256=self._index_digest.hexdigest(),
        )

    def close(self, durable: bool = False) -> None:
        for out in (self._out, self._index):
            if out is not None and not out.closed:
                out.flush()
                if durable:
                    os.fsync(out.fileno())
                out.close()

    def _write_index(self, offsets: npt.NDArray[np.uint64]) -> None:
        assert self._index is not None
        content = offsets.astype("<u8").tobytes()
        self._index.write(content)
        self._index_digest.update(content)


class SliceWriter:
    """Writes the chunks of a slice and publishes it; a context manager, so that nothing half-written stays."""

    def __init__(
        self,
        folder: Path,
        task: int,
        part: int,
        *,
        source: SourceConfig,
        tokenizer: Tokenizer,
        dtype: np.dtype[Any],
        validation_fraction: float,
        build: str,
        files: Sequence[str],
    ) -> None:
        self.name = slice_name(task, part)
        self._final = folder / SLICES / self.name
        # A unique name, so that a requeued job and its orphan do not write into one folder.
        self._temp = folder / SLICES / f".{self.name}.{secrets.token_hex(6)}.tmp"
        self._source = source
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._fraction = validation_fraction
        self._identity = {"slice": self.name, "task": task, "part": part, "source": source.name, "build": build}
        self._files = files
        place = f"slice {self.name} of source {source.name}"
        self._check = CrossCheck(tokenizer, seed=task << 32 | part, place=place)
        self._records = self._empty = self._dropped = 0
        self._bad: Counter[str] = Counter()
        self._shards: dict[str, _ShardWriter] = {}

    def __enter__(self) -> SliceWriter:
        self._temp.parent.mkdir(parents=True, exist_ok=True)
        self._temp.mkdir()
        self._shards = {split: _ShardWriter(self._temp, split, self._dtype) for split in SPLITS}
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for shard in self._shards.values():
                shard.close()
        finally:
            discard(self._temp)

    def add(self, chunk: Chunk, parallel: bool) -> None:
        """Encodes and writes documents.

        Raises:
            DataError: The tokenizer encodes ordinary text as the end-of-text token, or the encoders disagree.
        """
        self._records += chunk.records
        self._empty += chunk.empty
        self._dropped += chunk.dropped
        self._bad.update(chunk.bad)
        documents = chunk.documents
        if not len(documents):
            return
        ids, offsets = self._tokenizer.encode_batch(documents, parallel)
        self._refuse_forged_end(documents, ids, offsets)
        self._check.offer(documents, ids, offsets)
        validation = self._for_validation(documents)
        text_bytes = documents.lengths
        for split, chosen in zip(SPLITS, (~validation, validation), strict=True):
            tokens, lengths = _tokens_of(ids, offsets, chosen, self._tokenizer.end_of_text_id, self._dtype)
            self._shards[split].add(tokens, lengths, int(text_bytes[chosen].sum()))

    def _refuse_forged_end(self, documents: Documents, ids: Ids, offsets: Offsets) -> None:
        forged = np.flatnonzero(ids == self._tokenizer.end_of_text_id)
        if not len(forged):
            return
        text = documents[int(np.searchsorted(offsets, forged[0], side="right")) - 1].decode()
        first, last, count = self._files[0], self._files[-1], len(self._files)
        place = first if count == 1 else f"{first} to {last} ({count} files)"
        raise DataError(
            f"{place}: in the document that begins {text[:60]!r}, "
            f"the tokenizer encodes ordinary text as the token {self._tokenizer.end_of_text!r}, which ends a document; "
            "set tokenizer.end_of_text to a special token with no other meaning, such as unknown words"
        )

    def _for_validation(self, documents: Documents) -> Flags:
        if self._source.split != "auto" or self._fraction == 0:
            return np.full(len(documents), self._source.split == "validation")
        return documents.hash_fractions() < self._fraction

    def publish(self, pieces: list[FileSpan], last: bool) -> None:
        """Makes the whole slice visible, with what was read of each file; `last` ends its task.

        Raises:
            DataError: The encoders disagree, or something else has the slice's name.
        """
        checked = self._check.finish()
        shards = [writer.finish(self.name, self._source.name, split) for split, writer in self._shards.items()]
        record: Record = {
            **self._identity,
            "last": last,
            "records": self._records,
            "empty": self._empty,
            **({"dropped": self._dropped} if self._source.where is not None else {}),
            "bad": dict(sorted(self._bad.items())),
            "cross_checked": checked,
            "pieces": [asdict(piece) for piece in pieces],
            "shards": [shard_tree(shard) for shard in shards if shard is not None],
        }
        write_json(self._temp / SLICE_RECORD, record)
        try:
            publish_dir(self._temp, self._final)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            # Another process may have published the same slice, made by the same code from the same bytes.
            if not _holds(self._final, record):
                raise DataError(f"{self._final}: is not the slice that was made now; {remake(self._final)}") from error


def _holds(folder: Path, record: Record) -> bool:
    try:
        return bool(read_json(folder / SLICE_RECORD, folder) == record)
    except PipelineError:
        return False


def _tokens_of(
    ids: Ids, offsets: Offsets, chosen: Flags, end: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], Offsets]:
    """Returns the chosen documents' ids in their stored type, the end-of-text token after each, and their lengths."""
    starts = offsets[:-1][chosen]
    lengths = offsets[1:][chosen] - starts
    ends = np.cumsum(lengths + 1) - 1
    tokens = np.empty(int(lengths.sum()) + len(lengths), dtype)
    if len(tokens) > 64 * len(lengths):  # long documents: a copy of each costs less than a mask of every token
        for start, length, stop in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            tokens[stop - length : stop] = ids[start : start + length]
    else:
        ordinary = np.ones(len(tokens), np.bool_)
        ordinary[ends] = False
        tokens[ordinary] = _only(ids, np.diff(offsets), chosen)
    tokens[ends] = end
    return tokens, lengths + 1


def _only(ids: Ids, lengths: Offsets, chosen: Flags) -> Ids:
    """Returns the ids of the chosen documents, copied run by run: a mask of every token costs ten times as much."""
    if chosen.all():
        return ids
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    edges = bounds[np.flatnonzero(np.diff(chosen, prepend=False, append=False))].tolist()
    runs = [ids[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return np.concatenate(runs) if runs else ids[:0]
