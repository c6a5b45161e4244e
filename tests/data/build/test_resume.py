"""A build resumes from its slices, and refuses them once their settings or sources changed."""

from __future__ import annotations

import gzip
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config.sections import Config
from pipeline.data.build import build
from pipeline.data.build.build import prepare
from pipeline.data.build.resume import reconcile_plan
from pipeline.data.build.tasks import make_plan
from pipeline.data.layout import PLAN, published_slices
from pipeline.errors import DataError
from tests.data.every_kind import TEXTS, config_of_every_kind, paths_of_every_kind
from tests.data.helpers import config, dataset_digest, documents, jsonl, one_source, split_texts, write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_fraction": 0.2}, "validation_fraction: 0.1 .*0.2"),
        ({"slice_size_mb": 1.0}, "slice_size_mb: 0.003 .*1.0"),
        ({"dtype": "uint32"}, "dtype: 'auto' .*'uint32'"),
        ({"max_document_mb": 64.0}, "max_document_mb: 32.0 .*64.0"),
    ],
)
def test_a_changed_setting_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "out"), slice_spec=(1, 2))
    with pytest.raises(DataError, match=words):
        prepare(config_of_every_kind(tmp_path, "out", **change))


def test_a_changed_vocabulary_size_is_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    smaller = made.model_copy(update={"model": made.model.model_copy(update={"vocab_size": 280})})
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 300 .*280"):
        prepare(smaller)


def test_a_changed_condition_is_refused_and_another_way_to_write_it_is_not(tmp_path: Path) -> None:
    sources = [one_source(write(tmp_path / f"{name}.jsonl", jsonl(TEXTS[:60])), name=name) for name in ("a", "b")]

    def wanted(folder: str, **a: Any) -> Config:
        return config(tmp_path / folder, [{**sources[0], **a}, sources[1]], slice_size_mb=0.003)

    assert prepare(wanted("out", where="id>=10"), slice_spec=(1, 2)) is None
    for change in ({"where": "id >= 11"}, {"where": None}, {"where": "id>=10", "field": "body"}):
        with pytest.raises(DataError, match=rf"sources\.a\.{list(change)[-1]}: "):
            prepare(wanted("out", **change))
    again = prepare(wanted("out", where="(10 <= id)"))
    assert again is not None and again == prepare(wanted("fresh", where="id >= 10.0"))
    assert again.dropped == 10 and split_texts(tmp_path / "out") == TEXTS[10:60] + TEXTS[:60]


@pytest.mark.parametrize("name", ["whole/07.txt", "lines.jsonl", "packed.jsonl.gz", "rows.parquet", "batches.arrow"])
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
        changed = _parquet_of_size(len(content), [t.replace("state", "State") for t in TEXTS[230:270]])
    else:
        changed = content.replace(b"in", b"on")
    assert changed != content and len(changed) == len(content)
    file.write_bytes(changed)
    with pytest.raises(DataError, match=f"{Path(name).name}: was changed after"):
        prepare(made)


def _gzip_of_size(size: int, content: bytes) -> bytes:
    """Pads the archive by a comment in its header."""
    packed = gzip.compress(content, mtime=0)
    assert len(packed) < size
    return packed[:3] + b"\x10" + packed[4:10] + b"c" * (size - len(packed) - 1) + b"\0" + packed[10:]


def _parquet_of_size(size: int, texts: list[str]) -> bytes:
    """Pads the file between the row groups and the footer."""
    out = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, out, row_group_size=10, store_schema=False)
    packed = out.getvalue()
    assert len(packed) < size
    footer = len(packed) - 8 - int.from_bytes(packed[-8:-4], "little")
    return packed[:footer] + b"\0" * (size - len(packed)) + packed[footer:]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_failed_first_start_does_not_bind_the_next(tokenizer: str, tmp_path: Path) -> None:
    texts = documents(40)
    text = write(tmp_path / "a.jsonl", jsonl(texts, field="words"))
    wrong, right = (
        config(tmp_path / "out", [one_source(text, **field)], tokenizer={"kind": tokenizer})
        for field in ({}, {"field": "words"})
    )
    with pytest.raises(DataError, match="`field`"):
        prepare(wrong)
    prepare(right)
    assert split_texts(tmp_path / "out") == texts


