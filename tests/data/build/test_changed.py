"""What was changed since a build began is noticed and refused, not mixed in."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.build import build
from pipeline.data.build.build import prepare
from pipeline.data.build.resume import agree
from pipeline.data.build.tasks import make_plan
from pipeline.errors import DataError
from tests.data.every_kind import TEXTS, config_of_every_kind, paths_of_every_kind
from tests.data.helpers import config, dataset_digest, documents, jsonl, one_source, split_texts, write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_fraction": 0.2}, "validation_fraction: 0.1 then, 0.2 now"),
        ({"slice_size_mb": 1.0}, "slice_size_mb: 0.003 then, 1.0 now"),
        ({"dtype": "uint32"}, "dtype: 'auto' then, 'uint32' now"),
        ({"max_document_mb": 64.0}, "max_document_mb: 32.0 then, 64.0 now"),
    ],
)
def test_a_changed_setting_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "out"), slice_spec=(1, 2))
    with pytest.raises(DataError, match=words):
        prepare(config_of_every_kind(tmp_path, "out", **change))


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    smaller = made.model_copy(update={"model": made.model.model_copy(update={"vocab_size": 280})})
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 300 then, 280 now"):
        prepare(smaller)
    file = tmp_path / "out" / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(made)


def test_another_tokenizer_file_is_refused(tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "bpe"))
    file = tmp_path / "tokenizer.json"
    shutil.copy(tmp_path / "bpe" / "tokenizer.json", file)
    entry = paths_of_every_kind(tmp_path / "in")
    made = config(tmp_path / "out", entry, tokenizer={"kind": "file", "path": str(file)}, slice_size_mb=0.003)
    prepare(made, slice_spec=(1, 2))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"is not the tokenizer that .* was begun with"):
        prepare(made)


@pytest.mark.parametrize("name", ["whole/07.txt", "lines.jsonl", "packed.jsonl.gz", "rows.parquet"])
def test_a_changed_source_is_refused_and_a_touched_one_is_not(name: str, tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made)
    (tmp_path / "out" / "manifest.json").unlink()
    before = dataset_digest(tmp_path / "out")
    file = tmp_path / "in" / name
    content = file.read_bytes()
    file.write_bytes(content)
    prepare(made)
    assert before.items() <= dataset_digest(tmp_path / "out").items()
    if name.endswith(".gz"):
        changed = _gzip_of_size(len(content), jsonl(TEXTS[150:230] * 3))
    elif name.endswith(".parquet"):
        changed = _parquet_of_size(len(content), [t.replace("state", "State") for t in TEXTS[230:]])
    else:
        changed = content.replace(b"in", b"on")
    assert changed != content and len(changed) == len(content)
    file.write_bytes(changed)
    with pytest.raises(DataError, match=f"{Path(name).name}: was changed after"):
        prepare(made)


def _gzip_of_size(size: int, content: bytes) -> bytes:
    """Filled up by a comment in the header."""
    packed = gzip.compress(content, mtime=0)
    assert len(packed) < size
    return packed[:3] + b"\x10" + packed[4:10] + b"c" * (size - len(packed) - 1) + b"\0" + packed[10:]


def _parquet_of_size(size: int, texts: list[str]) -> bytes:
    """Filled up between the row groups and the footer."""
    out = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, out, row_group_size=10, store_schema=False)
    packed = out.getvalue()
    assert len(packed) < size
    footer = len(packed) - 8 - int.from_bytes(packed[-8:-4], "little")
    return packed[:footer] + b"\0" * (size - len(packed)) + packed[footer:]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_advice_of_a_first_start_that_failed_can_be_followed(tokenizer: str, tmp_path: Path) -> None:
    texts = documents(40)
    text = write(tmp_path / "a.jsonl", jsonl(texts, field="words"))
    wrong, right = (
        config(tmp_path / "out", [one_source(text, **field)], tokenizer={"kind": tokenizer})
        for field in ({}, {"field": "words"})
    )
    with pytest.raises(DataError, match="set `field` of the source"):
        prepare(wrong)
    prepare(right)
    assert split_texts(tmp_path / "out") == texts


def test_a_file_that_is_repaired_before_a_slice_was_made_is_read_anew_by_the_tokenizer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(documents(200, seed=1)))
    made = config(tmp_path / "out", [one_source(text)], tokenizer={"kind": "bpe"})

    def failing(*_: Any) -> None:
        raise DataError("a bad record")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="a bad record"):
        patch.setattr(build.SliceWriter, "publish", failing)
        prepare(made)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    write(text, jsonl(documents(200, seed=2)))
    prepare(made)
    other = made.model_copy(update={"data": made.data.model_copy(update={"path": str(tmp_path / "other")})})
    prepare(other)
    assert dataset_digest(tmp_path / "out") == dataset_digest(tmp_path / "other")


def test_a_build_publishes_nothing_once_another_has_begun_the_folder_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config_of_every_kind(tmp_path, "out")
    write(tmp_path / "more.txt", b"text")
    entries = [*paths_of_every_kind(tmp_path / "in"), {"name": "more", "paths": [str(tmp_path / "more.txt")]}]
    other = made.model_copy(update={"data": config(tmp_path / "out", entries).data})
    add = build.SliceWriter.add

    def overtaken(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        agree(tmp_path / "out", make_plan(other), begun=False)

    monkeypatch.setattr(build.SliceWriter, "add", overtaken)
    with pytest.raises(DataError, match="sources.more: was there then, is not now"):
        prepare(made)
    assert not list((tmp_path / "out").rglob("slice.json"))


def test_files_that_come_or_go_are_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    new = write(tmp_path / "in" / "whole" / "99.txt", b"new")
    with pytest.raises(DataError, match=r"99\.txt: is new"):
        prepare(made)
    new.unlink()
    (tmp_path / "in" / "whole" / "00.txt").unlink()
    with pytest.raises(DataError, match=r"00\.txt: was there then, is not now"):
        prepare(made)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of_every_kind(tmp_path, "out")
    monkeypatch.setattr(build, "stamp_of", lambda _: (0, 0, 0))
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare(made)
