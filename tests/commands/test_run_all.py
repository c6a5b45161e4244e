"""`pipeline run` as a user runs it: one command from raw text to a sample, interrupted and resumed."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.commands.run_all import _results, next_commands, run_all
from pipeline.config.load import load_config
from pipeline.errors import UsageError
from pipeline.run.folder import Run
from pipeline.text_format import printable
from pipeline.train.evaluate import Evaluation
from tests import processes
from tests.cli.test_main import pipeline
from tests.experiment import curve, last_step
from tests.test_bad_input import experiment

SETTINGS = {
    "tokenizer": {"kind": "bpe"},
    "model.vocab_size": 300,
    "train.max_iters": 60,
    "optimizer.cosine_cycle_iters": 60,
    "train.log_interval": 10,
    "train.checkpoint_interval": 20,
    "train.val_interval": 30,
    "tracking": {"uri": "sqlite:///mlflow.db"},
}


@pytest.mark.slow
def test_one_command_makes_a_model_and_running_it_again_repeats_nothing(tmp_path):
    config = experiment(tmp_path, **SETTINGS)
    done = pipeline("run", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model, step 60" in done.stdout and "bigram counts" in done.stdout
    assert "pipeline ui " in done.stdout
    run = tmp_path / "runs" / "tiny"
    sample = (run / "samples" / "step_00000060.txt").read_text()
    assert sample.startswith("The") and printable(sample.strip()) in done.stdout
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["step"] == 60 and 0 < evaluation["loss"] < 5.8
    metrics = (run / "metrics.jsonl").read_text()
    assert _in_mlflow(tmp_path, run) == {"evaluation": evaluation["loss"], "samples": {"step_00000060.txt": sample}}

    for command in (["sample", str(run), "--prompt", "We"], ["report", str(run)]):
        done = pipeline(*command, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    second = (run / "samples" / "step_00000060.txt").read_text()
    assert second.startswith("We")
    assert _in_mlflow(tmp_path, run) == {
        "evaluation": evaluation["loss"],
        "samples": {"step_00000060.txt": second},
        "report": (run / "report.html").read_text(),
    }

    again = pipeline("run", config, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (run / "metrics.jsonl").read_text() == metrics
    assert "step 1/60" not in again.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_loss(tmp_path):
    settings = {**SETTINGS, "train.max_iters": 400, "optimizer.cosine_cycle_iters": 400, "tracking": {"uri": "none"}}
    (tmp_path / "stopped").mkdir(), (tmp_path / "whole").mkdir()
    config, log = experiment(tmp_path / "stopped", **settings), tmp_path / "log"
    _ends_well("prepare", config, log=log)
    training, run = processes.start_alone(["train", config], log), tmp_path / "stopped" / "runs" / "tiny"
    assert processes.wait_until(lambda: last_step(run) >= 20 or training.poll(), 120)
    training.kill(signal.SIGINT)
    assert training.wait(120) and training.codes == {0: 85}, training.words()
    assert "everything is saved" in training.words() and "Traceback" not in training.words()

    _ends_well("train", config, log=log)
    other = experiment(tmp_path / "whole", **settings)
    _ends_well("prepare", other, log=log)
    _ends_well("train", other, log=log)
    assert curve(run) == curve(tmp_path / "whole" / "runs" / "tiny")


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    config, log = experiment(tmp_path, **{"train.max_iters": 2}), tmp_path / "log"
    _ends_well("prepare", config, log=log)
    _ends_well("train", config, log=log)
    refused = processes.start_alone(["train", config, "optimizer.learning_rate=0.5"], tmp_path / "refused")
    assert refused.wait(120) and refused.codes == {0: 2}
    assert "optimizer.learning_rate: 0.01" in refused.words()
    _ends_well("train", config, "train.max_iters=3", log=log)  # a longer run is the same experiment


def _ends_well(*arguments: str, log: Path) -> None:
    """Runs a command as a user does, in a fork that has no imports to make."""
    started = processes.start_alone(arguments, log)
    assert started.wait(120) and started.codes == {0: 0}, started.words()


def test_several_processes_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="pipeline prepare"):
        run_all(load_config(experiment(tmp_path)))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "tokens").exists()


def test_the_table_compares_the_model_with_bigram_counts_in_three_units():
    evaluation = Evaluation(step=60, loss=math.log(4), perplexity=4.0, bits_per_byte=1.5, tokens=1234)
    console = Console(file=io.StringIO(), width=120)
    console.print(_results(Run(Path("runs/tiny")), evaluation, math.log(16), 12.4))
    text = console.file.getvalue()
    assert "run tiny" in text and "1,234 tokens; 12 s" in text
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in text.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["model, step 60"]] == ["1.3863", "4.0", "1.500"]
    assert [cell.strip() for cell in rows["bigram counts"]] == ["2.7726", "16.0", "3.000"]


def test_the_first_sample_and_thenext_commands_are_printed_as_they_are_however_narrow_the_screen(
    tmp_path, monkeypatch, capsys
):
    config = load_config(experiment(tmp_path, runs_dir=str(tmp_path / "[dim]runs")))
    sample, synced = "The [bold]economy[/bold] " * 9, []
    evaluation = Evaluation(step=6, loss=math.log(4), perplexity=4.0, bits_per_byte=1.5, tokens=1234)
    monkeypatch.setattr("pipeline.train.loop.train", lambda config: None)
    monkeypatch.setattr("pipeline.train.evaluate.evaluate_run", lambda run: evaluation)
    monkeypatch.setattr("pipeline.commands.sample.sample_run", lambda run: [sample, "a second text"])
    monkeypatch.setattr("pipeline.tracking.upload.sync.sync_quietly", synced.append)
    monkeypatch.setenv("COLUMNS", "40")
    run_all(config)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    run = tmp_path / "[dim]runs" / "tiny"
    assert sample.rstrip() in lines and "a second text" not in lines
    assert f"checkpoints, metrics, config:  {run}" in lines
    assert f"the report:                    pipeline report '{run}'" in lines
    assert synced == [Run(run)]


@pytest.mark.parametrize(
    ("uri", "last"),
    [
        ("none", "pipeline report 'my runs/tiny'"),
        ("sqlite:///mlflow.db", "pipeline ui 'my runs/tiny'"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_thenext_commands_can_be_pasted_into_a_shell(uri, last, tmp_path):
    config = load_config(experiment(tmp_path, **{"tracking.uri": uri}))
    assert next_commands(Run(Path("my runs/tiny")), config).splitlines()[-1].endswith(f"  {last}")


def _in_mlflow(folder: Path, run: Path) -> dict[str, object]:
    """What MLflow recorded of the files that were written after training."""
    from mlflow import MlflowClient

    (store,) = json.loads((run / "mlflow.json").read_text())["stores"].values()
    recorded = MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(store["run_id"])
    artifacts = Path(recorded.info.artifact_uri.removeprefix("file://"))
    found: dict[str, object] = {
        "evaluation": recorded.data.metrics.get("evaluation/loss"),
        "samples": {f.name: f.read_text() for f in (artifacts / "samples").glob("*")},
    }
    if (artifacts / "report.html").exists():
        found["report"] = (artifacts / "report.html").read_text()
    return found
