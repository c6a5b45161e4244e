"""A start resumes from the newest whole checkpoint, the same on all ranks, and says what it quarantined."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import UnreadableCheckpoint, published
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.checkpoint.saver import Saved
from pipeline.run.world import World
from pipeline.train.recover import Recovery, find_checkpoint, quarantine
from tests import processes
from tests.checkpoint.support import fragments, saver


def found(world: World, checkpoints: str) -> tuple[str | None, tuple[str, ...]]:
    """Which checkpoint this rank would load, and what was wrong with the newer ones."""
    recovery = find_checkpoint(Path(checkpoints), world)
    return recovery.checkpoint.name if recovery.checkpoint else None, recovery.rejected


def flip_bit(newest: Path) -> None:
    file = newest / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def truncate(newest: Path) -> None:
    file = newest / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def tear_manifest(newest: Path) -> None:
    file = newest / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks each."""
    take_over(tmp_path, "a1")
    reports: list[Saved] = []
    savers = [saver(tmp_path, reports, rank, 2) for rank in range(2)]
    for step in (1, 2):
        for rank, one in enumerate(savers):
            one.save(step, fragments(float(step), rank, 2), {})
        for one in savers:
            one.wait()
    assert [r.error for r in reports] == [None, None]
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken(checkpoints: Path) -> None:
    answers = processes.on_ranks(found, 2, checkpoints / "log", str(checkpoints))
    assert answers == [("step_00000002", ())] * 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_bit, "rank_00001.safetensors: is damaged"),
        (truncate, "rank_00000.safetensors: is torn"),
        (tear_manifest, "manifest.json: is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_quarantined_and_all_ranks_take_the_one_before(
    checkpoints: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Only one rank checks each file, and the other must hear of it."""
    damage(published(checkpoints)[0])
    first, second = processes.on_ranks(found, 2, checkpoints / "log", str(checkpoints))
    assert first == second
    assert first[0] == "step_00000001" and len(first[1]) == 1 and words in first[1][0]
    assert [f.name for f in published(checkpoints)] == ["step_00000001"]
    assert (checkpoints / "step_00000002.rejected").is_dir()


def test_with_all_damaged_training_starts_afresh_and_each_is_named(checkpoints: Path) -> None:
    for folder in published(checkpoints):
        truncate(folder)
    checkpoint, rejected = processes.on_ranks(found, 1, checkpoints / "log", str(checkpoints))[0]
    assert checkpoint is None
    assert ["step_00000002" in rejected[0], "step_00000001" in rejected[1]] == [True, True]


# ---- alone, in this process ------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip_bit, truncate, tear_manifest])
def test_alone_a_rank_checks_the_files_of_all_ranks(checkpoints: Path, damage: Callable[[Path], None]) -> None:
    newest, older = published(checkpoints)
    damage(newest)
    recovery = find_checkpoint(checkpoints, World())
    assert recovery.checkpoint == older
    assert [newest.name in problem for problem in recovery.rejected] == [True]


@pytest.mark.parametrize("reason", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_the_storage_does_not_give_out_is_neither_quarantined_nor_passed_over(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def no_answer(path: Path, *_: object) -> bytes:
        raise OSError(reason, os.strerror(reason), str(path))

    before = published(checkpoints)
    monkeypatch.setattr("pipeline.checkpoint.layout.read_bounded", no_answer)
    with pytest.raises(UnreadableCheckpoint, match=os.strerror(reason)):
        find_checkpoint(checkpoints, World())
    with pytest.raises(UnreadableCheckpoint):
        newest_checkpoint(checkpoints)
    assert published(checkpoints) == before


def test_a_run_without_checkpoints_starts_afresh(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, World()) == Recovery(None, ())


def test_a_step_that_is_quarantined_twice_keeps_the_newer_folder(checkpoints: Path) -> None:
    older = checkpoints / "step_00000002.rejected"
    older.mkdir()
    (older / "note").touch()
    quarantine(checkpoints / "step_00000002")
    assert not (older / "note").exists() and (older / "manifest.json").exists()
    assert [f.name for f in published(checkpoints)] == ["step_00000001"]
