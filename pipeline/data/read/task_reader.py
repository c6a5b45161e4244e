"""Reads the documents of a task in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.data_sections import DataConfig, SourceConfig
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.chunks import ChunkBuilder, ReadItems
from pipeline.data.read.formats.table import FORMATS
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, Task, TaskFile
from pipeline.errors import DataError
from pipeline.files import naming


def read_task(
    task: Task, source: SourceConfig, files: Sequence[SourceFile], data: DataConfig, resume_at: int = 0
) -> ReadItems:
    """Yields the documents of a task in chunks, and a span wherever a file or a slice ends.

    A task of kind `stream` continues at the byte `resume_at`, where its next slice begins.

    Raises:
        DataError: A file cannot be read, or a record is bad and `data.on_bad` is `error`.
    """
    builder = ChunkBuilder(BadRecordPolicy(data.on_bad), int(data.max_document_mb * 1e6))
    part = Part(task.kind, resume_at if task.kind == "stream" else task.start, task.stop)
    slice_bytes = int(data.slice_size_mb * 1e6) if task.kind in ("range", "stream") else None
    for number in task.files:
        file = files[number]
        builder.begin_file(file.path)
        wanted = TaskFile(file, number, part, last=number == task.files[-1], slice_bytes=slice_bytes)
        cure = "run `pipeline prepare` again when it can: what is finished is not done again"
        with naming(file.path, "cannot be read", cure, DataError):
            yield from FORMATS[file.format](source).read(wanted, builder)
    yield builder.take()