def test_a_file_repaired_before_the_first_slice_is_reread_for_the_tokenizer_too(
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


def test_a_build_publishes_nothing_once_another_replaced_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config_of_every_kind(tmp_path, "out")
    write(tmp_path / "more.txt", b"text")
    entries = [*paths_of_every_kind(tmp_path / "in"), {"name": "more", "paths": [str(tmp_path / "more.txt")]}]
    other = made.model_copy(update={"data": config(tmp_path / "out", entries).data})
    add = build.SliceWriter.add

    def overtaken(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        reconcile_plan(tmp_path / "out", make_plan(other), begun=False)

    monkeypatch.setattr(build.SliceWriter, "add", overtaken)
    with pytest.raises(DataError, match="sources.more: was there before"):
        prepare(made)
    assert not list((tmp_path / "out").rglob("slice.json"))


def test_added_or_removed_files_are_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    new = write(tmp_path / "in" / "whole" / "99.txt", b"new")
    with pytest.raises(DataError, match=r"99\.txt: is new"):
        prepare(made)
    new.unlink()
    (tmp_path / "in" / "whole" / "00.txt").unlink()
    with pytest.raises(DataError, match=r"00\.txt: was there before"):
        prepare(made)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of_every_kind(tmp_path, "out")
    monkeypatch.setattr(build, "stamp_of", lambda _: (0, 0, 0))
    with pytest.raises(DataError, match="while it was read"):
        prepare(made)


def _make_older(plan: Path) -> str:
    """Makes a plan look as an older version of this program wrote it."""
    older = plan.read_text().replace('"plan_version":2', '"plan_version":1')
    write(plan, older.encode())
    return older


def test_a_finished_dataset_of_an_older_version_stays_as_it_is(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    manifest = prepare(made)
    plan = tmp_path / "out" / PLAN
    older = _make_older(plan)
    assert prepare(made) == manifest
    assert plan.read_text() == older
    text = next(file for file in sorted((tmp_path / "in").rglob("*")) if file.is_file())
    os.utime(text, (1, 1))
    assert prepare(made) == manifest
    assert plan.read_text() != older
    assert '"plan_version":1' in plan.read_text()
    shutil.rmtree(next(published_slices(tmp_path / "out")))
    with pytest.raises(DataError, match=f"^{tmp_path / 'out'}: was begun by an older version .*; finish it with that"):
        prepare(made)


def test_a_dataset_that_an_older_version_began_is_not_continued(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    assert prepare(made, slice_spec=(1, 2)) is None
    _make_older(tmp_path / "out" / PLAN)
    slices = sorted(published_slices(tmp_path / "out"))
    with pytest.raises(DataError, match="or remove the folder to start over"):
        prepare(made)
    assert sorted(published_slices(tmp_path / "out")) == slices


@pytest.mark.parametrize("content", ["[]", '{"plan_version": 1}', '{"plan_version": 1, "settings": 5}'])
def test_a_damaged_plan_is_one_message(content: str, tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    file = write(tmp_path / "out" / PLAN, content.encode())
    with pytest.raises(DataError, match=f"^{file}: .*; remove {file.parent} and"):
        prepare(made)


def test_the_plan_is_written_in_one_line_and_read_back(tmp_path: Path) -> None:
    for number, text in enumerate(documents(20)):
        write(tmp_path / "in" / f"{number:02d}.txt", text.encode())
    made = make_plan(config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], slice_size_mb=0.001))
    reconcile_plan(tmp_path, made, begun=False)
    assert (tmp_path / PLAN).read_bytes().count(b"\n") == 1
    assert reconcile_plan(tmp_path, made, begun=True) == made
