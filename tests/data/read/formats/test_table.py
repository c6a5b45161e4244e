"""A format of the config has its class, and a file is only divided where that can be done."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read.formats.table import FORMATS
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part
from tests.data.helpers import write_parquet


def _split(name: str, size: int = 25, compression: str | None = None, **source: str) -> list[Part]:
    file = SourceFile(name, name.rsplit(".", 1)[1], compression, size, (0, 0, 0))
    return FORMATS[file.format](SourceConfig(name="s", paths=(name,), **source)).split(file, 10)


def test_every_format_of_the_config_has_a_class_and_no_other_has() -> None:
    assert {"auto", *FORMATS} == set(get_args(SourceConfig.model_fields["format"].annotation))


def test_a_plain_file_of_records_is_divided_by_bytes() -> None:
    ranges = [Part("range", 0, 10), Part("range", 10, 20), Part("range", 20, 30)]
    assert _split("a.jsonl") == _split("a.txt", separator="|") == ranges
    assert _split("a.jsonl", size=20) == ranges[:2]


@pytest.mark.parametrize(
    ("name", "compression", "separator"),
    [("a.jsonl", "gz", None), ("a.txt", "zst", "|"), ("a.txt", None, "\n\n"), ("a.txt", None, "aba")],
)
def test_what_can_only_be_read_from_its_start_is_a_stream(
    name: str, compression: str | None, separator: str | None
) -> None:
    source = {"separator": separator} if separator else {}
    assert _split(name, compression=compression, **source) == [Part("stream")]


def test_a_document_that_fills_a_file_and_a_packed_parquet_file_are_not_divided() -> None:
    assert _split("a.txt") == _split("a.txt", compression="gz") == _split("a.parquet", compression="gz") == []


def test_parquet_is_divided_at_row_groups_and_whole_where_it_cannot_be_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x" * 400] * 50, row_group_size=10)
    assert _split(str(path)) == [Part("rows", group, group + 1) for group in range(5)]
    path.write_bytes(path.read_bytes()[:-4])
    assert _split(str(path)) == [Part("rows", 0, -1)]
