"""Damage is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands.verify import verify_path
from pipeline.errors import DataError, PipelineError, UsageError
from pipeline.run.folder import Run
from tests.checkpoint.support import flip_a_bit, two_checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_checkpoints(tmp_path)


def test_a_checkpoint_is_verified_and_a_folder_that_is_nothing_is_refused(folder: Path) -> None:
    assert "all files of the checkpoint match its manifest (1)" in verify_path(str(folder / "step_00000001"))
    with pytest.raises(UsageError, match="neither"):
        verify_path(str(folder))


def test_a_dataset_is_verified_and_an_unfinished_one_is_not_taken_for_a_checkpoint(run: Run, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    assert "all 5 files" in verify_path(str(tokens))
    (tokens / "manifest.json").unlink()
    with pytest.raises(DataError, match="manifest"):
        verify_path(str(tokens))


def test_a_run_is_verified_with_its_checkpoints_oldest_first_and_its_dataset(
    run: Run, save: Callable[..., None]
) -> None:
    assert "no checkpoint" in verify_path(str(run.path)).splitlines()[0]
    save(1), save(2)
    lines = verify_path(str(run.path)).splitlines()
    assert [Path(line.partition(":")[0]).name for line in lines] == ["step_00000001", "step_00000002", "tokens"]


def test_damage_in_a_run_hides_nothing_of_the_rest(run: Run, save: Callable[..., None], tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(step)
    flip_a_bit(run.checkpoints / "step_00000002" / "rank_00000.safetensors")
    shard = next(tmp_path.glob("tokens/slices/*/train.bin"))
    flip_a_bit(shard)
    with pytest.raises(PipelineError) as caught:
        verify_path(str(run.path))
    title, *rest = str(caught.value).splitlines()
    assert title.startswith(f"{run.path}: 2 ")
    assert "step_00000002" in rest[0] and str(shard) in "".join(rest[1:])
    assert {"step_00000001: all", "step_00000003: all"} <= {line.rpartition("/")[2][:18] for line in rest}


def test_a_checkpoint_of_another_dataset_is_named(run: Run, save: Callable[..., None], tmp_path: Path) -> None:
    save(1, dataset="0" * 64), save(2)
    with pytest.raises(PipelineError, match="step_00000001: .* 000000000000") as caught:
        verify_path(str(run.path))
    assert "step_00000002: was" not in str(caught.value)
    (tmp_path / "tokens" / "manifest.json").unlink()
    with pytest.raises(PipelineError) as caught:
        verify_path(str(run.path))
    assert "was trained on" not in str(caught.value), "without a manifest there is nothing to compare"


def test_a_missing_dataset_is_not_called_damaged_and_its_place_is_named(
    run: Run, save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    tree = run.config_file.read_text().replace(str(tmp_path / "tokens"), "tokens")
    run.config_file.write_text(tree)
    monkeypatch.chdir(tmp_path)
    assert "tokens" in verify_path(str(run.path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(PipelineError) as caught:
        verify_path(str(run.path))
    assert str(elsewhere / "tokens") in str(caught.value) and "damaged" not in str(caught.value)
    assert "step_00000001" in str(caught.value)
