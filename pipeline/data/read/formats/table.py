"""The input formats by the name that the config gives them."""

from __future__ import annotations

from typing import Protocol

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read.chunks import ChunkBuilder, ReadItems
from pipeline.data.read.formats.arrow import Arrow
from pipeline.data.read.formats.jsonl import JsonLines
from pipeline.data.read.formats.parquet import Parquet
from pipeline.data.read.formats.text import Text
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, TaskFile


class Format(Protocol):
    """How the files of one source are read."""

    def __init__(self, source: SourceConfig) -> None: ...

    def split(self, file: SourceFile, slice_bytes: int) -> list[Part]:
        """Returns the parts of a file that is larger than a slice, one per task; none if it cannot be divided."""
        ...

    def read(self, wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
        """Yields chunks whenever the builder is full, and a span after the last chunk of each slice and of the file."""
        ...


FORMATS: dict[str, type[Format]] = {"txt": Text, "jsonl": JsonLines, "parquet": Parquet, "arrow": Arrow}
