"""A run that an earlier version created opens with the keys it does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.run.events import RolledBack, append
from pipeline.run.folder import CHECKPOINT_MANIFEST, create_run, open_run, step_name
from tests.experiment import write_experiment

ADDED = (
    "num_kv_heads",
    "head_dim",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_eps",
    "rope_scaling",
    "document_mask",
)


def test_a_run_without_the_keys_of_later_versions_opens_and_another_value_of_theirs_is_refused(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, tmp_path / "runs", "old")
    run = create_run(load_config(file))
    tree = yaml.safe_load(run.config_file.read_text())
    for key in ADDED:
        del tree["model"][key]
    del tree["data"]["phases"], tree["data"]["packing"]
    tree.pop("init", None)
    run.config_file.write_text(yaml.safe_dump(tree))
    assert create_run(load_config(file)).config() == load_config(file)
    with pytest.raises(UsageError, match="num_kv_heads"):
        create_run(load_config(file, ["model.num_kv_heads=1"]))


def _phases(*phases: tuple[int, dict[str, float]]) -> str:
    return f"data.phases={json.dumps([{'from_step': step, 'weights': weights} for step, weights in phases])}"


FIRST = (0, {"train": 1.0})


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ([FIRST], [FIRST, (20, {"more": 1.0})], True),
        ([FIRST, (20, {"more": 1.0})], [FIRST, (21, {"train": 2.0, "more": 1.0})], True),
        ([FIRST, (20, {"more": 1.0})], [FIRST], True),
        ([FIRST, (19, {"more": 1.0})], [FIRST], False),
        ([FIRST], [FIRST, (19, {"more": 1.0})], False),
        ([FIRST], [(0, {"train": 1.0, "more": 1.0})], False),
        ([], [FIRST], False),
        ([FIRST], [], False),
    ],
)
def test_phases_ahead_of_the_newest_checkpoint_may_change_and_the_past_may_not(
    tmp_path: Path, before: list[Any], after: list[Any], allowed: bool
) -> None:
    """The newest checkpoint is of step 17, and three batches were skipped: 20 have been drawn."""
    file = write_experiment(tmp_path, tmp_path / "runs", "phased")
    tree = yaml.safe_load(file.read_text())
    tree["data"]["sources"].append({**tree["data"]["sources"][0], "name": "more"})
    file.write_text(yaml.safe_dump(tree))
    run = create_run(load_config(file, [_phases(*before)] if before else []))
    asked = load_config(file, [_phases(*after)] if after else [])
    assert create_run(asked).config() == asked, "nothing is past before the first checkpoint"
    create_run(load_config(file, [_phases(*before)] if before else []))
    for step in (9, 17):
        (run.checkpoints / step_name(step)).mkdir()
    append(run.events_file, RolledBack(step=12, to=9, skipped=[9, 10, 11]))
    if allowed:
        assert create_run(asked).config() == asked
    else:
        with pytest.raises(UsageError, match="before step 20"):
            create_run(asked)
        assert run.config() != asked


def test_the_weights_of_a_weighted_run_are_its_past(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, tmp_path / "runs", "weighted", **{"data.mixing": "weighted"})
    run = create_run(load_config(file))
    (run.checkpoints / step_name(5)).mkdir()
    create_run(load_config(file, [_phases(FIRST, (5, {"train": 2.0}))]))
    with pytest.raises(UsageError, match="before step 5"):
        create_run(load_config(file, ["data.sources.0.weight=2"]))


COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup_iters": 2}
WSD = {"optimizer.schedule": "wsd", "optimizer.decay_iters": 10, "optimizer.warmup_iters": 2}
CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup_iters": 2}


def _given(settings: dict[str, Any], steps: int) -> list[str]:
    given = {"optimizer.cosine_cycle_iters": "null", "train.max_iters": steps, **settings}
    return [f"{key}={value}" for key, value in given.items()]


@pytest.mark.parametrize(
    ("before", "after", "differs_from"),
    [
        ((CONSTANT, 30), (CONSTANT, 60), None),
        ((CONSTANT, 30), (WSD, 30), None),
        ((CONSTANT, 30), (WSD, 29), 20),
        ((WSD, 30), (WSD, 40), None),
        ((WSD, 29), (WSD, 40), 20),
        ((WSD, 30), ({**WSD, "optimizer.min_learning_rate": 1e-5}, 30), None),
        ((COSINE, 30), (COSINE, 40), 3),
        ((COSINE, 30), ({**COSINE, "optimizer.cosine_cycle_iters": 30}, 40), None),
        ((COSINE, 30), (CONSTANT, 30), 3),
    ],
)
def test_a_schedule_may_change_from_the_newest_checkpoint_on_and_not_before(
    tmp_path: Path, before: tuple[Any, int], after: tuple[Any, int], differs_from: int | None
) -> None:
    """The newest checkpoint is of step 21: the steps 0 to 20 have been taken."""
    file = write_experiment(tmp_path, tmp_path / "runs", "scheduled")
    run = create_run(load_config(file, _given(*before)))
    (run.checkpoints / step_name(21)).mkdir()
    asked = load_config(file, _given(*after))
    if differs_from is None:
        assert create_run(asked).config() == asked
    else:
        with pytest.raises(UsageError, match=f"step {differs_from} "):
            create_run(asked)
        assert run.config() != asked


def test_without_its_config_a_run_is_known_by_its_newest_checkpoint(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, tmp_path / "runs", "lost")
    run = create_run(load_config(file))
    manifest = run.checkpoints / step_name(7) / CHECKPOINT_MANIFEST
    manifest.parent.mkdir()
    write_json(manifest, {"state": {"config": load_config(file).model_dump(mode="json")}})
    run.config_file.unlink()
    with pytest.raises(UsageError, match=r"train\.seed: 1337 in the run, 7 asked for"):
        create_run(load_config(file, ["train.seed=7"]))
    longer = load_config(file, ["train.log_interval=3"])
    assert create_run(longer).config() == longer
    run.config_file.unlink()
    newer = run.checkpoints / step_name(8) / CHECKPOINT_MANIFEST
    newer.parent.mkdir()
    for damaged in ({}, [], {"state": {}}, {"state": {"config": {}}}):
        write_json(newer, damaged)
        with pytest.raises(UsageError, match=r"train\.seed: 1337 in the run, 7 asked for"):
            create_run(load_config(file, ["train.seed=7"]))
    write_json(manifest, {})
    with pytest.raises(UsageError, match=rf"{run.config_file}: is missing, and no checkpoint tells"):
        create_run(longer)


def test_a_run_whose_checkpoints_are_elsewhere_by_a_link_is_known_by_them_too(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, tmp_path / "runs", "linked")
    run = create_run(load_config(file))
    run.checkpoints.rmdir()
    (tmp_path / "scratch" / step_name(7)).mkdir(parents=True)
    run.checkpoints.symlink_to(tmp_path / "scratch")
    config = load_config(file).model_dump(mode="json")
    write_json(run.checkpoints / step_name(7) / CHECKPOINT_MANIFEST, {"state": {"config": config}})
    run.config_file.unlink()
    with pytest.raises(UsageError, match=r"train\.seed"):
        create_run(load_config(file, ["train.seed=7"]))
    assert create_run(load_config(file)).config() == load_config(file)


def test_a_run_is_named_by_its_folder_its_name_or_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_experiment(tmp_path, Path("runs"), "mine")
    with pytest.raises(UsageError, match=r"its run, runs/mine, does not exist yet; `pipeline train"):
        open_run(file)
    run = create_run(load_config(file))
    Path("mine").mkdir()
    for named in ("runs/mine", str(run.path.absolute()), "mine", str(file), "runs/mine/config.yaml"):
        assert open_run(named).path.absolute() == run.path.absolute()
    for named in ("other", "runs/other"):
        with pytest.raises(UsageError, match=r"is not a run folder \(it has no config.yaml\); runs there: runs/mine"):
            open_run(named)
