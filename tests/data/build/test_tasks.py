"""The work is cut by sizes, quickly, and a text is in it once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build import make_tokenizer, tasks
from pipeline.data.build.build import Progress, prepare
from pipeline.data.build.resume import agree
from pipeline.data.read.sources import SourceFile
from pipeline.errors import DataError
from tests.data.helpers import config, documents, one_source, write, write_parquet


class _Counting(Sequence[SourceFile]):
    """Counts how often a file is looked at."""

    def __init__(self, files: list[SourceFile]) -> None:
        self.files = files
        self.looks = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return self.files[index]

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self.files)


def test_small_files_are_put_together_without_looking_at_the_group_again_for_each() -> None:
    files = _Counting([SourceFile(f"{i}.txt", "txt", None, 10, (0, 0, i)) for i in range(2000)])
    found = tasks._tasks_of(0, SourceConfig(name="s", paths=("*.txt",)), files, 5000, 0)
    assert [task.files for task in found] == [tuple(range(start, start + 500)) for start in range(0, 2000, 500)]
    assert files.looks <= len(files)


def test_a_tokenizer_is_trained_without_measuring_the_sample_again_for_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(documents(80)):
        write(tmp_path / "in" / f"{number:02d}.txt", text.encode())
    made = config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], tokenizer={"kind": "bpe"})
    made = made.model_copy(update={"data": made.data.model_copy(update={"slice_size_mb": 1e-5})})
    measured = []
    monkeypatch.setattr(make_tokenizer, "len", lambda value: measured.append(value) or len(value), raising=False)
    assert make_tokenizer._sample(made, tasks.make_plan(made))
    assert len(measured) < 20 * 80


def test_the_plan_is_written_in_one_line_and_read_back(tmp_path: Path) -> None:
    for number, text in enumerate(documents(20)):
        write(tmp_path / "in" / f"{number:02d}.txt", text.encode())
    made = tasks.make_plan(config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], slice_size_mb=0.001))
    agree(tmp_path, made, begun=False)
    assert (tmp_path / "plan.json").read_bytes().count(b"\n") == 1
    assert agree(tmp_path, made, begun=True) == made


@pytest.mark.parametrize("other", ["link", "way round"])
def test_a_file_that_a_source_has_twice_is_refused(other: str, tmp_path: Path) -> None:
    text = write(tmp_path / "in" / "a.txt", b"text")
    paths = [str(tmp_path / "in" / "*.txt")]
    if other == "link":
        (tmp_path / "in" / "b.txt").symlink_to(text)
    else:
        paths.append(str(tmp_path / "in" / ".." / "in" / "a.txt"))
    with pytest.raises(DataError, match=r"is the same file as .*a\.txt, both of source 's'.*narrow `paths`"):
        prepare(config(tmp_path / "out", [{"name": "s", "paths": paths}]))


def test_a_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", b"text")
    sources = [{"name": name, "paths": [str(text)]} for name in ("s", "t")]
    with pytest.raises(DataError, match=r"both in the sources 's' and 't'"):
        prepare(config(tmp_path / "out", sources))


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write(Path(os.fsdecode(bytes(tmp_path) + b"/in/\xff.txt")), b"text")
    with pytest.raises(DataError, match=r"in/\\xff\.txt: the file's name is no UTF-8") as caught:
        prepare(config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")]))
    str(caught.value).encode()


def test_the_progress_of_row_groups_ends_at_the_size_of_their_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", documents(120), row_group_size=10)
    seen: list[Progress] = []
    made = config(tmp_path / "out", [one_source(file)], slice_size_mb=0.003)
    assert len(tasks.make_plan(made).tasks) > 3
    prepare(made, progress=seen.append)
    total = {p.total for p in seen if p.phase == "slices"}
    (whole,) = total
    assert file.stat().st_size - 12 < whole <= file.stat().st_size
    assert max(p.done for p in seen) == whole
