"""The evaluation after training does the tasks of the config, and is skipped only when they are done."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.files import write_json, write_text
from pipeline.launch.submit.chain import evaluation_commands, is_evaluated
from pipeline.run.evaluations import evaluation_file
from pipeline.run.folder import create_run
from tests.launch.support import write_files

TASKS = ("evaluate.tasks=[arc_easy,piqa]", "evaluate.limit=7")


def test_the_commands_name_the_tasks_between_the_validation_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = "runs/tiny"
    plain = evaluation_commands(load_config("config.yaml"))
    assert plain == (("evaluate", run), ("report", run))
    tasks = ("evaluate", run, "--tasks", "arc_easy,piqa", "--limit", "7")
    assert evaluation_commands(load_config("config.yaml", TASKS)) == (("evaluate", run), tasks, ("report", run))
    every = load_config("config.yaml", (*TASKS, "evaluate.every_checkpoint=true"))
    assert evaluation_commands(every)[1] == (*tasks, "--every-checkpoint")


def test_it_is_done_when_the_last_step_has_the_results_of_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_config("config.yaml", TASKS)
    run = create_run(config)
    write_json(run.evaluation_file, {"step": 100, "loss": 1.0, "perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 5})
    write_text(run.report_file, "")
    assert is_evaluated(load_config("config.yaml")) and not is_evaluated(config)
    for name in config.evaluate.tasks:
        write_json(evaluation_file(run, 100, name, None, 7), {})
    assert is_evaluated(config)
    assert not is_evaluated(load_config("config.yaml", (*TASKS, "evaluate.num_fewshot=1")))
