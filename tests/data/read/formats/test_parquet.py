"""Parquet files give their text column; damaged ones and those without text are named; memory is bounded."""

from __future__ import annotations

import resource
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.build.build import prepare
from pipeline.data.layout import MANIFEST
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.chunks import CHUNK_BYTES, Chunk, ChunkBuilder
from pipeline.data.read.formats.parquet import Parquet
from pipeline.data.read.formats.parquet_pages import page_sizes
from pipeline.data.read.sources import SourceFile, find_files
from pipeline.data.read.task import Part, TaskFile
from pipeline.errors import DataError
from pipeline.files import read_json
from tests.data.helpers import (
    COMPRESS,
    FORMAT_TEXTS,
    built_texts,
    config,
    documents,
    one_source,
    split_texts,
    write,
    write_parquet,
)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", documents(200), row_group_size=20)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a\.parquet, .*unreadable"):
        prepare(config(tmp_path / "out", [one_source(path)]))


@pytest.mark.parametrize(
    ("column", "texts", "words", "reason"),
    [
        ("body", ["a"], ["no column 'text'", "'id', 'body'"], "missing field"),
        ("text", ["a", None, "b"], ["row 1 (from 0)", "'text' is null"], "missing field"),
    ],
)
def test_parquet_rows_without_text_are_named(
    column: str, texts: list[str | None], words: list[str], reason: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts, column=column)
    with pytest.raises(DataError) as caught:
        prepare(config(tmp_path / "out", [one_source(path)]))
    for word in [str(path), reason, *words]:
        assert word in str(caught.value)


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match=r"field.*'id'.*int64"):
        prepare(config(tmp_path / "out", [one_source(path, field="id")]))


def test_invalid_utf8_in_a_binary_parquet_column_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([b"ok", None, b"n\xfft"], pyarrow.binary())}), path
    )
    made = config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.9)
    assert prepare(made).bad == {"invalid UTF-8": 1, "missing field": 1}
    path.write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"ok", b"n\xfft"], pyarrow.binary())}), path)
    with pytest.raises(DataError, match=r"row 1 \(from 0\), byte 1 .*invalid UTF-8"):
        prepare(config(tmp_path / "out2", [one_source(path)]))


def _write(path: Path, *columns: pyarrow.Array, names: list[str], **how: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(columns), names=names), path, **how)
    return path


def test_a_group_of_nothing_but_nulls_is_skipped(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*[None] * 20, "text"])
    prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=1 - 1e-9))
    assert split_texts(tmp_path / "out") == ["text"]


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.binary_view()])
def test_nulls_of_a_view_are_skipped(kind: pyarrow.DataType, tmp_path: Path) -> None:
    texts = ["a", None, "b"]
    values = texts if kind == pyarrow.string_view() else [t and t.encode() for t in texts]
    path = _write(tmp_path / "a.parquet", pyarrow.array(values, kind), names=["text"])
    made = config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.9)
    assert prepare(made).bad == {"missing field": 1}
    assert split_texts(tmp_path / "out") == ["a", "b"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", pyarrow.array(["a"]), pyarrow.array(["b"]), names=["text", "text"])
    with pytest.raises(DataError, match=r"2 columns.*'text'.*rename"):
        prepare(config(tmp_path / "out", [one_source(path)]))


def test_a_file_without_rows_needs_no_column(tmp_path: Path) -> None:
    entries = [
        one_source(_write(tmp_path / "a.parquet", pyarrow.array([], pyarrow.int64()), names=["id"])),
        {**one_source(write(tmp_path / "o.txt", b"other")), "name": "o"},
    ]
    assert prepare(config(tmp_path / "out", entries)).bad == {}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_groups_and_files_without_rows_are_intact(on_bad: str, version: str, dictionary: bool, tmp_path: Path) -> None:
    how = {"data_page_version": version, "use_dictionary": dictionary}
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, tmp_path / "a.parquet", **how)
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", empty.schema, **how) as out:
        for texts in (["a", "b"], [], ["c"]):
            out.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}))
    for slice_size_mb in (1e-6, 64.0):
        made = config(
            tmp_path / f"{slice_size_mb}",
            [one_source(tmp_path / "*.parquet")],
            on_bad=on_bad,
            slice_size_mb=slice_size_mb,
        )
        assert prepare(made).bad == {}
        assert split_texts(tmp_path / f"{slice_size_mb}") == ["a", "b", "c"]


def _whole(file: SourceFile) -> TaskFile:
    return TaskFile(file, number=0, part=Part("files"), last=True, slice_bytes=None)


