"""A login node has no torch: a command that needs the extra `train` says so in one sentence, with exit status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli.main import app
from pipeline.commands.new import new_config, new_site
from pipeline.config.load import load_config
from pipeline.run.folder import CHECKPOINT_MANIFEST, create_run, step_name

ROOT = Path(__file__).parents[2]
# Every command, with arguments that lead it to the packages it needs; True if it needs the extra.
COMMANDS = {
    "new other.yaml": False,
    "schema": False,
    "run my.yaml": True,
    "prepare my.yaml": True,
    "adopt raw my.yaml --output adopted --tokenizer none.json --dtype uint16": True,
    "inspect data/my": True,
    "export-data nowhere --output mega": False,
    "verify runs/my": True,
    "train my.yaml": True,
    "profile runs/my": False,
    "sample runs/my": True,
    "evaluate runs/my": True,
    "export runs/my": True,
    "average runs/my --last 1 --output averaged": True,
    "report runs/my": True,
    "sync runs/my --uri sqlite:///mlflow.db": True,
    "ui": True,
    "submit my.yaml --site site.yaml --dry-run train.batch_size=256": False,
    "status runs/my": False,
    "logs runs/my": False,
    "cancel runs/my": False,
    "check my.yaml": False,
    "plan my.yaml": False,
    "image info none.sif": False,
    "devcluster status --state /var/tmp/no-such-cluster": False,
}
# Runs every command in one interpreter that has only the packages of a login node.
PROBE = """
import contextlib, importlib.machinery, io, json, sys
hidden, commands = json.loads(sys.argv[1])
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else found(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
from pipeline.cli.main import main
outcomes = {}
for line in commands:
    sys.argv = ["pipeline", *line.split()]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            status = repr(error)
    outcomes[line] = status, said.getvalue()
print(json.dumps(outcomes))
"""


def packages_of_the_extra() -> list[str]:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in extra}
    return [
        package
        for package, distributions in packages_distributions().items()
        if any(name.lower().replace("_", "-") in names for name in distributions)
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | str, str]]:
    folder = tmp_path_factory.mktemp("login")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        new_config(Path("my.yaml"), "demo")
        new_site(Path("site.yaml"))
        for name in ("train/1800", "train/1900", "train/1990", "train/2000", "validation/2020"):
            file = Path(f"data/demo/text/{name}.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"Text of {name}.")
        checkpoint = create_run(load_config("my.yaml")).checkpoints / step_name(1)
        checkpoint.mkdir()
        (checkpoint / CHECKPOINT_MANIFEST).write_text("{}")
        Path("mlflow.db").touch()
    hidden = packages_of_the_extra()
    assert {"torch", "pyarrow", "mlflow", "jinja2", "plotly"} <= set(hidden)
    argv = [sys.executable, "-c", PROBE, json.dumps([hidden, list(COMMANDS)])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, env=environment, timeout=120, check=True)
    found: dict[str, tuple[int | str, str]] = json.loads(done.stdout)
    return found


def test_every_command_is_listed_here() -> None:
    assert {line.split()[0] for line in COMMANDS} == set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", [line for line, needs_extra in COMMANDS.items() if needs_extra])
def test_a_command_that_needs_the_extra_names_it_and_the_image(line: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, said = outcomes[line]
    assert re.fullmatch(r"pipeline: error: [a-z0-9]+ is not installed here.*`train`.*apptainer run.*\n", said), said
    assert status == 2


@pytest.mark.parametrize("line", [line for line, needs_extra in COMMANDS.items() if not needs_extra])
def test_the_other_commands_never_mention_it(line: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, said = outcomes[line]
    assert status in (0, 1, 2) and "not installed" not in said


def test_a_package_that_is_there_but_damaged_is_not_called_missing(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("import torch.absent\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    argv = [sys.executable, "-m", "pipeline", "train", "configs/demo.yaml"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    assert "torch.absent" in done.stderr and "not installed here" not in done.stderr
