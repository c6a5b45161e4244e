"""A manifest describes a checkpoint completely, and costs little at a thousand ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import Manifest, rank_file
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.saver import Saved
from pipeline.errors import CheckpointError
from pipeline.run.folder import CHECKPOINT_MANIFEST
from tests.checkpoint.support import fragments, saver

RANKS, PARAMETERS = 20, 30


@pytest.fixture
def manifest() -> Manifest:
    parts = [[rank_file(rank), rank * 10, 10] for rank in range(RANKS)]
    names = [f"layers.{i}.ffn.w1.weight" for i in range(PARAMETERS)]
    return Manifest(
        7,
        RANKS,
        3,
        {rank_file(rank): {"bytes": rank, "sha256": "ab" * 32} for rank in range(RANKS)},
        {name: {"shape": [10 * RANKS], "dtype": "float32", "fragments": parts} for name in names},
        {"val_loss": float("inf"), "config": {"name": "größer", "a": {"z": 1, "b": [None, True, 1e-8]}}, "guard": {}},
    )


def test_a_manifest_survives_a_round_trip_and_its_digest_covers_the_content(manifest: Manifest, tmp_path: Path) -> None:
    digest = manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    tree = json.loads((tmp_path / CHECKPOINT_MANIFEST).read_bytes())
    assert tree.pop("digest") == digest
    assert hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest() == digest, "as documented"


def test_an_indented_manifest_of_an_earlier_version_is_read_and_checked(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    file = tmp_path / CHECKPOINT_MANIFEST
    tree = json.loads(file.read_bytes())
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert Manifest.load(tmp_path) == manifest
    file.write_text(json.dumps({**tree, "step": 8}, indent=2), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{file}: .*digest"):
        Manifest.load(tmp_path)


def test_writing_encodes_one_parameter_at_a_time_and_reading_encodes_nothing(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    real = json.dumps

    def dumps(value: Any, **options: Any) -> str:
        text = real(value, **options)
        pieces.append(len(text))
        return text

    monkeypatch.setattr(layout.json, "dumps", dumps)
    manifest.save(tmp_path)
    size = (tmp_path / CHECKPOINT_MANIFEST).stat().st_size
    assert max(pieces) < 1.5 * size / PARAMETERS
    pieces.clear()
    Manifest.load(tmp_path)
    assert pieces == []


def test_the_report_of_a_save_has_the_digest_of_its_manifest(tmp_path: Path) -> None:
    take_over(tmp_path, "a1")
    reports: list[Saved] = []
    one = saver(tmp_path, reports)
    one.save(1, fragments(1.0), {})
    one.wait()
    assert reports[0].path is not None
    assert reports[0].digest == json.loads((reports[0].path / CHECKPOINT_MANIFEST).read_bytes())["digest"]
