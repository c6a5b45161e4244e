"""The command line as users see it: it starts at once, errors are plain, exit statuses are documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.sections import Config
from pipeline.errors import DataError, StopRequested, UsageError
from pipeline.launch.slurm.client import SlurmError, call
from tests.data.conftest import made as made
from tests.data.helpers import command
from tests.experiment import write_experiment
from tests.launch.conftest import slurm as slurm
from tests.launch.support import FakeSlurm
from tests.yardstick import cpu_s, in_plain_starts

ROOT = Path(__file__).parents[2]


def pipeline(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pipeline", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_help_imports_nothing_but_the_command_line():
    probe = (
        "import sys\nfrom pipeline.cli.main import main\nsys.argv = ['pipeline', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('OWN', *{'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('pipeline.')})\n"
        "print('HEAVY', [m for m in ('torch', 'mlflow', 'deepspeed', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    *_, own, heavy = done.stdout.splitlines()
    assert set(own.split()[1:]) == {
        "pipeline.cli", "pipeline.devcluster", "pipeline.errors", "pipeline.text_format",
    }  # fmt: skip
    assert heavy == "HEAVY []"


def test_help_names_every_command_in_the_order_of_a_run_and_fits_80_columns():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    argv = [sys.executable, "-m", "pipeline", "--help"]
    lines = subprocess.run(argv, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert [found[1] for line in lines if (found := re.match(r"│ ([a-z][a-z-]+) ", line))] == [
        "new", "schema", "run", "prepare", "adopt", "inspect", "export-data", "verify", "train", "profile", "sample",
        "export", "average", "evaluate", "report", "sync", "ui", "submit", "status", "logs", "cancel", "check", "plan",
        "image", "devcluster",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UsageError("a mistake"), 2, "pipeline: error: a mistake\n"),
        (DataError("damage"), 1, "pipeline: error: damage\n"),
        (StopRequested("saved"), 85, "pipeline: saved\n"),
        (KeyboardInterrupt(), 1, "pipeline: interrupted"),
        (DataError("\x1b[31mred"), 1, "pipeline: error: \\x1b[31mred\n"),
        (FileNotFoundError(2, "No such file", "a"), 1, "pipeline: error: a: No such file\n"),
        (OSError(36, "File name too long", "a" * 5000), 1, "pipeline: error: aaaa"),
    ],
)
def test_every_error_has_its_exit_status_and_is_one_message_on_stderr(error, status, printed, monkeypatch, capsys):
    def fail(path: str, token_folder: str | None) -> str:
        raise error

    monkeypatch.setattr("pipeline.commands.verify.verify_path", fail)
    assert command("verify", "somewhere") == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(printed) and err.count("\n") == 1


def test_nothing_that_is_started_reports_usage_to_mlflow_unless_the_user_asks_for_it(monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert command("--help") == 0
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    assert command("--help") == 0
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


@pytest.mark.timing
def test_help_costs_little_more_than_a_plain_interpreter():
    assert in_plain_starts(lambda: cpu_s(sys.executable, "-m", "pipeline", "--help")) < 3.5


def test_a_config_is_read_without_importing_torch():
    probe = (
        "import sys\nfrom pipeline.config.load import load_config\nload_config('configs/demo.yaml')\n"
        "print([m for m in ('torch', 'mlflow', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_build_imports_only_what_it_needs(tmp_path):
    config = write_experiment(tmp_path, tmp_path / "runs", "tiny")
    probe = (
        "import sys\nfrom pipeline.cli.main import main\n"
        f"sys.argv = ['pipeline', 'prepare', {str(config)!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'mlflow', 'numpy.random', 'pipeline.run') if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_package_takes_part_in_checking_a_config(tmp_path):
    # What a package names under this group sees each model that pydantic makes.
    info = tmp_path / "meddler-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: meddler\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pydantic]\nmeddler = meddler:Plugin\n")
    (tmp_path / "meddler.py").write_text(
        "class Plugin:\n    def new_schema_validator(*_):\n        print('meddling')\n        return None, None, None\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def printed(**variables: str) -> str:
        argv = [sys.executable, "-m", "pipeline", "schema"]
        return subprocess.run(argv, check=True, capture_output=True, text=True, env=environment | variables).stdout

    assert "meddling" not in printed()
    assert "meddling" in printed(PYDANTIC_DISABLE_PLUGINS="")


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["train", "none.yaml"], 2, "/none.yaml): the config file"),
        (["train", "configs/demo.yaml", "train.max_itres=1"], 2, "`max_iters` in the section"),
        (["train", "configs/demo.yaml", "train.max_iters=soon"], 2, 'given "soon"'),
        (["sample", "nowhere"], 2, "not a run folder"),
        (["evaluate", "nowhere", "--step", "3"], 2, "every other option goes with --tasks"),
        (["evaluate"], 2, "name the run folder"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_a_users_mistake_is_one_message_on_stderr(args, status, words):
    done = pipeline(*args, cwd=ROOT)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_output_that_the_terminal_cannot_encode_is_no_traceback(made: Config) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "pipeline", "inspect", made.data.path, "--count", "40"]
    done = subprocess.run(argv, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u5317" in done.stdout, "a character that ASCII does not have is escaped"


def test_what_a_program_prints_need_not_be_utf_8(tmp_path: Path, slurm: FakeSlurm) -> None:
    (slurm.folder / "sinfo.err").write_bytes(b"sinfo: error: Zeit\xfcberschreitung\n")
    slurm.folder.joinpath("sinfo.rc").write_text("1")
    with pytest.raises(SlurmError, match="Zeit.berschreitung"):
        call("sinfo")
