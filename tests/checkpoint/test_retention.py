"""What stays of a run's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import retention
from pipeline.checkpoint.draft import begin_attempt
from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.write import Saved
from tests.checkpoint.support import fragments, save, saver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin_attempt(tmp_path, "a1")
    return tmp_path


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in reversed(published(folder))]


def test_the_newest_and_every_kth_stay(folder: Path) -> None:
    for step in range(1, 8):
        save(folder, step, keep_last=2, keep_every=3)
    assert steps(folder) == [3, 6, 7]


def test_the_best_by_validation_loss_stays(folder: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        save(folder, step, loss, keep_last=1)
    assert steps(folder) == [2, 5]


def test_a_loss_that_is_no_number_is_never_the_best(folder: Path) -> None:
    for step, loss in enumerate([2.0, float("nan"), float("nan"), 3.0], start=1):
        save(folder, step, loss, keep_last=1)
    assert steps(folder) == [1, 4]


def test_without_keep_best_the_best_goes_too(folder: Path) -> None:
    for step, loss in enumerate([1.0, 2.0], start=1):
        save(folder, step, loss, keep_last=1, keep_best=False)
    assert steps(folder) == [2]


def test_nothing_is_deleted_while_the_newer_one_is_not_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1, keep_last=1)
    reports: list[Saved] = []
    one = saver(folder, reports, rank=0, world_size=2, keep_last=1, timeout_min=0.001)
    one.save(2, fragments(2.0, 0, 2), {})
    one.wait()
    assert reports[0].error and steps(folder) == [1]


def test_a_deletion_cut_short_leaves_nothing_that_looks_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 1)
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *args, **kwargs: None)
    save(folder, 2, keep_last=1)
    assert steps(folder) == [2]
    monkeypatch.undo()
    begin_attempt(folder, "a2")
    assert not list(folder.glob(".step_*"))


def test_a_deletion_that_fails_does_not_fail_the_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if str(target).endswith(".removed.tmp"):
            raise PermissionError(13, "not yours")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(folder, 2, keep_last=1)
    assert steps(folder) == [1, 2]
    assert shutil.disk_usage(folder).free
