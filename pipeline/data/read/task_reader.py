"""Files to documents: reads a task in pieces of bounded size."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.config.data_sections import DataConfig, SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.bad_records import BadInput
from pipeline.data.read.chunks import CHUNK_BYTES, Chunk, Gatherer, Piece
from pipeline.data.read.decompress import DamagedArchiveError, Stream, open_stream
from pipeline.data.read.documents import Documents
from pipeline.data.read.parse import add_json_lines, add_texts
from pipeline.data.read.record_blocks import BLOCK_BYTES, Block, Cut, Damage, first_record, record_blocks
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Task
from pipeline.errors import DataError

Events = Iterator[Chunk | Piece]

# A byte of text takes up to six in JSON (`\u0000`), and a line may have other fields: `max_document_mb` is for the text
# alone, which only the whole line tells. A line that is longer than that would be is given up unseen.
_JSON_GROWTH = 6
_JSON_MARGIN = 1 << 20


def read_task(
    task: Task, source: SourceConfig, files: Sequence[SourceFile], data: DataConfig, resume_at: int = 0
) -> Events:
    """The documents of a task, and where its files and slices end.

    Args:
        task: What to read.
        source: How its files are to be understood.
        files: The files of the source.
        data: The policy for bad input and the limits.
        resume_at: For a task of kind `stream`, where its next slice begins.
    """
    gatherer = Gatherer(BadInput(data.on_bad), int(data.max_document_mb * 1e6))
    step = int(data.slice_size_mb * 1e6) if task.kind in ("range", "stream") else None
    for place, number in enumerate(task.files):
        file = files[number]
        last = place == len(task.files) - 1
        gatherer.begin_file(file.path)
        with _naming(file.path):
            if file.format == "parquet":
                from pipeline.data.read.parquet import read_parquet

                yield from read_parquet(file, number, source, gatherer, task.start, task.stop, last)
            elif source.separator is None and file.format == "txt":
                yield from _read_whole(file, number, gatherer, int(data.max_document_mb * 1e6), last)
            else:
                reader = _RecordReader(file, number, source, gatherer, int(data.max_document_mb * 1e6))
                start = resume_at if task.kind == "stream" else task.start
                yield from reader.read(start, step, one_slice=task.kind == "range", last=last)
    yield gatherer.take()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Names the file that the operating system could not read."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); "
            "run `pipeline prepare` again when it can: what is finished is not done again"
        ) from error


class _RecordReader:
    """The records of one file of text or JSON lines."""

    def __init__(self, file: SourceFile, number: int, source: SourceConfig, gatherer: Gatherer, limit: int) -> None:
        self._file = file
        self._number = number
        self._source = source
        self._gatherer = gatherer
        self._separator = b"\n" if file.format == "jsonl" else (source.separator or "").encode()
        self._longest = _JSON_GROWTH * limit + _JSON_MARGIN if file.format == "jsonl" else limit + len(self._separator)

    def read(self, start: int, step: int | None, one_slice: bool, last: bool) -> Events:
        """The records from `start` on, cut into slices of `step` bytes; to the end of the file, or one slice of it."""
        with open_stream(self._file.path, self._file.compression) as stream:
            begin = self._enter(stream, start, one_slice)
            position = stream.position
            if begin is None or (one_slice and step is not None and begin >= (start // step + 1) * step):
                yield Piece(self._number, start, start, hashlib.sha256().hexdigest(), last)
                return
            digest, offset, end, lost = hashlib.sha256(), begin, begin, 0
            for item in record_blocks(stream, self._separator, begin, self._longest, step):
                self._gatherer.read += stream.position - position
                position = stream.position
                if isinstance(item, Cut):
                    yield self._gatherer.take()
                    yield Piece(self._number, offset, item.offset, digest.hexdigest(), last and one_slice)
                    if one_slice:
                        return
                    digest, offset = hashlib.sha256(), item.offset
                elif isinstance(item, Damage):
                    lost = item.lost
                    self._gatherer.report(
                        bad_records.TRUNCATED, functools.partial(_line_and_byte, self._file, item.offset), item.reason
                    )
                else:
                    digest.update(item.content)
                    end = item.offset + len(item.content)
                    if item.too_long == "begins":
                        self._gatherer.report_too_long(self._place(item.offset))
                    elif not item.too_long:
                        self._add(item)
                    if self._gatherer.size >= CHUNK_BYTES:
                        yield self._gatherer.take()
            if step is not None:
                yield self._gatherer.take()
            yield Piece(self._number, offset, end, digest.hexdigest(), last, lost)

    def _enter(self, stream: Stream, start: int, one_slice: bool) -> int | None:
        begin = first_record(stream, self._separator, start) if one_slice else start
        if begin is not None:
            stream.move_to(begin)
        return begin

    def _add(self, block: Block) -> None:
        def place(byte: int) -> Callable[[], str]:
            return self._place(block.offset + byte)

        if self._file.format == "jsonl":
            add_json_lines(block.content, self._source.field, self._gatherer, place)
        else:
            add_texts(block.content, self._separator, self._gatherer, place)

    def _place(self, byte: int) -> Callable[[], str]:
        return functools.partial(_place_of_record, self._file, byte)


def _read_whole(file: SourceFile, number: int, gatherer: Gatherer, limit: int, last: bool) -> Events:
    """A file that is one document."""
    digest = hashlib.sha256()
    content: list[bytes] = []
    size = 0
    damage: DamagedArchiveError | None = None
    with open_stream(file.path, file.compression) as stream:
        try:
            while piece := stream.read(BLOCK_BYTES):
                digest.update(piece)
                size += len(piece)
                # Beyond the limit the rest is still read, for the digest, but not kept.
                content = [*content, piece] if size <= limit else []
        except DamagedArchiveError as error:
            damage = error
        gatherer.read += stream.position
    if damage is not None:
        gatherer.report(bad_records.TRUNCATED, functools.partial(_line_and_byte, file, size), str(damage))
    elif size > limit:
        gatherer.report_too_long(functools.partial(_place_of_record, file, 0))
    else:
        gatherer.add(Documents.of([b"".join(content)]), lambda _, byte: functools.partial(_place_of_record, file, byte))
    if gatherer.size >= CHUNK_BYTES:
        yield gatherer.take()
    yield Piece(number, 0, size, digest.hexdigest(), last, file.size if damage is not None else 0)


def _line_and_byte(file: SourceFile, byte: int) -> str:
    """Where a byte is; reads the file up to there, which only a message is worth."""
    line, left = 1, byte
    with open_stream(file.path, file.compression) as stream:
        while left > 0 and (piece := stream.read(min(left, BLOCK_BYTES))):
            line += piece.count(b"\n")
            left -= len(piece)
    where = f" of the decompressed content of {Path(file.path).name}" if file.compression else ""
    return f"line {line}, byte {byte}{where}"


def _place_of_record(file: SourceFile, byte: int) -> str:
    """Where a bad record is, and that its archive is damaged if it is: garbled text shows before a checksum does."""
    place = _line_and_byte(file, byte)
    if file.compression is not None:
        with open_stream(file.path, file.compression) as stream:
            try:
                while stream.read(BLOCK_BYTES):
                    pass
            except DamagedArchiveError as error:
                return f"{place}, a {bad_records.TRUNCATED} ({error})"
    return place