def test_every_byte_of_a_footer_can_be_damaged(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", documents(20), row_group_size=5)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    source = config(tmp_path / "out", [one_source(path)]).data.sources[0]
    failed = 0
    for place in range(footer, len(whole) - 8, 3):
        content = bytearray(whole)
        content[place] ^= 0xA5
        path.write_bytes(content)
        (file,) = find_files(source)
        Parquet(source).split(file, 100)
        builder = ChunkBuilder(BadRecordPolicy("skip"), 1 << 20)
        chunks = [item for item in Parquet(source).read(_whole(file), builder) if isinstance(item, Chunk)]
        failed += any(chunk.bad for chunk in [*chunks, builder.take()])
    assert failed > 50


def test_a_text_that_is_in_a_dictionary_once_takes_bounded_memory(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", pyarrow.array(["y" * 200_000] * 600), names=["text"])
    assert path.stat().st_size < 50_000
    source = config(tmp_path / "out", [one_source(path)]).data.sources[0]
    (file,) = find_files(source)
    builder = ChunkBuilder(BadRecordPolicy("error"), 1 << 20)
    before, most, texts = pyarrow.total_allocated_bytes(), 0, 0
    for item in Parquet(source).read(_whole(file), builder):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        if isinstance(item, Chunk):
            assert item.documents.text_bytes < 2 * CHUNK_BYTES
            texts += len(item.documents)
    assert texts + len(builder.take().documents) == 600
    assert most < 12 * CHUNK_BYTES


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_value_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path: Path, dictionary: bool) -> None:
    texts = pyarrow.array(["a", "y" * (300 << 20), "b"])
    path = _write(tmp_path / "a.parquet", texts, names=["text"], compression="zstd", use_dictionary=dictionary)
    del texts
    assert path.stat().st_size < 1 << 20
    source = config(tmp_path / "out", [one_source(path)]).data.sources[0]
    (file,) = find_files(source)
    builder = ChunkBuilder(BadRecordPolicy("error"), 1 << 20)
    before, most = pyarrow.total_allocated_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"row 0 .*31\d,\d{3},\d{3} bytes"):
        list(Parquet(source).read(_whole(file), builder))
    assert pyarrow.total_allocated_bytes() - before < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 100 << 10


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("checksum", [True, False])
def test_the_pages_of_a_column_are_found_whatever_writes_them(
    tmp_path: Path, version: str, dictionary: bool, checksum: bool
) -> None:
    texts = pyarrow.array([f"{i:0100}" for i in range(20_000)])
    numbers = pyarrow.array(range(20_000))
    how = {"data_page_version": version, "use_dictionary": dictionary, "write_page_checksum": checksum}
    path = _write(
        tmp_path / "a.parquet", numbers, texts, names=["n", "text"], data_page_size=4096, write_batch_size=16, **how
    )
    table = pyarrow.parquet.ParquetFile(path)
    for group in range(table.num_row_groups):
        column = table.metadata.row_group(group).column(1)
        sizes = list(page_sizes(pyarrow.OSFile(str(path)), column))
        assert len(sizes) > 10
        headers = column.total_uncompressed_size - sum(sizes)
        assert 0 < headers < 400 * len(sizes), "the sizes of the footer count the headers too"


@pytest.mark.parametrize("compression", [None, *COMPRESS])
def test_parquet_gives_its_documents_from_row_groups_of_any_size(tmp_path: Path, compression: str | None) -> None:
    plain = write_parquet(tmp_path / "all.parquet", FORMAT_TEXTS, row_group_size=17)
    if compression is not None:
        path = write(tmp_path / f"all.parquet.{compression}", COMPRESS[compression](plain.read_bytes()))
        assert built_texts(tmp_path, path) == FORMAT_TEXTS
    else:
        assert built_texts(tmp_path, plain) == FORMAT_TEXTS
        slices = list((tmp_path / "out" / "slices").iterdir())
        assert len(slices) > 3


def test_every_text_of_a_file_counts_in_its_digest(tmp_path: Path) -> None:
    digests = set()
    for changed in (None, 0, 3, 7):
        texts = [f"text {i}" for i in range(8)]
        if changed is not None:
            texts[changed] = texts[changed].upper()
        path = write_parquet(tmp_path / "a.parquet", texts)
        out = tmp_path / f"out-{changed}"
        prepare(config(out, [one_source(path)]))
        [source] = read_json(out / MANIFEST)["sources"]
        digests.add(source["files"][0]["sha256"])
    assert len(digests) == 4
