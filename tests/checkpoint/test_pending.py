"""Ranks are not equally fast: a late one finds less space, or a save that was given up."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

from pipeline.checkpoint import pending
from pipeline.checkpoint.layout import Manifest, published, rank_file
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import newest_checkpoint, verify
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from tests.checkpoint.support import NUMEL, fragments, saver

PART = 3 * 4 * NUMEL // 2  # bytes of half the parameter and its moments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    take_over(tmp_path, "a1")
    return tmp_path


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".step_*")]


def begin(one: CheckpointSaver, step: int, rank: int, world_size: int = 2) -> None:
    one.save(step, fragments(1.0, rank, world_size), {})


def wait_for_part(folder: Path, rank: int) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob(f".step_*/{rank_file(rank)}.part.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def give_disk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = namedtuple("usage", "total used free")

    def disk_usage(path: Path) -> Any:
        used = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
        return usage(size, used, size - used)

    monkeypatch.setattr(pending.shutil, "disk_usage", disk_usage)


def test_a_late_rank_needs_space_only_for_its_own_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_disk(monkeypatch, int(2.5 * PART))
    reports: list[Saved] = []
    both = [saver(folder, reports, rank, 2) for rank in range(2)]
    begin(both[0], 1, 0)
    wait_for_part(folder, 0)
    begin(both[1], 1, 1)
    both[0].wait()
    assert [r.error for r in reports] == [None]


def test_a_rank_whose_part_does_not_fit_fails_before_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_disk(monkeypatch, PART - 1)
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: pytest.fail("the part was written"))
    reports: list[Saved] = []
    one = saver(folder, reports, 0, 2)
    begin(one, 1, 0)
    one.wait()
    error = str(reports[0].error)
    assert error.startswith(f"rank 0 on {socket.gethostname()}: {folder}: ")
    assert "needs 0.0 MB" in error and "removing the oldest" in error


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_begins_after_the_save_failed_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    begun, real = list[str](), safetensors.torch.save_file

    def one_fails(tensors: dict[str, Tensor], path: Path) -> None:
        begun.append(path.name)
        if path.name == rank_file(failing):
            raise OSError(5, "Input/output error")
        real(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", one_fails)
    reports: list[Saved] = []
    ranks = [saver(folder, reports, rank, 3) for rank in range(3)]
    for rank in range(2):
        begin(ranks[rank], 1, rank, 3)
    for rank in range(2):
        ranks[rank].wait()
    assert f"rank {failing} on" in str(reports[0].error)
    begin(ranks[2], 1, 2, 3)
    ranks[2].wait()
    assert rank_file(2) not in begun
    assert leftovers(folder) == []


def test_a_rank_that_is_writing_while_the_save_fails_deletes_its_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, real = threading.Event(), pending.sha256_file

    def late(path: Path) -> str:
        digest = real(path)
        if path.name == rank_file(1):
            failed.wait(30)
        return digest

    monkeypatch.setattr(pending, "sha256_file", late)
    reports: list[Saved] = []
    both = [saver(folder, reports, rank, 2, timeout_min=0.001) for rank in range(2)]
    begin(both[1], 1, 1)
    begin(both[0], 1, 0)
    both[0].wait()
    assert "did not arrive" in str(reports[0].error)
    failed.set()
    both[1].wait()
    assert leftovers(folder) == []


def test_the_next_save_deletes_what_a_failed_one_left_but_nothing_of_other_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(folder, [])
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patched.setattr(Manifest, "save", lambda self, folder: (_ for _ in ()).throw(OSError(28, "No space left")))
        one.save(1, fragments(1.0), {})
        one.wait()
    assert leftovers(folder) == [".step_00000001.a1.1.tmp"]
    (folder / ".step_00000001.a2.1.tmp").mkdir()
    found: list[list[str]] = []
    real = pending.PendingCheckpoint.check_space
    monkeypatch.setattr(
        pending.PendingCheckpoint, "check_space", lambda self, size: found.append(leftovers(folder)) or real(self, size)
    )
    one.save(2, fragments(2.0), {})
    one.wait()
    assert found == [[".step_00000001.a2.1.tmp"]], "deleted before any rank checks the free space"
    assert [path.name for path in published(folder)] == ["step_00000002"]


def test_a_rank_that_fails_after_its_part_arrived_deletes_nothing_that_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, real_json, real_merged = threading.Event(), pending.write_json, pending._merged
    reports: list[Saved] = []
    both = [saver(folder, reports, rank, 2) for rank in range(2)]

    def fails_late(path: Path, value: Any) -> None:
        real_json(path, value)
        if path.name.startswith(rank_file(1)):
            collected.wait(30)
            raise OSError(5, "Input/output error")

    def merged(*args: Any) -> Manifest:
        collected.set()
        both[1].wait()
        return real_merged(*args)

    monkeypatch.setattr(pending, "write_json", fails_late)
    monkeypatch.setattr(pending, "_merged", merged)
    for rank in range(2):
        begin(both[rank], 1, rank)
    both[0].wait()
    assert reports[0].error is None
    verify(newest_checkpoint(folder))


def test_ranks_save_again_after_a_failed_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Saved] = []
    both = [saver(folder, reports, rank, 2) for rank in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", lambda *args: (_ for _ in ()).throw(OSError(5, "bad disk")))
        for rank in range(2):
            begin(both[rank], 1, rank)
        for one in both:
            one.wait()
    for rank in range(2):
        begin(both[rank], 2, rank)
    for one in both:
        one.wait()
    assert [r.error is None for r in reports] == [False, True]
    assert leftovers(folder) == []
