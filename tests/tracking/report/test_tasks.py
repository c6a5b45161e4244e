"""The report shows the scores on tasks with their standard errors, of each task that was asked for."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.errors import PipelineError
from pipeline.run.evaluations import evaluation_file
from pipeline.tracking.report.report import write_report
from tests.tracking.report.test_report import recorded, without_script
from tests.tracking.support import task_evaluation, write_task_evaluation


def chart(page: str, number: int) -> list[dict]:
    """The curves of a chart."""
    found = re.search(rf'Plotly\.newPlot\(\s*"tasks-{number}",\s*(\[.*?\]),\s*{{"template"', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_each_task_has_a_chart_with_its_standard_error_and_a_row_of_the_newest_step(tmp_path):
    run = recorded(tmp_path)
    for step, value in ((20, 0.4), (10, 0.3)):
        write_task_evaluation(run, task_evaluation("arc", step, value))
    write_task_evaluation(run, task_evaluation("arc", 20, 0.7, num_fewshot=5, limit=9))
    page = write_report([run]).read_text()
    (curve,) = chart(page, 0)
    assert (curve["x"], curve["y"], curve["error_y"]["array"]) == ([10, 20], [0.3, 0.4], [0.03, 0.04])
    (other,) = chart(page, 1)
    assert (other["x"], other["y"]) == ([20], [0.7])
    own = without_script(page)
    assert "arc: acc" in own and "arc_5shot_limit9: acc" in own and "Higher is better." in own
    assert "0.4000 ± 0.0400" in own and "0.3000 ±" not in own and "0.7000 ± 0.0700" in own


def test_a_group_has_a_chart_and_its_tasks_only_rows(tmp_path):
    run = recorded(tmp_path)
    of_task = task_evaluation("law", 10, 0.2)["tasks"]["law"]
    group = task_evaluation("mmlu", 10, 0.25)
    write_task_evaluation(run, {**group, "groups": group["tasks"], "tasks": {"<b>law": of_task}})
    page = write_report([run]).read_text()
    assert page.count('"tasks-') == page.count('"tasks-0"')
    assert "&lt;b&gt;law" in page and "<b>law" not in page and "0.2000 ± 0.0200" in page


def test_several_runs_are_overlaid(tmp_path):
    runs = [recorded(tmp_path / name, f"name={name}") for name in ("a", "b")]
    for run, value in zip(runs, (0.3, 0.6), strict=True):
        write_task_evaluation(run, task_evaluation("arc", 10, value))
    curves = chart(write_report(runs, tmp_path / "report.html").read_text(), 0)
    assert [(curve["name"], curve["y"]) for curve in curves] == [("a", [0.3]), ("b", [0.6])]


def test_a_damaged_file_is_named(tmp_path):
    run = recorded(tmp_path)
    file = evaluation_file(run, 10, "arc", None, None)
    file.parent.mkdir(parents=True)
    file.write_text('{"name": 5}')
    with pytest.raises(PipelineError, match=r"step_00000010/arc\.json: is damaged"):
        write_report([run])
