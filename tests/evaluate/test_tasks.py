"""What is wrong with the names of tasks, with their data, or with a folder of them, is one message."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.folder import Run
from tests.data.helpers import command
from tests.evaluate.conftest import CHOICE, ROLLING, Save, write_task


@pytest.fixture(scope="module")
def index() -> object:
    """The harness's index of its thousands of tasks, which takes seconds, made once."""
    from lm_eval.tasks import TaskManager

    return functools.cache(TaskManager)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message."""
    bars, message = capsys.readouterr().err.split("pipeline: error: ")  # tqdm, imported before, ignores its variable
    assert "Traceback" not in bars + message
    return message


@pytest.mark.slow
def test_unknown_names_and_missing_data_are_named_all_at_once(
    run: Run, save: Save, index: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.evaluate.tasks.TaskManager", index)
    save(1)
    assert command("evaluate", str(run.path), "--tasks", "hellaswagg,arc_easy,wikitexts,xyzzy") == 2
    message = said(capsys)
    assert "hellaswagg: did you mean hellaswag" in message and "wikitexts: did you mean wikitext" in message
    assert "  xyzzy\n" in message and "arc_easy:" not in message
    assert command("evaluate", str(run.path), "--tasks", "hellaswag,arc_easy") == 1
    message = said(capsys)
    assert "hellaswag: " in message and "arc_easy: " in message and os.environ["HF_HOME"] in message
    assert "pipeline evaluate --fetch --tasks hellaswag,arc_easy" in message
    assert command("evaluate", str(run.path), "--tasks", "ai2_arc,arc_easy") in (1, 2)  # a tag and one of its tasks
    said(capsys)
    assert not run.evaluations.exists()


@pytest.mark.slow
def test_the_network_is_never_tried_but_by_fetch(run: Run, save: Save, tasks: Path):
    save(1)
    code = (
        "import os, socket, sys\n"
        "def refuse(*a, **k): os.write(2, b'NETWORK'); os._exit(9)\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "from pipeline.cli.main import main\n"
        f"sys.argv = ['pipeline', 'evaluate', {str(run.path)!r}, '--tasks', 'there,choice']\n"
        f"sys.argv += ['--include-path', {str(tasks)!r}]\n"
        "main()\n"
    )
    there = tasks / "there.yaml"
    there.write_text("task: there\ndataset_path: owner/name\ntest_split: test\noutput_type: multiple_choice\n")
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    finally:
        there.unlink()
    assert done.returncode == 1 and "there: " in done.stderr and "NETWORK" not in done.stderr, done.stderr
    assert "--fetch --tasks there,choice --include-path" in done.stderr


def test_a_file_of_data_that_is_not_there_is_named(
    run: Run, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "gone"
    write_task(folder, "gone", CHOICE, [{"question": "war", "choices": ["a", "b"], "answer": 1}])
    (folder / "gone.jsonl").unlink()
    save(1)
    assert command("evaluate", str(run.path), "--tasks", "gone", "--include-path", str(folder)) == 1
    assert "gone.jsonl" in said(capsys)


PROGRAM = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("process_docs: !function utils.process", "!function"),
        ("doc_to_choice: !!python/name:os.system ''", "python/name"),
        ("class: utils.Task", "`class`"),
        ("use_prompt: prompts.yaml:first", "`use_prompt`"),
        ("metric_list: [{metric: exact_match, hf_evaluate: true}]", "`hf_evaluate`"),
        ("metric_list: [{metric: ./metric.py}]", "metric './metric.py'"),
        ("dataset_kwargs: {trust_remote_code: true}", "`trust_remote_code`"),
        ("unsafe_code: true", "`unsafe_code`"),
        ("include: ../outside.yaml", "outside.yaml"),
        ("dataset_path: webdataset", "dataset_path 'webdataset'"),
        ("a: &a [1, *a]", "contains itself"),
    ],
)
def test_a_folder_of_tasks_that_names_code_is_refused(
    run: Run, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, named: str
):
    folder = tmp_path / "tasks"
    write_task(folder, "good", ROLLING, [{"text": "war and peace"}])
    (tmp_path / "outside.yaml").write_text("output_type: multiple_choice\n")
    (folder / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "bad.yaml").write_text(f"task: bad\n{lines}\n")
    save(1)
    assert command("evaluate", str(run.path), "--tasks", "good", "--include-path", str(folder)) == 2
    message = said(capsys)
    assert named in message and ("bad.yaml" in message or "outside.yaml" in message)
    assert not (tmp_path / "ran").exists()


def test_a_template_of_a_task_runs_no_program(run: Run, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, ran = tmp_path / "tasks", tmp_path / "ran"
    write_task(folder, "bad", ROLLING.replace("{{text}}", PROGRAM % ran), [{"text": "war"}])
    save(1)
    assert command("evaluate", str(run.path), "--tasks", "bad", "--include-path", str(folder)) == 1
    assert "unsafe" in said(capsys) and not ran.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["RUN", "--tasks", "choice", "--step", "7"], "step 7; there are: 1"),
        (["RUN", "--tasks", "choice", "--step", "1", "--every-checkpoint"], "--step or --every-checkpoint"),
        (["RUN", "--tasks", ","], "names no task"),
        (["RUN", "--limit", "3"], "--tasks"),
        (["--tasks", "choice"], "--fetch"),
        ([], "run folder"),
        (["RUN", "--tasks", "choice", "--include-path", "nowhere"], "nowhere"),
        (["RUN", "--tasks", "long"], "max_gen_toks"),
        (["RUN", "--tasks", "beams"], "num_beams"),
    ],
)
def test_a_mistake_is_one_message(
    run: Run,
    save: Save,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
):
    folder = tmp_path / "tasks"
    for name, settings in (("long", "max_gen_toks: 64"), ("beams", "num_beams: 4, max_gen_toks: 4")):
        rest = 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: text\n'
        rest += f"generation_kwargs: {{until: [a], {settings}}}\nmetric_list: [{{metric: exact_match}}]"
        write_task(folder, name, rest, [{"text": "war"}])
    write_task(folder, "choice", CHOICE, [{"question": "war", "choices": ["a", "b"], "answer": 1}])
    save(1)
    given = [str(run.path) if part == "RUN" else part for part in arguments]
    if "--tasks" in given and "--include-path" not in given:
        given += ["--include-path", str(folder)]
    assert command("evaluate", *given) == 2
    assert named in said(capsys)


@pytest.mark.parametrize(
    ("rest", "arguments", "named"),
    [
        (CHOICE, ["--num-fewshot", "3"], "task bad: its prompts cannot be made, 3-shot (ValueError"),
        (CHOICE.replace("{{question}}", "{{more.a.b}}"), [], "task bad: its prompts cannot be made, 0-shot (Undefined"),
        (CHOICE, [], "the likelihood of '' behind 'war', which adds no"),
    ],
)
def test_prompts_that_cannot_be_made_are_one_message(
    run: Run,
    save: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rest: str,
    arguments: list[str],
    named: str,
):
    folder = tmp_path / "tasks"
    first = {"question": "war", "choices": ["a", "b"], "answer": 1}
    write_task(
        folder, "bad", rest, [first | {"more": {"a": {"b": "peace"}}}, first | {"more": {}, "choices": ["a", ""]}]
    )
    (folder / "bad.yaml").write_text((folder / "bad.yaml").read_text() + 'target_delimiter: ""\n')
    save(1)
    assert command("evaluate", str(run.path), "--tasks", "bad", "--include-path", str(folder), *arguments) in (1, 2)
    assert named in said(capsys)
    assert not run.evaluations.exists() or not list(run.evaluations.glob("*/*.json"))


def test_without_the_harness_the_extra_is_named(
    run: Run, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.evaluate.harness.find_spec", lambda name: None)
    assert command("evaluate", str(run.path), "--tasks", "choice", "--include-path", str(tasks)) == 2
    assert "pip install '.[evaluate]'" in said(capsys)
