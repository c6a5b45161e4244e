"""Files that others made are read only where they are regular files of the folder that was received."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.files import (
    is_regular,
    naming,
    open_regular,
    parse_json,
    read_bounded,
    read_json,
    sha256_file,
    size_of_regular,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("key")
    received = tmp_path / "received"
    (received / "inside").mkdir(parents=True)
    (received / "file").write_text("text")
    (received / "link").symlink_to("file")
    (received / "out").symlink_to(tmp_path / "secret")
    (received / "up").symlink_to("../secret")
    (received / "folder").symlink_to(tmp_path)
    (received / "chain").symlink_to("out")
    (received / "loop").symlink_to("loop")
    (received / "device").symlink_to("/dev/zero")
    os.mkfifo(received / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(received / "socket"))
    return received


@pytest.mark.parametrize("name", ["file", "link"])
def test_a_regular_file_and_a_link_inside_the_folder_are_read(folder: Path, name: str) -> None:
    with open_regular(folder / name, folder) as source:
        assert source.read() == b"text"
    assert size_of_regular(folder / name, folder) == 4 and is_regular(folder / name, folder)


@pytest.mark.parametrize(
    "name",
    ["out", "up", "chain", "folder/secret", "../secret", "loop", "device", "fifo", "socket", "inside", "nothing", "\0"],
)
def test_everything_else_is_refused_at_once(folder: Path, name: str) -> None:
    assert not is_regular(folder / name, folder)
    for read in (open_regular, size_of_regular, read_bounded, sha256_file):
        with pytest.raises((OSError, ValueError)):
            read(folder / name, folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.open

    def forbidden(path: str, flags: int, *more: int) -> int:  # the user of these tests may read everything
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return whole(path, flags, *more)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(PermissionError) as refused:
        read_bounded(folder / "file", folder)
    assert refused.value.filename == str(folder / "file")


def test_the_folder_itself_may_be_a_link_and_a_sibling_with_the_same_beginning_is_outside(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder)
    assert read_bounded(folder.parent / "latest" / "file", folder.parent / "latest") == b"text"
    sibling = folder.with_name("received2")
    sibling.mkdir()
    (sibling / "file").write_text("other")
    (folder / "sibling").symlink_to(sibling / "file")
    assert not is_regular(folder / "sibling", folder)


def test_a_file_beyond_the_limit_is_refused(folder: Path) -> None:
    assert read_bounded(folder / "file", folder, 4) == b"text"
    with pytest.raises(OSError, match="3 bytes"):
        read_bounded(folder / "file", folder, 3)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.ENOENT, UsageError), (errno.EACCES, UsageError), (errno.EIO, PipelineError), (errno.ESTALE, PipelineError)],
)
def test_storage_that_fails_is_no_mistake_of_the_users(number: int, raised: type[PipelineError]) -> None:
    with pytest.raises(PipelineError, match=r"^a: cannot be read \(") as caught:  # noqa: SIM117
        with naming("a", "cannot be read", error=UsageError):
            raise OSError(number, os.strerror(number))
    assert type(caught.value) is raised


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b'"\\ud800"', b"\xff", b"", b"{"])
def test_json_of_any_origin_is_one_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(content)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PipelineError, match=f"^{tmp_path / 'a.json'}: "):
        read_json(tmp_path / "a.json")
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
