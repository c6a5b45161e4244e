"""Arrow files are read as `datasets.save_to_disk` writes them, in bounded memory, and damage is named."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build.build import prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.chunks import ChunkBuilder
from pipeline.data.read.formats.arrow import Arrow
from pipeline.data.read.sources import find_files
from pipeline.data.read.task import Part, TaskFile
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, FORMAT_TEXTS, built_texts, config, one_source, split_texts, write_arrow

BYTES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}
FORMS = ["string", "large_string", "string_view", "dictionary"]


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("slice_size_mb", [0.002, 64])
def test_streams_and_files_give_their_texts_in_order(kind: str, slice_size_mb: float, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "data-00000-of-00001.arrow", FORMAT_TEXTS, kind)
    assert built_texts(tmp_path, path, slice_size_mb=slice_size_mb) == FORMAT_TEXTS
    assert (len(DatasetManifest.load(tmp_path / "out").shards) > 5) == (slice_size_mb < 1)


def test_an_archive_of_one_is_read(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS)
    packed = tmp_path / "a.arrow.zst"
    packed.write_bytes(COMPRESS["zst"](path.read_bytes()))
    assert built_texts(tmp_path, packed) == FORMAT_TEXTS


def test_nulls_and_bad_utf8_are_single_records(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", ["first", None, "XXXX", "last"])
    path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xff\xfe\xff\xfe"))
    prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.9))
    assert split_texts(tmp_path / "out") == ["first", "last"]
    assert DatasetManifest.load(tmp_path / "out").bad == {"invalid UTF-8": 1, "missing field": 1}
    with pytest.raises(DataError, match=r"a\.arrow, row 1 .*null"):
        prepare(config(tmp_path / "other", [one_source(path)]))


def _spelled(values: list[bytes], kind: pyarrow.DataType) -> pyarrow.Array:
    """Strings that need not be UTF-8."""
    made = pyarrow.array(values, BYTES[kind])
    return pyarrow.Array.from_buffers(kind, len(made), made.buffers())


def _table(form: str, values: list[bytes]) -> pyarrow.Table:
    """A table whose field `a.text` holds the values."""
    if form in ("string", "large_string", "string_view"):
        column = _spelled(values, getattr(pyarrow, form)())
    elif form == "dictionary":
        rows = pyarrow.array(range(len(values)), pyarrow.int32())
        column = pyarrow.DictionaryArray.from_arrays(rows, _spelled(values, pyarrow.string()))
    else:
        inner = _table(form.removeprefix("nested "), values).column(0).chunk(0)
        beside = pyarrow.ListArray.from_arrays(list(range(len(values) + 1)), _spelled(values[::-1], pyarrow.string()))
        return pyarrow.table({"a": pyarrow.StructArray.from_arrays([beside, inner], ["beside", "text"])})
    return pyarrow.table({"a.text": column})


@pytest.mark.parametrize("form", [*FORMS, *(f"nested {form}" for form in FORMS)])
@pytest.mark.parametrize("asked", ["field", "where"])
def test_an_invalid_text_of_any_column_is_that_of_its_row_as_in_parquet(form: str, asked: str, tmp_path: Path) -> None:
    values = [f"document {number}".encode() for number in range(40)]
    values[7] = b"n\xfft"
    table = _table(form, values)
    source = {"field": "a.text"}
    if asked == "where":
        table = table.append_column("text", [[value.decode(errors="replace") for value in values]])
        source = {"where": "a.text != 'document 3'"}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=20)
    found = {}
    for kind in ("arrow", "parquet"):
        entry = one_source(tmp_path / f"a.{kind}", **source)
        made = prepare(config(tmp_path / kind, [entry], on_bad="skip", max_bad_fraction=0.5))
        found[kind] = made.bad, made.dropped, split_texts(tmp_path / kind)
        if asked == "field":
            with pytest.raises(DataError, match=rf"a\.{kind}, row 7 \(from 0\), byte 1 of the text: invalid UTF-8"):
                prepare(config(tmp_path / f"{kind}-error", [entry]))
    assert found["arrow"] == found["parquet"]
    left = 3 if asked == "where" else 7
    texts = [value.decode(errors="replace") for number, value in enumerate(values) if number != left]
    assert found["arrow"] == ({"invalid UTF-8": 1} if asked == "field" else {}, int(asked == "where"), texts)


def test_compressed_columns_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS, compression="zstd")
    with pytest.raises(DataError, match=r"a\.arrow.*compressed"):
        prepare(config(tmp_path / "out", [one_source(path)]))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_file_that_ends_early_keeps_its_whole_batches(kind: str, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.arrow, row \d+0 .*end of the file"):
        prepare(config(tmp_path / "out", [one_source(path)]))
    prepare(config(tmp_path / "skip", [one_source(path)], on_bad="skip", max_bad_fraction=0.9, slice_size_mb=0.002))
    kept = split_texts(tmp_path / "skip")
    assert kept == FORMAT_TEXTS[: len(kept)] and 100 < len(kept) < 300
    lost = [r["lost"] for r in _pieces(tmp_path / "skip") if r["lost"]]
    assert len(lost) == 1 and 0 < lost[0] < path.stat().st_size


def test_mutated_files_end_in_documents_or_bad_records(tmp_path: Path) -> None:
    originals = [write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS[:60], kind).read_bytes() for kind in ("stream", "file")]
    source = SourceConfig(name="s", paths=(str(tmp_path / "a.arrow"),), where="id >= 3")
    reader, rng, reasons = Arrow(source), random.Random(0), Counter[str]()
    for _ in range(300):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.choice([1, 2, 4, 16])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        (tmp_path / "a.arrow").write_bytes(content)
        file = find_files(source)[0]
        builder = ChunkBuilder(BadRecordPolicy("skip"), 1 << 20)
        list(reader.read(TaskFile(file, 0, Part("rows"), True, None), builder))
        chunk = builder.take()
        assert chunk.records >= len(chunk.documents) + chunk.dropped
        reasons.update(chunk.bad)
    assert reasons["unreadable Arrow"] > 100


def _pieces(folder: Path) -> list[dict[str, int]]:
    records = [json.loads(file.read_text()) for file in sorted((folder / "slices").glob("*/slice.json"))]
    return [piece for record in records for piece in record["pieces"]]
