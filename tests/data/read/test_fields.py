"""Fields inside fields and conditions give the same documents whatever the format, and however they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data_sections import SourceConfig
from pipeline.config.where import Condition
from pipeline.data.build.build import prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.fields import Filter, find_column
from pipeline.errors import DataError
from tests.config.test_where import CONDITIONS
from tests.data.helpers import config, split_texts, write

RECORDS = [
    {"content": {"text": "one"}, "meta": {"lang": "en", "score": 0.9}, "ok": True},
    {"content": {"text": "two"}, "meta": {"lang": "de", "score": 0.9}, "ok": True},
    {"content": {"text": "three"}, "meta": {"lang": "en", "score": None}, "ok": None},
    {"content": {"text": "four"}, "meta": None, "ok": False},
    {"content": {"text": "five"}, "meta": {"lang": "en", "score": 0.1}, "ok": True},
    {"content": None, "meta": {"lang": "none", "score": 0.0}, "ok": True},
]


def _file(folder: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    """Writes records as one kind of file; `odd` makes every line one that Arrow cannot read at once."""
    path = folder / f"a.{'jsonl' if kind in ('jsonl', 'odd') else kind}"
    if kind in ("jsonl", "odd"):
        separator = "\n \n" if kind == "odd" else "\n"
        return write(path, separator.join(json.dumps(record) for record in records).encode())
    table = pyarrow.Table.from_pylist(records)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "odd", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ("meta.lang == 'en' and meta.score >= 0.65", ["one"]),
        ("meta.lang != 'en' and meta.lang != 'none'", ["two"]),
        ("not meta.score < 0.5 or ok == False", ["one", "two", "four"]),
        ("meta.lang in ('en', 'de')", ["one", "two", "three", "five"]),
    ],
)
def test_the_same_records_are_kept_of_every_format(kind: str, where: str, texts: list[str], tmp_path: Path) -> None:
    source = {"name": "s", "paths": [str(_file(tmp_path, kind, RECORDS))], "split": "train", "where": where}
    manifest = prepare(config(tmp_path / "out", [{**source, "field": "content.text"}], slice_size_mb=1e-4))
    assert manifest is not None
    assert split_texts(tmp_path / "out") == texts
    # The last record has no text; it is dropped before that can matter.
    assert manifest.dropped == manifest.sources[0]["dropped"] == len(RECORDS) - len(texts)
    assert DatasetManifest.load(tmp_path / "out").dropped == manifest.dropped


@pytest.mark.parametrize("kind", ["jsonl", "odd", "parquet", "arrow"])
def test_a_name_with_a_dot_is_also_found_as_a_whole(kind: str, tmp_path: Path) -> None:
    records = [{"content.text": "flat", "meta.lang": lang} for lang in ("en", "de")]
    source = {"name": "s", "paths": [str(_file(tmp_path, kind, records))], "split": "train"}
    prepare(config(tmp_path / "out", [{**source, "field": "content.text", "where": "meta.lang == 'en'"}]))
    assert split_texts(tmp_path / "out") == ["flat"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("field", "where", "words"),
    [
        ("content.body", None, "content.body"),
        ("meta.score", None, "no string"),
        ("content.text", "meta.lang > 3", "cannot be compared"),
        ("content.text", "meta.score == 'high'", "cannot be compared"),
        ("content.text", "meta.lang == 'fr'", "true of none of its 5 records"),
    ],
)
def test_fields_that_cannot_be_used_are_named(
    kind: str, field: str, where: str | None, words: str, tmp_path: Path
) -> None:
    source = {"name": "s", "paths": [str(_file(tmp_path, kind, RECORDS[:5]))], "split": "train", "field": field}
    with pytest.raises(DataError, match=words):
        prepare(config(tmp_path / "out", [{**source, "where": where}]))


def test_a_condition_on_a_text_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    with pytest.raises(DataError, match=r"a\.txt: .*where"):
        prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(path)], "where": "a == 1"}]))


_RECORD = st.fixed_dictionaries(
    {},
    optional={
        "a": st.none() | st.fixed_dictionaries({}, optional={"b": st.none() | st.floats()}),
        "a.b": st.none() | st.floats(),
        "text": st.none() | st.text(max_size=5),
        "flag": st.none() | st.booleans(),
    },
)


@settings(deadline=None)
@given(CONDITIONS, st.lists(_RECORD, min_size=1, max_size=20))
def test_columns_and_single_records_agree(condition: Condition, records: list[dict[str, Any]]) -> None:
    schema = pyarrow.schema(
        {
            "a": pyarrow.struct({"b": pyarrow.float64()}),
            "a.b": pyarrow.float64(),
            "text": pyarrow.string(),
            "flag": pyarrow.bool_(),
        }
    )
    batch = pyarrow.RecordBatch.from_pylist(records, schema)
    wanted = Filter(SourceConfig(name="s", paths=("x",), where=str(condition)))
    kept = wanted.kept({name: find_column(batch.column, name) for name in wanted.fields})
    assert kept.tolist() == [wanted.keeps(record) for record in records]
