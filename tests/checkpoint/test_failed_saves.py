"""Saves that fail, are late or die: training hears of it, on all ranks, and ends where the config says so."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.checkpoint import pending
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.saver import Saved
from pipeline.errors import CheckpointError
from pipeline.run.world import World
from pipeline.train.ranks import group
from tests import processes
from tests.checkpoint.support import fragments, save, saver, steps


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_after_a_failed_save_the_run_continues_or_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    save(folder, 1)
    reports: list[Saved] = []
    one = saver(folder, reports, on_failure=policy)
    with monkeypatch.context() as patched:
        patched.setattr(pending, "publish_dir", lambda temp, final: (_ for _ in ()).throw(OSError(28, "No space left")))
        one.save(2, fragments(2.0), {})
        one.wait()
    assert reports[0].error and steps(folder) == ["step_00000001"]
    if policy == "stop":
        with pytest.raises(CheckpointError, match=r"on_failure.*No space left"):
            one.save(3, fragments(3.0), {})
    else:
        one.save(3, fragments(3.0), {})
        one.wait()
        assert steps(folder)[0] == "step_00000003"


def test_failed_saves_in_a_row_end_the_run_and_a_good_one_starts_the_count_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(folder, [], max_failures=2)

    def fails(step: int) -> None:
        with monkeypatch.context() as patched:
            broken = OSError(28, "No space left")
            patched.setattr(pending, "publish_dir", lambda temp, final: (_ for _ in ()).throw(broken))
            one.save(step, fragments(float(step)), {})
            one.wait()

    fails(1)
    one.save(2, fragments(2.0), {})
    one.wait()
    fails(3)
    fails(4)
    with pytest.raises(CheckpointError, match=r"max_failures.*No space left"):
        one.save(5, fragments(5.0), {})
    assert steps(folder) == ["step_00000002"]


def test_a_save_that_does_not_end_counts_as_failed_when_saves_are_skipped(folder: Path, gate: threading.Event) -> None:
    one = saver(folder, [], if_busy="skip", max_failures=2, timeout_min=0.0001)
    one.save(1, fragments(1.0), {})
    one.wait_for_copy()
    time.sleep(0.01)
    one.save(2, fragments(2.0), {})
    one.wait_for_copy()
    with pytest.raises(CheckpointError, match="max_failures"):
        one.save(3, fragments(3.0), {})


def test_a_late_rank_that_then_saves_in_time_starts_its_count_again(folder: Path, gate: threading.Event) -> None:
    one = saver(folder, [], rank=1, world_size=2, if_busy="skip", max_failures=2, timeout_min=0.0001)
    for step in (1, 3):
        one.save(step, fragments(float(step), 1, 2), {})
        one.wait_for_copy()
        time.sleep(0.01)
        one.save(step + 1, fragments(float(step), 1, 2), {})  # finds the one before late
        gate.set()
        one.wait()
        gate.clear()


def save_twice(world: World, folder: str, case: str) -> tuple[str | None, list[str | None]]:
    """Makes two saves with rank 1 late or unable to write; returns the second's error on this rank, and the reports."""
    gate, real, reports = threading.Event(), safetensors.torch.save_file, list[Saved]()

    def held(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if world.rank == 1 and case == "skip":
            gate.wait()
        if world.rank == 1 and case == "stop":
            raise OSError(5, "bad disk")
        real(tensors, path)

    safetensors.torch.save_file = held
    policies = {"if_busy": case if case == "skip" else "wait", "on_failure": "stop"}
    one = saver(Path(folder), reports, world.rank, 2, store=group.store(), **policies)
    one.save(1, fragments(1.0, world.rank, 2), {})
    one.wait_for_copy()
    if case == "stop":
        one.wait()
    raised = None
    try:
        one.save(2, fragments(2.0, world.rank, 2), {})
    except CheckpointError as error:
        raised = str(error)
    one.wait_for_copy()
    gate.set()
    one.wait()
    group.barrier(world)
    return raised, [report.error for report in reports]


def test_all_ranks_skip_a_save_when_one_is_late(folder: Path) -> None:
    first, second = processes.on_ranks(save_twice, 2, folder / "log", str(folder), "skip")
    assert first[0] is second[0] is None
    assert "skipped" in str(first[1][0]) and first[1][1] is None, "the second save is reported first, as skipped"
    assert steps(folder) == ["step_00000001"]


def test_all_ranks_end_with_the_error_of_one_that_cannot_write(folder: Path) -> None:
    answers = processes.on_ranks(save_twice, 2, folder / "log", str(folder), "stop")
    assert all("rank 1" in str(raised) and "bad disk" in str(raised) for raised, _ in answers)
    assert steps(folder) == []


@pytest.mark.parametrize("what", ["report", "retention"])
def test_a_saving_thread_that_dies_never_passes_for_a_save(tmp_path: Path, what: str) -> None:
    take_over(tmp_path, "a1")
    reports: list[Saved] = []
    one = saver(tmp_path, reports)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    if what == "report":
        one._report = broken
    else:
        one._retention.remove_old = broken  # type: ignore[method-assign]
    one.save(1, fragments(1.0), {})
    if what == "report":
        with pytest.raises(CheckpointError, match=f"{tmp_path}: .*broken"):
            one.wait()
    else:
        one.wait()
        assert [saved.error for saved in reports] == [None]


def test_a_kept_checkpoint_whose_loss_is_text_disturbs_no_later_save(tmp_path: Path) -> None:
    take_over(tmp_path, "a1")
    save(tmp_path, 1, val_loss="x")  # type: ignore[arg-type]
    save(tmp_path, 2, val_loss=1.0)
    reports: list[Saved] = []
    one = saver(tmp_path, reports)  # a new start reads the losses of earlier checkpoints
    one.save(3, fragments(3.0), {"val_loss": 2.0})
    one.wait()
    assert [saved.error for saved in reports] == [None]
