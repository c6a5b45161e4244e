"""A site's variables, which may be passwords, are on no command line and in no file that others can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.launch.job.batch_script import executor
from pipeline.launch.job.rank import _whole_environment, command_line
from pipeline.launch.job.spec import JobSpec, Task
from pipeline.launch.site import Site
from pipeline.launch.submit.chain import plan_chain
from pipeline.launch.submit.summary import dry_run
from pipeline.run.folder import Run
from tests.launch.container.support import sif
from tests.launch.support import SITE, make_run, write_files

SECRET = "a 'quoted' $PASSWORD"
ENVIRONMENT = {"MLFLOW_TRACKING_PASSWORD": SECRET, "ELSEWHERE": "x,y", "XDG_CACHE_HOME": "/mine"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """A job of a site that sets a password."""
    run, _ = make_run(tmp_path, monkeypatch)
    site = Site.model_validate({**SITE, "environment": ENVIRONMENT})
    task = Task(str(run.path), (("train", str(run.config_file)),))
    return JobSpec("tiny", "train", (task,), site, site.train, 1, 60, run.code, run.launch.absolute())


def test_the_batch_script_reads_them_from_a_file_of_the_owner(job: JobSpec) -> None:
    job.save()
    text = executor(job, None).text(1)
    assert "PASSWORD" not in text and str(job.environment_file) in text
    for file in job.folder.iterdir():
        if SECRET in file.read_text() or "PASSWORD" in file.read_text():
            assert file.stat().st_mode & 0o777 == 0o600, file
    line = next(line for line in text.splitlines() if line.startswith(". "))
    script = f"{line}\n{sys.executable} -c 'import os; print(os.environ[\"MLFLOW_TRACKING_PASSWORD\"])'"
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == f"{SECRET}\n"


def test_a_job_whose_file_is_gone_does_not_start(job: JobSpec) -> None:
    line = next(line for line in executor(job, None).text(1).splitlines() if line.startswith(". "))
    ended = subprocess.run(["bash", "-c", f"{line}\necho started"], capture_output=True, text=True)
    assert ended.returncode != 0 and "started" not in ended.stdout


def test_a_container_gets_them_through_its_environment(job: JobSpec) -> None:
    image = sif(Path("image.sif"))
    loaded = load_config("config.yaml", [f"container.image={image}"])
    command = command_line(loaded, job.site, Run(Path(job.tasks[0].run)), ["train"], {"RANK": "0"})
    assert not any("PASSWORD" in word or SECRET in word or "x,y" in word for word in command)
    assert not any("XDG_CACHE_HOME" in word for word in command), "the site's wins"
    found = _whole_environment(job.site, {"RANK": "0"})
    for name, value in ENVIRONMENT.items():
        assert found[name] == value and found[f"APPTAINERENV_{name}"] == value


def test_a_dry_run_shows_none_of_them(job: JobSpec) -> None:
    write_files(Path(), site={**SITE, "environment": ENVIRONMENT})
    sif(Path("image.sif"))
    text = dry_run(plan_chain("config.yaml", "site.yaml", ("container.image=image.sif",), ()))
    assert "train.env" in text and "PASSWORD" not in text and "x,y" not in text
