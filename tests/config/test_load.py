"""Configs: what is read, and that every mistake is reported at once, with its path."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipeline.config.load import dump_config, load_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigError
from tests.config.support import DEMO, ROOT, problems, tree

# One mistake in every section: a value that is wrong by itself, and a rule that is broken beside it where there is one.
MISTAKES: dict[str, dict[str, Any]] = {
    "top level": {"name": "a/b"},
    "unknown key": {"optimizer.weigth_decay": 0.1},
    "data": {"data.dtype": "uint8"},
    "data.sources": {"data.sources.0.paths": []},
    "tokenizer": {"tokenizer.train_sample_mb": 0},
    "model": {"model.context_length": "long"},
    "init": {"init.step": -1},
    "optimizer": {"optimizer.eps": -1},
    "train": {"train.max_iters": 1.5},
    "checkpoint": {"checkpoint.keep_last": 0},
    "guard": {"guard.on_spike": "panic"},
    "tracking": {"tracking.experiment": ""},
    "container": {"container.code": "mine"},
    "sample": {"sample.top_p": 2},
    "evaluate": {"evaluate.limit": 0},
}
BROKEN_RULES: dict[str, dict[str, Any]] = {
    "names of sources": {"data.sources.1.name": "speeches"},
    "path of the tokenizer": {"tokenizer.path": "tokenizer.json"},
    "heads": {"model.d_model": 102},
    "warm-up": {"optimizer.warmup_iters": 5000},
    "learning rates": {"optimizer.min_learning_rate": 1},
    "global batch": {"train.batch_size": 12},
    "offload": {"train.offload_optimizer": True},
    "overlap": {"train.overlap_comm": True},
    "store": {"tracking.uri": "ftp://host"},
    "vocabulary": {"model.vocab_size": 100},
    "deepspeed": {"deepspeed.fp16": {}},
    "tasks": {"evaluate.every_checkpoint": True},
    "what a run takes": {"init.what": "all"},
}


def paths_of(cases: dict[str, dict[str, Any]]) -> set[str]:
    paths = {path for changes in cases.values() for path in changes}
    return {"data.sources" if path == "data.sources.1.name" else path for path in paths}


def changes_of(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {path: value for changes in cases.values() for path, value in changes.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_config_is_valid(path):
    assert isinstance(load_config(path), Config)


def test_the_resolved_config_reads_back_equal():
    config = load_config(DEMO, ["optimizer.betas=[0.8, 0.9]", "deepspeed={zero_optimization: {sub_group_size: 5}}"])
    assert parse_config(dump_config(config)) == config


def test_the_resolved_config_keeps_the_order_of_the_sections_and_stays_readable():
    text = dump_config(load_config(DEMO, ["sample.prompt=é"]))
    assert [line.partition(":")[0] for line in text.splitlines() if line[0].isalpha()] == list(Config.model_fields)
    assert "prompt: é" in text


def test_one_mistake_in_every_section_is_reported_in_one_message():
    sections = {name for name in Config.model_fields if hasattr(Config.model_fields[name].annotation, "model_fields")}
    assert sections <= set(MISTAKES), "a new section needs a mistake here"
    assert set(problems(**changes_of(MISTAKES))) == paths_of(MISTAKES)


def test_every_broken_rule_is_reported_in_one_message():
    assert set(problems(**changes_of(BROKEN_RULES))) == paths_of(BROKEN_RULES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_hides_a_broken_rule(mistake):
    expected = paths_of({mistake: MISTAKES[mistake]}) | paths_of(BROKEN_RULES)
    assert set(problems(**changes_of(BROKEN_RULES), **MISTAKES[mistake])) == expected


@pytest.mark.parametrize("section", ["data", "model", "optimizer", "train", "tokenizer", "tracking"])
def test_a_section_that_is_none_hides_only_its_own_rules(section):
    kept = {name: case for name, case in BROKEN_RULES.items() if not next(iter(case)).startswith(f"{section}.")}
    found = problems(**changes_of(kept), **{section: 3})
    assert found.pop(section).startswith("given 3, allowed: ")
    needs_tokenizer = {"model.vocab_size"} if section == "tokenizer" else set()
    assert set(found) == paths_of(kept) - needs_tokenizer


def test_a_rule_is_silent_about_fields_that_are_wrong_already():
    found = problems(**{"optimizer.cosine_cycle_iters": "never", "optimizer.warmup_iters": 10**9, "name": None})
    assert set(found) == {"optimizer.cosine_cycle_iters", "name"}


def test_the_global_batch_must_be_shared_evenly_by_the_processes():
    changes = {"train.batch_size": 16, "train.micro_batch_size": 4}
    assert parse_config(yaml.safe_dump(tree(**changes)), world_size=4)
    assert "4 x 3 = 12" in problems(world_size=3, **changes)["train.batch_size"]


def test_the_message_counts_the_problems_and_names_the_source():
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(tree(name=3, modle=1)), source="mine.yaml")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("mine.yaml: 2 problems")
    assert [line.partition(":")[0] for line in rest] == ["  name", "  modle"]


def test_the_config_is_frozen():
    config = load_config(DEMO)
    with pytest.raises(Exception, match="frozen"):
        config.train.max_iters = 3


@pytest.mark.parametrize(("world_size", "refused"), [(None, False), (6, True), (8, False)])
def test_the_ranks_of_a_node_divide_the_world_size(world_size: int | None, refused: bool):
    """Commands that train nothing know of no world size."""
    path = "deepspeed.zero_optimization.zero_hpz_partition_size"
    overrides = ["train.batch_size=48", "train.micro_batch_size=1", f"{path}=4"]
    if not refused:
        load_config(DEMO, overrides, world_size=world_size)
        return
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, overrides, world_size=world_size)
    assert [problem.path for problem in error.value.problems] == [path]


@pytest.mark.parametrize(
    ("stage", "micro", "precision", "world_size", "refused"),
    [
        (1, 2, "bf16", 4, True),
        (1, 4, "bf16", 4, False),
        (1, 2, "bf16", None, False),
        (1, 2, "fp32", 4, False),
        (2, 2, "bf16", 4, False),
        (0, 2, "bf16", 4, False),
    ],
)
def test_stage_1_does_not_add_up_micro_batches_in_bf16(
    stage: int, micro: int, precision: str, world_size: int | None, refused: bool
) -> None:
    """DeepSpeed would add them up in bf16 there; commands that train nothing know of no world size."""
    train = {"zero_stage": stage, "micro_batch_size": micro, "batch_size": 16, "precision": precision}
    overrides = [f"train.{key}={value}" for key, value in train.items()]
    if not refused:
        load_config(DEMO, overrides, world_size=world_size)
        return
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, overrides, world_size=world_size)
    (problem,) = error.value.problems
    assert problem.path == "train.zero_stage" and "2" in str(problem)
