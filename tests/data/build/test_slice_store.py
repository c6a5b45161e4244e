"""A damaged slice is named and can be rebuilt; foreign files in the dataset folder stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.build import build
from pipeline.data.build.build import prepare
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from tests.data.every_kind import config_of_every_kind
from tests.data.helpers import dataset_digest, write


def _cut_in_half(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (Path.unlink, "slice.json"),
        (Path.unlink, "train.idx"),
        (_cut_in_half, "train.idx"),
        (_cut_in_half, "train.bin"),
        (lambda file: file.write_text("{}"), "slice.json"),
        (lambda file: file.write_text('{"shards": 5}'), "slice.json"),
    ],
)
def test_a_damaged_slice_is_named_and_rebuilt(damage: Any, name: str, tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out", dtype="uint32")
    prepare(made)
    before = dataset_digest(tmp_path / "out")
    file = tmp_path / "out" / "slices" / "000000-00000" / name
    damage(file)
    with pytest.raises(DataError, match=f"^{file}: .*{file.parent} and run"):
        prepare(made)
    shutil.rmtree(file.parent)
    prepare(made)
    assert dataset_digest(tmp_path / "out") == before


def test_a_slice_without_its_record_is_named_before_its_sources_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made)
    monkeypatch.setattr(build, "read_task", lambda *_: pytest.fail("read"))
    for record in sorted((tmp_path / "out" / "slices").glob("*/slice.json")):
        content = record.read_bytes()
        record.unlink()
        with pytest.raises(DataError, match=f"^{record}: is missing; remove the folder {record.parent} and"):
            prepare(made)
        record.write_bytes(content)
    prepare(made)


def test_an_empty_folder_is_no_slice(tmp_path: Path) -> None:
    (tmp_path / "out" / "slices" / "000000-00000").mkdir(parents=True)
    assert prepare(config_of_every_kind(tmp_path, "out")) is not None


def test_foreign_files_in_the_folder_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = config_of_every_kind(tmp_path, "out")
    kept = [
        out / ".notes.tmp",
        out / ".plan.json.tmp",
        out / "slices" / ".mine.tmp" / "file",
        out / ".cache.tmp" / "file",
    ]
    ours = [out / ".plan.json.0123456789ab.tmp", out / "slices" / ".000000-00000.0123456789ab.tmp" / "train.bin"]
    for file in (*kept, *ours):
        write(file, b"x")
    prepare(made)
    assert all(file.exists() for file in kept) and not any(file.exists() for file in ours)


def test_a_leftover_that_cannot_be_removed_does_not_fail_the_build(tmp_path: Path) -> None:
    left = tmp_path / "out" / "slices" / ".000000-00000.0123456789ab.tmp"
    write(left, b"a file, where a killed process leaves a folder")
    prepare(config_of_every_kind(tmp_path, "out"))
    assert left.exists() and (tmp_path / "out" / "manifest.json").exists()


def test_slices_of_a_version_that_did_not_count_lost_bytes_lost_none(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out", max_bad_fraction=0.0)
    prepare(made)
    manifest = tmp_path / "out" / "manifest.json"
    before = manifest.read_bytes()
    for file in (tmp_path / "out" / "slices").glob("*/slice.json"):
        record = read_json(file)
        for piece in record["pieces"]:
            del piece["lost"]
        write_json(file, record)
    manifest.unlink()
    prepare(made)
    assert manifest.read_bytes() == before
