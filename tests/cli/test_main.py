"""The command line as a person meets it: quick, plain errors, documented exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pipeline(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_help_names_every_command_and_imports_nothing_heavy():
    probe = (
        "import sys\nfrom pipeline.cli.main import main\nsys.argv = ['pipeline', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [m for m in ('torch', 'mlflow', 'deepspeed', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert "HEAVY []" in done.stdout
    for command in ("run", "prepare", "train", "sample", "evaluate", "export", "verify", "report", "sync"):
        assert f" {command} " in done.stdout


@pytest.mark.timing
def test_help_answers_in_under_half_a_second():
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert pipeline("--help").returncode == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5  # other programs only ever add to it


def test_a_config_is_read_without_importing_torch():
    probe = (
        "import sys\nfrom pipeline.config.load import load_config\nload_config('configs/demo.yaml')\n"
        "print([m for m in ('torch', 'mlflow', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["train", "none.yaml"], 2, "none.yaml: the config file cannot be read"),
        (["train", "configs/demo.yaml", "train.max_itres=1"], 2, "did you mean `max_iters` in the section `train`"),
        (["train", "configs/demo.yaml", "train.max_iters=soon"], 2, 'given "soon"'),
        (["sample", "nowhere"], 2, "is not a run folder"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_a_users_mistake_is_one_message_on_stderr(args, status, words):
    done = pipeline(*args, cwd=ROOT)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
