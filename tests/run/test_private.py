"""Files and folders that other users can neither read nor change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.run.private import make_private, write_private

STRANGER = 65534


@pytest.fixture(params=[0, 0o022, 0o077], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever the umask is."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_a_private_file_is_its_owners_alone_and_published_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    for content in (b"secret", b"another"):
        write_private(file, content)
        assert file.read_bytes() == content and file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_a_file_that_cannot_be_published_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        write_private(tmp_path / "file", b"secret")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_private_folder_is_its_owners_alone_and_may_be_there_already(tmp_path: Path) -> None:
    for _ in range(2):
        make_private(tmp_path / "folder", "code", "choose another")
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_could_only_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o755)
    make_private(tmp_path / "folder", "code", "choose another")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o707, 0o720])
def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    with pytest.raises(UsageError, match=f"^{tmp_path}/folder: code .*choose another"):
        make_private(tmp_path / "folder", "code", "choose another")


def test_a_link_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(PipelineError, match=f"^{tmp_path}/{name}: code"):
            make_private(tmp_path / name, "code", "choose another")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user makes it")
def test_a_folder_that_another_user_made_first_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    os.chown(tmp_path / "folder", STRANGER, STRANGER)
    with pytest.raises(UsageError, match="code"):
        make_private(tmp_path / "folder", "code", "choose another")
