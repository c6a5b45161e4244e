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


def _tampered(folder: Path, change: Any) -> Path:
    """A manifest with a change and a digest of its own: whoever makes a checkpoint can compute it."""
    file = folder / CHECKPOINT_MANIFEST
    tree = json.loads(file.read_bytes())
    tree.pop("digest")
    change(tree)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**tree, "digest": digest}, sort_keys=True))
    return file


WEIGHT = "layers.3.ffn.w1.weight"


def _set_fragment(index: int, start: int, length: int) -> Any:
    return lambda tree: tree["parameters"][WEIGHT]["fragments"].__setitem__(index, [rank_file(index), start, length])


MALFORMED = {
    "overlap that hides a gap": _set_fragment(3, 20, 10),
    "gap": _set_fragment(3, 31, 9),
    "gap at the end": _set_fragment(RANKS - 1, (RANKS - 1) * 10, 9),
    "beyond the end": _set_fragment(RANKS - 1, (RANKS - 1) * 10, 11),
    "negative start": _set_fragment(0, -10, 20),
    "fraction": _set_fragment(0, 0, 10.0),  # type: ignore[arg-type]
    "file outside": lambda tree: tree["parameters"][WEIGHT]["fragments"].__setitem__(0, ["../../secret", 0, 10]),
    "file unknown": lambda tree: tree["parameters"][WEIGHT]["fragments"].__setitem__(0, [rank_file(99999), 0, 10]),
    "file outside in files": lambda tree: tree["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "ab" * 32}}),
    "parameter with escapes": lambda tree: tree["parameters"].update({"\x1b[31m": tree["parameters"][WEIGHT]}),
    "shape of text": lambda tree: tree["parameters"][WEIGHT].update(shape="10"),
    "shape of another size": lambda tree: tree["parameters"][WEIGHT].update(shape=[10 * RANKS + 1]),
    "huge shape": lambda tree: tree["parameters"][WEIGHT].update(shape=[2**70]),
    "no fragments": lambda tree: tree["parameters"][WEIGHT].pop("fragments"),
    "parameters a list": lambda tree: tree.update(parameters=[]),
    "val_loss of text": lambda tree: tree["state"].update(val_loss="x"),
    "rng of text": lambda tree: tree["state"].update(rng="xyz"),
    "guard a list": lambda tree: tree["state"].update(guard=[1]),
    "state missing": lambda tree: tree.pop("state"),
    "step of text": lambda tree: tree.update(step="7"),
    "a key more": lambda tree: tree.update(more=1),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_one_error_that_names_it(case: str, manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    file = _tampered(tmp_path, MALFORMED[case])
    with pytest.raises(CheckpointError, match=f"^{file}: ") as caught:
        Manifest.load(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"\xff\xfe", b'"\\ud800"'])
def test_a_file_that_is_no_manifest_is_one_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / CHECKPOINT_MANIFEST}: "):
        Manifest.load(tmp_path)


def test_empty_fragments_between_others_are_no_gap(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    _tampered(tmp_path, lambda tree: tree["parameters"][WEIGHT]["fragments"].append([rank_file(0), 10, 0]))
    Manifest.load(tmp_path)
