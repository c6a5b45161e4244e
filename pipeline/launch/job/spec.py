"""A job as it is submitted, and an attempt of one of its tasks as the job itself sees it.

The file of a job, for example `launch/train.json`, is written at submission and read by every part of the job.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.launch.site import Resources, Site, TrainResources
from pipeline.run.attempts import Stage
from pipeline.run.folder import Run
from pipeline.run.private import write_private
from pipeline.run.world import attempt_number


@dataclass(frozen=True)
class Task:
    """One task of an array job, or the only task of a plain job."""

    run: str
    """Folder of the run."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of `pipeline`, one tuple per command; the commands run one after another."""


@dataclass(frozen=True)
class JobSpec:
    """One job of a chain, ready to be submitted or shown."""

    name: str
    """Its name in the queue."""
    stage: Stage
    tasks: tuple[Task, ...]
    """One per array index; a single one for a plain job."""
    site: Site
    resources: Resources
    """The part of the site that applies to the stage."""
    parallel: int
    """Array tasks that may run at the same time."""
    signal_before_end_s: int
    """Seconds before the time limit at which Slurm sends the signal."""
    code: Path
    """Folder of the code that runs outside the image."""
    folder: Path
    """Where submitit keeps its files."""
    notify: Path | None = None
    """The user's file that says where messages go; None if nothing is told."""
    beside: str = ""
    """Names a job that works beside the chain, at a lower priority, and whose end says nothing of the run."""

    @property
    def file(self) -> Path:
        """Where the tasks read what they do."""
        return self.folder / f"{self.beside or self.stage}.json"

    @property
    def environment_file(self) -> Path:
        """Where the batch script finds the variables of the site, if it has any."""
        return self.folder / f"{self.beside or self.stage}.env"

    def save(self) -> None:
        """Publishes what the tasks do, with the site as it is now, in files that nobody else can read."""
        site = json.loads(self.site.model_dump_json())
        # Only where the file is: it holds secrets, and run folders are copied.
        notify = None if self.notify is None else str(self.notify)
        tasks = [asdict(task) for task in self.tasks]
        content = {"stage": self.stage, "tasks": tasks, "site": site, "notify": notify}
        if self.beside:
            content["beside"] = True
        write_private(self.file, json.dumps(content, indent=2).encode())
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in self.site.environment.items()]
        write_private(self.environment_file, "".join(exports).encode())


@dataclass(frozen=True)
class Attempt:
    """This attempt of this task, as the job sees it."""

    stage: Stage
    task: Task
    site: Site
    job: str
    """Id of the job, `12` or `12_3`."""
    raw_job: str
    """The id that `scontrol` accepts."""
    number: int
    """Starts of the tasks before this attempt."""
    nodes: str
    """Slurm's short form of the node list."""
    notify: Path | None = None
    """The user's file that says where messages go; None if nothing is told."""
    beside: bool = False
    """Whether the job works beside the chain: what happens to it is no event of the run."""
    folder: Path = Path()
    """Where submitit keeps the files of the job, Slurm's logs among them."""
    allocation: int = 0
    """How often Slurm requeued the job before it got these nodes."""

    @property
    def run(self) -> Run:
        """The run that the task works on."""
        return Run(Path(self.task.run))

    @property
    def resources(self) -> Resources:
        """The part of the site that applies to the stage."""
        return {"prepare": self.site.prepare, "train": self.site.train, "evaluate": self.site.evaluate}[self.stage]

    def requested(self) -> tuple[int, int]:
        """Returns the GPUs and CPU cores that the job requests on all its nodes."""
        ask = self.resources
        nodes, tasks = (ask.nodes, ask.tasks_per_node) if isinstance(ask, TrainResources) else (1, 1)
        return nodes * ask.gpus_per_node, nodes * tasks * ask.cpus_per_task

    def about(self) -> dict[str, Any]:
        """Returns the fields that every event of this attempt carries."""
        return {"stage": self.stage, "job": self.job, "attempt": self.number}


def this_attempt(spec_file: str, environ: Mapping[str, str] = os.environ) -> Attempt:
    """Reads the file of the job and picks its own task by Slurm's variables.

    Raises:
        PipelineError: The file is missing or damaged, or Slurm's variables do not fit it.
    """
    try:
        return _attempt(Path(spec_file), environ)
    except (LookupError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{spec_file}: does not describe this task ({type(error).__name__}: {error}); submit the run again"
        ) from error


def _attempt(spec_file: Path, environ: Mapping[str, str]) -> Attempt:
    content: Any = read_json(spec_file)
    raw = environ["SLURM_JOB_ID"]
    index = environ.get("SLURM_ARRAY_TASK_ID")
    task = content["tasks"][int(index or 0)]
    return Attempt(
        stage=content["stage"],
        task=Task(task["run"], tuple(tuple(c) for c in task["commands"])),
        site=Site.model_validate(content["site"]),
        job=raw if index is None else f"{environ['SLURM_ARRAY_JOB_ID']}_{index}",
        raw_job=raw,
        number=attempt_number(environ),
        nodes=environ.get("SLURM_JOB_NODELIST", ""),
        notify=Path(content["notify"]) if content.get("notify") else None,
        beside=bool(content.get("beside")),
        folder=spec_file.parent,
        allocation=int(environ.get("SLURM_RESTART_COUNT", 0)),
    )
