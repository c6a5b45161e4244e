"""A task is read file by file: spans in order, the last one marked, errors of the system with the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.read.chunks import Chunk
from pipeline.data.read.sources import SourceFile, find_files
from pipeline.data.read.task import FileSpan, Kind, Task
from pipeline.data.read.task_reader import read_task
from pipeline.errors import DataError
from tests.data.helpers import config, one_source, write


def _read(paths: Path, kind: Kind, *, start: int = 0, stop: int = -1, resume_at: int = 0, **source: Any) -> list[Any]:
    data = config(paths.parent / "out", [one_source(paths, **source)], slice_size_mb=1e-5).data
    files: list[SourceFile] = find_files(data.sources[0])
    task = Task(0, 0, kind, tuple(range(len(files))), start, stop)
    items = list(read_task(task, data.sources[0], files, data, resume_at))
    return [*(text for i in items if isinstance(i, Chunk) for text in i.documents), *_spans(items)]


def _spans(items: list[Any]) -> list[tuple[int, int, int, bool]]:
    spans = [item for item in items if isinstance(item, FileSpan)]
    assert all(span.lost == 0 for span in spans)
    return [(span.file, span.start, span.stop, span.last) for span in spans]


def test_each_file_ends_with_a_span_and_the_last_is_marked(tmp_path: Path) -> None:
    for name, text in {"a": b"one", "b": b"three"}.items():
        write(tmp_path / f"{name}.txt", text)
    assert _read(tmp_path / "*.txt", "files") == [b"one", b"three", (0, 0, 3, False), (1, 0, 5, True)]


def test_a_range_has_the_records_that_begin_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"|".join([b"12345678"] * 4) + b"|9")
    read = [_read(path, "range", start=start, stop=start + 10, separator="|") for start in range(0, 40, 10)]
    assert read[0] == [b"12345678"] * 2 + [(0, 0, 18, True)]
    assert read[1] == [b"12345678", (0, 18, 27, True)]
    assert read[2] == [b"12345678", (0, 27, 36, True)]
    assert read[3] == [b"9", (0, 36, 37, True)]
    write(path, b"a record longer than two ranges|next")
    read = [_read(path, "range", start=start, stop=start + 10, separator="|") for start in range(0, 40, 10)]
    assert read[1] == [(0, 10, 10, True)] and read[2] == [(0, 20, 20, True)] and read[3][0] == b"next"


def test_a_stream_is_cut_into_slices_and_resumed_at_any_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"|".join([b"12345678"] * 4) + b"|9")
    spans = [(0, 0, 18, False), (0, 18, 27, False), (0, 27, 36, False), (0, 36, 37, True)]
    whole = _read(path, "stream", separator="|")
    assert whole == [b"12345678"] * 4 + [b"9", *spans]
    for number, (_, start, _, _) in enumerate(spans):
        assert _read(path, "stream", resume_at=start, separator="|")[-len(spans) + number :] == spans[number:]


def test_a_file_that_the_system_cannot_read_is_named_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", b"text")
    data = config(tmp_path / "out", [one_source(path)]).data
    files = find_files(data.sources[0])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: .*pipeline prepare"):
        list(read_task(Task(0, 0, "files", (0,)), data.sources[0], files, data))
