"""A manifest describes the files of its dataset; a changed manifest or file is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest, check_sizes
from pipeline.errors import DataError
from tests.data.helpers import a_shard


def test_shards_open_as_plain_memmaps(made: Config) -> None:
    manifest = DatasetManifest.load(made.data.path)
    assert manifest.dtype == "uint16" and len(manifest.splits["train"].shards) > 10
    for shard in manifest.shards:
        assert len(np.memmap(Path(made.data.path) / shard.file, "<u2", "r")) == shard.tokens
        assert len(np.memmap(Path(made.data.path) / shard.index, "<u8", "r")) == shard.documents + 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tree: tree.update(dtype="uint32"), "digest"),
        (lambda tree: tree["shards"][0].update(tokens=1), "digest"),
        (lambda tree: tree.update(format_version=99), "format_version is 99"),
    ],
)
def test_a_changed_manifest_is_refused(change: Any, word: str, copy: Path) -> None:
    file = copy / MANIFEST
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=f"{file}: .*{word}"):
        DatasetManifest.load(copy)


def test_a_folder_without_a_finished_dataset_is_named(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path / 'nothing'}: .*no dataset"):
        DatasetManifest.load(tmp_path / "nothing")
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match=f"{copy}: .* not finished"):
        DatasetManifest.load(copy)


def test_saving_an_identical_manifest_writes_nothing(copy: Path) -> None:
    manifest, before = DatasetManifest.load(copy), (copy / MANIFEST).stat()
    manifest.save(copy)
    assert (copy / MANIFEST).stat().st_ino == before.st_ino
    (copy / MANIFEST).write_text("damaged")
    manifest.save(copy)
    assert DatasetManifest.load(copy) == manifest


def test_a_missing_or_cut_file_is_refused_with_its_cure(copy: Path) -> None:
    manifest = DatasetManifest.load(copy)
    check_sizes(copy, manifest.shards, manifest.numpy_dtype)
    shard = a_shard(copy)
    index = shard.with_suffix(".idx")
    size = index.stat().st_size
    os.truncate(index, size - 2)
    with pytest.raises(DataError, match=f"^{index}: has {size - 2} bytes .* {size};.*prepare it again"):
        check_sizes(copy, manifest.shards, manifest.numpy_dtype)
    shard.unlink()
    with pytest.raises(DataError, match=f"^{shard}: .*; find another$"):
        check_sizes(copy, manifest.shards, manifest.numpy_dtype, cure="find another")
