"""What torch.compile keeps is executed later: only its owner may write it, and a copied run brings none along."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.train.compile_cache import VARIABLE, keep_compiled


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that what the code sets is undone
    monkeypatch.delenv(VARIABLE)


def test_the_folder_is_for_its_owner_alone_and_survives_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    keep_compiled(folder)
    assert os.environ[VARIABLE] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    (folder / "graph").write_text("compiled")
    del os.environ[VARIABLE]
    keep_compiled(folder)
    assert (folder / "graph").exists()


def test_what_a_copied_run_folder_brings_along_is_thrown_away(tmp_path: Path) -> None:
    keep_compiled(tmp_path / "compiled")
    (tmp_path / "compiled" / "graph").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "compiled" / "link").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "compiled", tmp_path / "copy", symlinks=True)
    del os.environ[VARIABLE]
    keep_compiled(tmp_path / "copy")
    assert not (tmp_path / "copy" / "graph").exists() and (tmp_path / "elsewhere").exists()
    assert (tmp_path / "compiled" / "graph").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_that_others_can_write_into_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(mode)
    with pytest.raises(UsageError, match=str(tmp_path)):
        keep_compiled(tmp_path / "compiled")
    assert VARIABLE not in os.environ


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "compiled").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError):
        keep_compiled(tmp_path / "compiled")


def test_a_folder_that_the_user_chose_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/mine")
    keep_compiled(tmp_path / "compiled")
    assert os.environ[VARIABLE] == "/mine" and not (tmp_path / "compiled").exists()
