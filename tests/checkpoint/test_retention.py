"""Which of a run's checkpoints are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.saver import Saved
from tests.checkpoint.support import fragments, save, saver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    take_over(tmp_path, "a1")
    return tmp_path


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in reversed(published(folder))]


def test_the_newest_and_every_kth_are_kept(folder: Path) -> None:
    for step in range(1, 8):
        save(folder, step, keep_last=2, keep_every=3)
    assert steps(folder) == [3, 6, 7]


def test_the_best_by_validation_loss_is_kept(folder: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        save(folder, step, loss, keep_last=1)
    assert steps(folder) == [2, 5]


def test_a_loss_that_is_not_a_number_is_never_the_best(folder: Path) -> None:
    for step, loss in enumerate([2.0, float("nan"), float("nan"), 3.0], start=1):
        save(folder, step, loss, keep_last=1)
    assert steps(folder) == [1, 4]


def test_without_keep_best_the_best_is_deleted_too(folder: Path) -> None:
    for step, loss in enumerate([1.0, 2.0], start=1):
        save(folder, step, loss, keep_last=1, keep_best=False)
    assert steps(folder) == [2]


def test_nothing_is_deleted_until_the_newer_checkpoint_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1, keep_last=1)
    reports: list[Saved] = []
    one = saver(folder, reports, rank=0, world_size=2, keep_last=1, timeout_min=0.001)
    one.save(2, fragments(2.0, 0, 2), {})
    one.wait()
    assert reports[0].error and steps(folder) == [1]


def test_an_interrupted_deletion_leaves_nothing_that_looks_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    save(folder, 2, keep_last=1)
    assert steps(folder) == [2]
    monkeypatch.undo()
    take_over(folder, "a2")
    assert not list(folder.glob(".step_*"))


def test_a_failed_deletion_is_retried_after_the_next_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        save(folder, 2, keep_last=1)
    assert list(folder.glob(".step_*"))
    save(folder, 3, keep_last=2)
    assert steps(folder) == [2, 3]
    assert not list(folder.glob(".step_*"))


def test_a_checkpoint_that_a_rollback_can_start_from_is_kept(folder: Path) -> None:
    one = saver(folder, [], rollback_steps=2, keep_last=1, keep_best=False)
    kept = []
    for step in (10, 20, 21, 22, 30):
        one.save(step, fragments(float(step)), {})
        one.wait()
        kept.append(steps(folder))
    assert kept == [[10], [10, 20], [10, 20, 21], [20, 21, 22], [22, 30]]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_checkpoint_of_a_stop_takes_the_place_of_none_that_a_rollback_would_find_without_it(
    folder: Path, keep_last: int
) -> None:
    def kept(*saved: int) -> list[int]:
        own = folder / "-".join(map(str, saved))
        own.mkdir(exist_ok=True)
        take_over(own, "a1")
        one = saver(own, [], rollback_steps=2, interval=10, keep_last=keep_last)
        for step in saved:
            one.save(step, fragments(float(step)), {})
            one.wait()
        return steps(own)

    for stops in ((), (31,), (31, 32), (33, 35, 39)):
        undisturbed, disturbed = kept(10, 20, 30), kept(10, 20, 30, *stops)
        assert set(undisturbed) <= set(disturbed), stops
        assert set(kept(10, 20, 30, 40)) <= set(kept(10, 20, 30, *stops, 40)), stops


def test_a_manifest_of_an_earlier_start_is_read_once_and_one_of_this_start_never(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(folder, step, val_loss=float(step), keep_every=1)
    read: list[int | None] = []
    real = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda path: read.append(step_of(path)) or real(path))
    one = saver(folder, [], keep_last=1, keep_every=3)
    for step, loss in enumerate([5.0, 4.0, 3.0], start=3):
        one.save(step, fragments(float(step)), {"val_loss": loss})
        one.wait()
    assert sorted(map(str, read)) == ["1", "2"]
    assert steps(folder) == [1, 3, 5], "the best of an earlier start counts"


def test_a_step_saved_again_after_a_rollback_counts_with_its_new_loss(folder: Path) -> None:
    one = saver(folder, [], keep_last=1)
    for step, loss in ((1, 1.0), (2, 3.0), (1, 2.5), (3, 2.0), (4, 4.0)):
        one.save(step, fragments(float(step)), {"val_loss": loss})
        one.wait()
    assert steps(folder) == [3, 4]


def test_a_failed_deletion_does_not_fail_the_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if str(target).endswith(".removed.tmp"):
            raise PermissionError(13, "not yours")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(folder, 2, keep_last=1)
    assert steps(folder) == [1, 2]
