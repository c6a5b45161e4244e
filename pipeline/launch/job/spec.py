"""What the tasks of a job do: plain data in a file, written at submission and read by every part of the job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json
from pipeline.launch.site import Site
from pipeline.launch.slurm.job_records import Stage
from pipeline.run.folder import Run


@dataclass(frozen=True)
class Task:
    """One task of an array, or the whole of a job that is none.

    Attributes:
        run: Folder of the run.
        commands: Arguments of `pipeline`, one command after the other.
    """

    run: str
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Work:
    """What a job does.

    Attributes:
        stage: Which part of the whole.
        tasks: Of the array, by index; a single one for a job that is no array.
        site: The site file's content, as it was when the job was submitted.
    """

    stage: Stage
    tasks: tuple[Task, ...]
    site: dict[str, Any]

    def save(self, path: Path) -> None:
        """Publishes it for the job to read."""
        write_json(path, asdict(self))


@dataclass(frozen=True)
class Attempt:
    """This attempt of this task, as the job sees it.

    Attributes:
        stage: Which part of the whole.
        task: What is to be done.
        site: The cluster.
        job: Id of the job, `12` or `12_3`.
        raw_job: The id by which `scontrol` takes it.
        number: Restarts before this attempt.
        nodes: Host list.
    """

    stage: Stage
    task: Task
    site: Site
    job: str
    raw_job: str
    number: int
    nodes: str

    @property
    def run(self) -> Run:
        """The run that is worked on."""
        return Run(Path(self.task.run))

    def about(self) -> dict[str, Any]:
        """The fields that every note of this attempt has."""
        return {"stage": self.stage, "job": self.job, "attempt": self.number}


def this_attempt(work_file: str, environ: Mapping[str, str] = os.environ) -> Attempt:
    """Reads the job's work and finds its own part by Slurm's variables.

    Raises:
        PipelineError: The file is missing.
    """
    content = read_json(Path(work_file))
    raw = environ["SLURM_JOB_ID"]
    index = environ.get("SLURM_ARRAY_TASK_ID")
    task = content["tasks"][int(index or 0)]
    return Attempt(
        stage=content["stage"],
        task=Task(task["run"], tuple(tuple(c) for c in task["commands"])),
        site=Site.model_validate(content["site"]),
        job=raw if index is None else f"{environ['SLURM_ARRAY_JOB_ID']}_{index}",
        raw_job=raw,
        number=int(environ.get("SLURM_RESTART_COUNT", 0)),
        nodes=environ.get("SLURM_JOB_NODELIST", ""),
    )
