"""A checkpoint is visible only when whole, whatever fails while it is being written."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import pipeline.files
from pipeline.checkpoint import pending
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import CheckpointReader, newest_checkpoint, verify
from pipeline.checkpoint.saver import Saved
from pipeline.errors import CheckpointError
from tests.checkpoint.support import NUMEL, fragments, save, saver, steps


def value(checkpoint: Path) -> float:
    weight = CheckpointReader(checkpoint).read_whole("weight", "layer.weight")
    assert weight.unique().numel() == 1
    return float(weight[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        take_over(disk, "a1")
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_weights_may_change_after_wait_for_copy(folder: Path, gate: threading.Event) -> None:
    one = saver(folder, [])
    parts = fragments(1.0)
    one.save(1, parts, {})
    one.wait_for_copy()
    parts[0].tensors["weight"].fill_(9.0)
    gate.set()
    one.wait()
    assert value(newest_checkpoint(folder)) == 1.0


def test_nothing_is_visible_before_it_is_whole(folder: Path, gate: threading.Event) -> None:
    one = saver(folder, [])
    one.save(1, fragments(1.0), {})
    one.wait_for_copy()
    assert steps(folder) == []
    gate.set()
    one.wait()
    assert steps(folder) == ["step_00000001"]
    assert not list(folder.glob(".step_*"))


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_alive(small_disk: Path) -> None:
    save(small_disk, 1)
    reports: list[Saved] = []
    one = saver(small_disk, reports)
    one.save(2, fragments(2.0, numel=200_000), {})
    one.wait()
    assert "needs 2.4 MB" in str(reports[0].error)
    assert value(newest_checkpoint(small_disk)) == 1.0
    one.save(3, fragments(3.0), {})
    one.wait()
    assert reports[1].error is None and value(newest_checkpoint(small_disk)) == 3.0


def test_a_disk_that_fills_during_writing_is_reported_too(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_disk, 1)
    reports: list[Saved] = []
    one = saver(small_disk, reports)
    monkeypatch.setattr(pending.PendingCheckpoint, "check_space", lambda self, own_bytes: None)
    one.save(2, fragments(2.0, numel=200_000), {})
    one.wait()
    assert "No space left" in str(reports[0].error)
    assert value(newest_checkpoint(small_disk)) == 1.0
    assert not list(small_disk.glob(".step_*"))


def test_an_unexpected_error_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("something new")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    reports: list[Saved] = []
    one = saver(folder, reports)
    one.save(1, fragments(1.0), {})
    one.wait()
    assert [(r.path, r.error) for r in reports] == [(None, "something new")]


def test_a_rank_that_cannot_write_is_named_and_nothing_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_write = safetensors.torch.save_file, pipeline.files.write_bytes

    def second_writes_nothing(path: Path, content: bytes) -> None:
        if path.name.startswith("rank_00001"):
            raise OSError(30, "Read-only file system")
        real_write(path, content)

    def second_fails(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name.startswith("rank_00001"):
            raise OSError(5, "Input/output error")
        real(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", second_fails)
    monkeypatch.setattr(pipeline.files, "write_bytes", second_writes_nothing)
    reports: list[Saved] = []
    both = [saver(folder, reports, rank, 2) for rank in range(2)]
    for rank, one in enumerate(both):
        one.save(1, fragments(1.0, rank, 2), {})
    for one in both:
        one.wait()
    assert [r.error for r in reports] == [f"rank 1 on {socket.gethostname()}: Input/output error"]
    assert steps(folder) == []


def test_a_rank_whose_file_does_not_arrive_in_time_is_named(folder: Path) -> None:
    reports: list[Saved] = []
    one = saver(folder, reports, 0, 2, timeout_min=0.002)
    one.save(1, fragments(1.0, 0, 2), {})
    one.wait()
    assert "rank_00001.safetensors did not arrive" in str(reports[0].error)
    assert steps(folder) == []


def test_two_ranks_write_one_checkpoint(folder: Path) -> None:
    both = [saver(folder, [], rank, 2) for rank in range(2)]
    for rank, one in enumerate(both):
        one.save(1, fragments(4.0, rank, 2), {})
    for one in both:
        one.wait()
    assert sorted(verify(newest_checkpoint(folder)).files) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert CheckpointReader(newest_checkpoint(folder)).read_whole("exp_avg", "layer.weight").shape == (NUMEL,)


def test_a_superseded_start_cannot_publish(folder: Path, gate: threading.Event) -> None:
    reports: list[Saved] = []
    old = saver(folder, reports)
    old.save(1, fragments(1.0), {})
    old.wait_for_copy()
    take_over(folder, "a2")
    gate.set()
    old.wait()
    assert reports[0].path is None and reports[0].error
    assert steps(folder) == []
    save(folder, 1, start_id="a2")
    with pytest.raises(CheckpointError, match="taken over"):
        old.save(2, fragments(2.0), {})
    assert len(reports) == 1
    assert steps(folder) == ["step_00000001"]


def test_a_busy_saver_waits_by_default(folder: Path, gate: threading.Event) -> None:
    reports: list[Saved] = []
    one = saver(folder, reports)
    one.save(1, fragments(1.0), {})
    threading.Timer(0.05, gate.set).start()
    one.save(2, fragments(2.0), {})
    one.wait_for_copy()
    one.wait()
    assert [(r.step, r.error) for r in reports] == [(1, None), (2, None)]


def test_a_busy_saver_skips_if_the_config_says_so(folder: Path, gate: threading.Event) -> None:
    reports: list[Saved] = []
    one = saver(folder, reports, if_busy="skip")
    one.save(1, fragments(1.0), {})
    one.wait_for_copy()
    one.save(2, fragments(2.0), {})
    one.wait_for_copy()
    gate.set()
    one.wait()
    assert steps(folder) == ["step_00000001"]
    assert (reports[0].step, reports[0].path) == (2, None) and "skipped" in str(reports[0].error)


def test_the_save_before_a_stop_is_never_skipped(folder: Path, gate: threading.Event) -> None:
    reports: list[Saved] = []
    one = saver(folder, reports, if_busy="skip")
    one.save(1, fragments(1.0), {})
    one.wait_for_copy()
    one.save(2, fragments(2.0), {})
    gate.set()
    one.wait()  # no wait_for_copy in between: weights did not change
    assert steps(folder) == ["step_00000002", "step_00000001"]
    assert [r.error for r in reports] == [None, None]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_parts_of_a_checkpoint_have_the_mode_that_the_umask_says(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(folder, 1)
    finally:
        os.umask(before)
    (step,) = steps(folder)
    checkpoint = folder / step
    assert checkpoint.stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {file.name: file.stat().st_mode & 0o777 for file in checkpoint.iterdir()}
    assert len(modes) == 2 and set(modes.values()) == {0o666 & ~umask}, modes
