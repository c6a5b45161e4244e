"""The programs of docs/data.md that read our shards find the tokens and documents that are there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import Config
from pipeline.data.manifest import DatasetManifest
from tests.data.helpers import split_texts

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_what_the_page_shows_reads_the_shards(made: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens").symlink_to(made.data.path)
    monkeypatch.chdir(tmp_path)
    stand_in = types.ModuleType("datasets")
    stand_in.Dataset = types.SimpleNamespace(from_generator=lambda make: list(make()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(program, names)
    manifest = DatasetManifest.load(made.data.path)
    for split, file in (("train", "train.bin"), ("validation", "val.bin")):
        rows = [row["input_ids"] for row in names["rows"] if row["split"] == split]
        assert [bytes(row[:-1]).decode() for row in rows] == split_texts(Path(made.data.path), split)
        assert np.fromfile(file, manifest.numpy_dtype).tolist() == [token for row in rows for token in row]
    assert len(names["train"]) == manifest.splits["train"].tokens
