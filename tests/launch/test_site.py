"""Site files: every mistake is reported at once, with its path and its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError, UsageError
from pipeline.launch.site import Site, load_site, parse_site
from tests.launch.support import ROOT, SITE


def problems(**changes: Any) -> dict[str, str]:
    """What is wrong with the smallest site with these changes: messages by path."""
    with pytest.raises(ConfigError) as caught:
        parse_site(yaml.safe_dump({**SITE, **changes}))
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("path", sorted((ROOT / "slurm/sites").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_site_is_valid(path: Path) -> None:
    assert isinstance(load_site(path), Site)


def test_one_mistake_in_every_section_is_reported_in_one_message_with_every_broken_rule() -> None:
    found = problems(
        name="a/b",
        acount="me",
        gpu_request="all",
        prepare={"slices": 0},
        train={"nodes": 0, "gpus_per_node": 4, "tasks_per_node": 2},
        evaluate={"mem_gb": -1},
        environment={"A B": "1", "PYTHONPATH": "/mine", "NUMBER": 3},
        extra_sbatch={"time": "60", "licenses": 3},
        container={"gpu": "any"},
        requeue={"max_restart": 1},
    )
    assert {path.removesuffix(".str").removesuffix(".bool") for path in found} == {
        "name", "acount", "gpu_request", "prepare.slices", "train.nodes", "train.tasks_per_node", "evaluate.mem_gb",
        "environment.A B", "environment.PYTHONPATH", "environment.NUMBER", "extra_sbatch.time",
        "extra_sbatch.licenses", "container.gpu", "requeue.max_restart",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"acount": "me"}, "acount", "did you mean `account`"),
        ({"train": {"node": 2}}, "train.node", "did you mean `nodes`"),
        ({"train": {"gpus_per_node": 4}}, "train.tasks_per_node", "gpus_per_node = 4"),
        ({"environment": {"A B": "1"}}, "environment.A B", "valid name"),
        ({"environment": {"PYTHONPATH": "/mine"}}, "environment.PYTHONPATH", "other names"),
        ({"environment": {"PYTHONSAFEPATH": ""}}, "environment.PYTHONSAFEPATH", "other names"),
        ({"extra_sbatch": {"time": "60"}}, "extra_sbatch.time", "time_limit_min"),
        ({"extra_sbatch": {"cpus_per_task": "99"}}, "extra_sbatch.cpus_per_task", "cpus_per_task"),
        ({"extra_sbatch": {"open_mode": "truncate"}}, "extra_sbatch.open_mode", "the launcher"),
        ({"extra_sbatch": {"--exclusive": True}}, "extra_sbatch.--exclusive", "without leading dashes"),
        ({"extra_sbatch": {"exclusive": False}}, "extra_sbatch.exclusive", "given false"),
        ({"signal_before_end_s": 9}, "signal_before_end_s", "given 9"),
    ],
)
def test_a_mistake_is_reported_with_its_path_and_what_is_allowed(changes: Any, path: str, words: str) -> None:
    found = problems(**changes)
    assert set(found) == {path}
    assert words in found[path]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"gpus_per_node": 4, "tasks_per_node": 4}},
        {"train": {"gpus_per_node": 0, "tasks_per_node": 4}},
        {"environment": {"_A1": "x"}, "extra_sbatch": {"exclusive": True, "licenses": "scratch:1"}},
        {"signal_before_end_s": 10},
    ],
)
def test_what_no_rule_forbids_is_allowed(changes: Any) -> None:
    assert parse_site(yaml.safe_dump({**SITE, **changes}))


def test_no_further_option_of_sbatch_may_contradict_the_launcher() -> None:
    names = (
        "ntasks",
        "gpus",
        "gpus_per_task",
        "mem-per-cpu",
        "mem-per-gpu",
        "kill-on-invalid-dep",
        "parsable",
        "quiet",
    )
    found = problems(extra_sbatch=dict.fromkeys(names, "1"))
    assert set(found) == {f"extra_sbatch.{name}" for name in names}
    assert all('given "1"' in message and "decided by" in message for message in found.values())


def test_a_missing_site_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml.*No such file"):
        load_site(tmp_path / "none.yaml")


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize(
    "field",
    ["account", "qos", "constraint", "gpu_type", "scratch", "python", "modules", "environment", "extra_sbatch",
     "train.partition", "container.command", "container.binds", "container.options"],
)  # fmt: skip
def test_a_control_character_in_a_field_of_a_site_is_refused(field, character):
    text = f"a{character}#SBATCH --uid=0"
    value: object = {"modules": [text], "container.binds": [text], "container.options": [text]}.get(field, text)
    if field in ("environment", "extra_sbatch"):
        value = {"A": text}
    section, _, key = field.rpartition(".")
    tree = {"name": "s", "train": {}, "container": {}}
    (tree[section] if section else tree)[key] = value
    with pytest.raises(ConfigError) as caught:
        parse_site(json.dumps(tree))
    assert {problem.path.removesuffix(".0").removesuffix(".A") for problem in caught.value.problems} == {field}


def test_setup_may_hold_several_lines_but_no_other_control_character():
    assert parse_site('{name: s, train: {}, setup: ["a\\nb\\tc"]}').setup == ("a\nb\tc",)
    with pytest.raises(ConfigError):
        parse_site('{name: s, train: {}, setup: ["a\\0b"]}')
