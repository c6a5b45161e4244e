"""`pipeline check` finds tasks that a job could not evaluate: an unknown name, data that is not in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.check.tasks import check_tasks
from tests.evaluate.conftest import CHOICE, write_task


def section(folder: Path, *tasks: str) -> dict:
    return {"tasks": list(tasks), "num_fewshot": None, "include_path": str(folder)}


def test_tasks_are_loaded_and_what_is_missing_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    write_task(folder, "mine", CHOICE, [{"question": "war", "choices": ["a", "b"], "answer": 1}])
    (folder / "far.yaml").write_text("task: far\ndataset_path: owner/name\ntest_split: test\n")
    found = check_tasks(section(folder, "mine"))
    assert found.status == "ok" and found.found == f"1 task, their data is in {tmp_path}/cache"
    found = check_tasks(section(folder, "mine", "far"))
    assert found.status == "failed" and "far: " in found.found and "--fetch --tasks mine,far" in found.cure
    found = check_tasks(section(folder, "mine") | {"num_fewshot": 3})
    assert found.status == "failed" and "task mine: its prompts cannot be made, 3-shot" in found.found
    (folder / "mine.yaml").write_text("task: mine\nprocess_docs: !function utils.code\n")
    found = check_tasks(section(folder, "mine"))
    assert found.status == "failed" and "!function" in found.found


def test_the_section_reaches_the_process_that_checks_a_node(tmp_path: Path):
    from pipeline.check.check import _node_command
    from pipeline.config.load import load_config
    from tests.launch.support import write_files

    write_files(tmp_path)
    plain = _node_command(load_config(tmp_path / "config.yaml"))
    asked = _node_command(load_config(tmp_path / "config.yaml", ["evaluate.tasks=[arc_easy]"]))
    assert asked[:-1] == plain
    assert json.loads(asked[-1].removeprefix("--evaluate="))["tasks"] == ["arc_easy"]
