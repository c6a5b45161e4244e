"""The work is divided by file sizes, quickly, and reads each text once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build import tasks
from pipeline.data.build.build import BuildProgress, prepare
from pipeline.data.read import sources
from pipeline.data.read.sources import SourceFile
from pipeline.errors import DataError
from tests.data.helpers import config, documents, one_source, write, write_parquet


class _Counting(Sequence[SourceFile]):
    """Counts how often a file is accessed."""

    def __init__(self, files: list[SourceFile]) -> None:
        self.files = files
        self.accesses = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        self.accesses += 1
        return self.files[index]

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self.files)


def test_grouping_small_files_accesses_each_file_once() -> None:
    files = _Counting([SourceFile(f"{i}.txt", "txt", None, 10, (0, 0, i)) for i in range(2000)])
    found = tasks._tasks_of(0, SourceConfig(name="s", paths=("*.txt",)), files, 5000, 0)
    assert [task.files for task in found] == [tuple(range(start, start + 500)) for start in range(0, 2000, 500)]
    assert files.accesses <= len(files)


@pytest.mark.parametrize("other", ["link", "hard link", "another spelling"])
def test_a_file_that_a_source_has_twice_is_refused(other: str, tmp_path: Path) -> None:
    text = write(tmp_path / "in" / "a.txt", b"text")
    paths = [str(tmp_path / "in" / "*.txt")]
    if other == "link":
        (tmp_path / "in" / "b.txt").symlink_to(text)
    elif other == "hard link":
        (tmp_path / "in" / "b.txt").hardlink_to(text)
    else:
        paths.append(str(tmp_path / "in" / ".." / "in" / "a.txt"))
    with pytest.raises(DataError, match=r"same file.*a\.txt.*'s'.*`paths`"):
        prepare(config(tmp_path / "out", [{"name": "s", "paths": paths}]))


def test_two_files_of_one_inode_number_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two file systems, or of one that gives a number twice."""
    for name in ("a", "bb"):
        write(tmp_path / "in" / f"{name}.txt", name.encode())
    monkeypatch.setattr(sources, "_stamp", lambda _: (1, 2, 3))
    manifest = prepare(config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")]))
    assert manifest is not None and manifest.documents == 2


def test_a_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", b"text")
    sources = [{"name": name, "paths": [str(text)]} for name in ("s", "t")]
    with pytest.raises(DataError, match=f"^{text}: .*'s' and 't'"):
        prepare(config(tmp_path / "out", sources))


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(Path(os.fsdecode(bytes(tmp_path) + b"/in/\xff.txt")), b"text")
    with pytest.raises(DataError, match=r"in/\\xff\.txt: .*UTF-8") as caught:
        prepare(config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")]))
    str(caught.value).encode()


def test_the_progress_of_row_groups_ends_at_the_size_of_their_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", documents(120), row_group_size=10)
    seen: list[BuildProgress] = []
    made = config(tmp_path / "out", [one_source(file)], slice_size_mb=0.003)
    assert len(tasks.make_plan(made).tasks) > 3
    prepare(made, progress=seen.append)
    total = {p.total for p in seen if p.phase == "slices"}
    (whole,) = total
    assert file.stat().st_size - 12 < whole <= file.stat().st_size
    assert max(p.done for p in seen) == whole


def test_a_parquet_file_whose_row_groups_are_unknown_counts_whole(tmp_path: Path) -> None:
    """Such a file is one task, and reading it reports the damage."""
    file = write(tmp_path / "a.parquet", b"x" * 5000)
    made = config(tmp_path / "out", [one_source(file)], slice_size_mb=0.001)
    assert tasks.task_bytes(tasks.make_plan(made)) == [5000]
    with pytest.raises(DataError, match=f"^{file}"):
        prepare(made)
