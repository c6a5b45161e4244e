"""`pipeline run` as a user runs it: one command from raw text to a sample, interrupted and resumed."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.commands.run_all import _next_commands, _results, run_all
from pipeline.config.load import load_config
from pipeline.errors import UsageError
from pipeline.run.folder import Run
from pipeline.train.evaluate import Evaluation
from tests.cli.test_main import ROOT, pipeline
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
    assert sample.startswith("The") and sample.strip() in done.stdout
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
    config = experiment(tmp_path / "stopped", **settings)
    assert pipeline("prepare", config).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", "train", config]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "stopped" / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step":20' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    assert "saved" in err and "Traceback" not in err

    assert pipeline("train", config).returncode == 0
    other = experiment(tmp_path / "whole", **settings)
    assert pipeline("prepare", other).returncode == 0
    assert pipeline("train", other).returncode == 0
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    config = experiment(tmp_path, **{"train.max_iters": 2})
    assert pipeline("prepare", config).returncode == 0
    assert pipeline("train", config).returncode == 0
    done = pipeline("train", config, "optimizer.learning_rate=0.5")
    assert done.returncode == 2
    assert "optimizer.learning_rate: 0.01" in done.stderr
    assert pipeline("train", config, "train.max_iters=3").returncode == 0, "a longer run is the same experiment"


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


@pytest.mark.parametrize(
    ("uri", "last"),
    [
        ("none", "pipeline report 'my runs/tiny'"),
        ("sqlite:///mlflow.db", "pipeline ui 'my runs/tiny'"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_the_next_commands_can_be_pasted_into_a_shell(uri, last, tmp_path):
    config = load_config(experiment(tmp_path, **{"tracking.uri": uri}))
    assert _next_commands(Run(Path("my runs/tiny")), config).splitlines()[-1].endswith(f"  {last}")


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


def _losses(folder: Path) -> list[float]:
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]
