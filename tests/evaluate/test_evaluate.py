"""Tasks are evaluated once per checkpoint, whole or not at all, and every mistake is one message."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.pins import pins
from pipeline.evaluate.language_model import CheckpointLM
from pipeline.evaluate.tasks import TaskSet, definition
from pipeline.run.evaluations import evaluation_files, evaluations
from pipeline.run.folder import Run
from tests import processes
from tests.data.helpers import command
from tests.evaluate.conftest import CHOICE, Save, write_task

GROUP = """
group: both
task: [choice, generation]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def evaluate(run: Run, folder: Path, *arguments: str, tasks: str = "choice") -> int:
    return command("evaluate", str(run.path), "--tasks", tasks, "--include-path", str(folder), *arguments)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of requests of each call of our model."""
    made: list[int] = []
    whole = CheckpointLM._loglikelihood_tokens

    def counted(self, requests, **options):
        made.append(len(requests))
        return whole(self, requests, **options)

    monkeypatch.setattr(CheckpointLM, "_loglikelihood_tokens", counted)
    return made


def test_results_are_in_the_run_folder_with_what_they_depend_on(
    run: Run, save: Save, tasks: Path, capsys: pytest.CaptureFixture[str]
):
    save(5)
    assert evaluate(run, tasks, "--limit", "6", "--num-fewshot", "2") == 0
    assert [file.relative_to(run.path).as_posix() for file in evaluation_files(run)] == [
        "evaluations/step_00000005/choice_2shot_limit6.json"
    ]
    (found,) = evaluations(run)
    assert (found["step"], found["limit"], found["num_fewshot"], found["harness"]) == (5, 6, 2, "0.4.13")
    manifest = json.loads((run.checkpoints / "step_00000005" / "manifest.json").read_text())
    assert found["checkpoint"] == manifest["digest"]
    scores = found["tasks"]["choice"]
    assert (scores["version"], scores["documents"], scores["num_fewshot"]) == ("1.0", 6, 2)
    assert len(scores["hash"]) == 64 and scores["metrics"].keys() == {"acc", "acc_norm"}
    shown = capsys.readouterr().out
    assert "step 5: choice" in shown and "6 documents, 2-shot" in shown and "±" in shown
    assert not pins(run.checkpoints)


def test_an_evaluation_is_repeated_only_if_something_differs(
    run: Run, save: Save, tasks: Path, tmp_path: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    yaml = folder / "choice.yaml"
    yaml.write_text(yaml.read_text().replace(str(tasks), str(folder)))
    save(1)
    for arguments, new in (
        ((), 96), ((), 0), (("--limit", "3"), 12), (("--limit", "3"), 0), (("--num-fewshot", "1"), 96), ((), 0),
    ):  # fmt: skip
        calls.clear()
        assert evaluate(run, folder, *arguments) == 0
        assert sum(calls) == new, arguments
    assert "evaluated before" in capsys.readouterr().out
    (folder / "choice.jsonl").write_text(json.dumps({"question": "war", "choices": ["a", "b"], "answer": 1}) + "\n")
    calls.clear()
    assert evaluate(run, folder) == 0
    assert sum(calls) == 2  # the documents are others
    for part, other in (("{{choices}}", "{{choices[::-1]}}"), ("acc_norm", "acc_bytes")):
        yaml.write_text(yaml.read_text().replace(part, other))
        calls.clear()
        assert evaluate(run, folder) == 0
        assert sum(calls) == 2, other
    assert evaluations(run)[0]["tasks"]["choice"]["metrics"].keys() == {"acc", "acc_bytes"}
    shutil.rmtree(run.checkpoints / "step_00000001")
    save(1)
    calls.clear()
    assert evaluate(run, folder) == 0
    assert sum(calls) == 0  # the same weights are the same checkpoint


def test_settings_of_generation_and_groups_are_part_of_a_definition(tasks: Path, tmp_path: Path):
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    generation, group = folder / "generation.yaml", folder / "both.yaml"
    group.write_text(GROUP)

    def defined(name: str) -> str:
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load([name])
        return definition(TaskSet(name, loaded["tasks"], loaded.get("groups", {})))

    before = {name: defined(name) for name in ("generation", "both")}
    assert before == {name: defined(name) for name in before}
    group.write_text(GROUP.replace("weight_by_size: true", "weight_by_size: false"))
    assert defined("generation") == before["generation"] and defined("both") != before["both"]
    generation.write_text(generation.read_text().replace("max_gen_toks: 12", "max_gen_toks: 13"))
    assert defined("generation") != before["generation"]


def test_every_checkpoint_is_evaluated_and_a_step_can_be_named(run: Run, save: Save, tasks: Path, calls: list[int]):
    for step in (1, 2, 3):
        save(step)
    assert evaluate(run, tasks, "--step", "2") == 0
    assert evaluate(run, tasks, "--every-checkpoint") == 0
    assert [found["step"] for found in evaluations(run)] == [1, 2, 3] and calls == [96, 96, 96]


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(run: Run, save: Save, tasks: Path, tmp_path: Path):
    save(1)
    names = "choice,rolling,generation"
    assert evaluate(run, tasks, "--num-fewshot", "1", tasks=names) == 0
    alone = [found["tasks"] for found in evaluations(run)]
    shutil.rmtree(run.evaluations)
    arguments = ["evaluate", str(run.path), "--tasks", names, "--include-path", str(tasks), "--num-fewshot", "1"]
    processes.run(arguments, 2, tmp_path / "log")
    assert [found["tasks"] for found in evaluations(run)] == alone


@pytest.mark.slow
def test_of_two_evaluations_at_once_one_waits_and_nothing_is_evaluated_twice(
    run: Run, save: Save, tasks: Path, tmp_path: Path
):
    save(1)
    arguments = ["evaluate", str(run.path), "--tasks", "choice,rolling", "--include-path", str(tasks)]
    both = [processes.start_alone(arguments, tmp_path / f"log{number}") for number in range(2)]
    for one in both:
        assert one.wait(60) and one.codes == {0: 0}, one.words()
    words = [one.words() for one in both]
    assert sorted(text.count("evaluated before") for text in words) == [0, 2], words


@pytest.mark.slow
def test_a_killed_evaluation_leaves_nothing_and_the_next_does_it(run: Run, save: Save, tmp_path: Path):
    folder = tmp_path / "many"
    rows = [{"question": "war and peace " * 4, "choices": ["a" * n, "b" * n], "answer": 0} for n in range(1, 30)] * 60
    write_task(folder, "long", CHOICE, rows)
    save(1)
    arguments = ["evaluate", str(run.path), "--tasks", "long", "--include-path", str(folder), "--num-fewshot", "0"]
    one = processes.start_alone(arguments, tmp_path / "log")
    assert one.within(lambda: bool(pins(run.checkpoints)), 60), one.words()
    time.sleep(0.2)
    one.end()
    assert one.codes != {0: 0} and not evaluation_files(run)
    assert not [file for file in run.evaluations.glob("**/*") if file.is_file()]
    assert command(*arguments, "--limit", "2") == 0
    assert len(evaluation_files(run)) == 1 and not pins(run.checkpoints)
