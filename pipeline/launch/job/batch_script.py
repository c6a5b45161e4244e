"""The batch script of a stage, made by submitit; nothing here talks to Slurm."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pipeline.launch.job.rank import run_rank
from pipeline.launch.job.spec import Work
from pipeline.launch.site import Resources, Site, TrainResources
from pipeline.launch.slurm.job_records import Stage


@dataclass(frozen=True)
class StageJob:
    """One job of the chain, ready to be submitted or shown.

    Attributes:
        name: Its name in the queue.
        work: What its tasks do.
        work_file: Where the tasks read that.
        resources: What it asks for.
        parallel: Tasks of an array that run at the same time.
        lead_s: Seconds before the time limit at which Slurm sends the signal.
        code: Folder of the code that runs outside the image.
        folder: Where submitit keeps its files.
    """

    name: str
    work: Work
    work_file: Path
    resources: Resources
    parallel: int
    lead_s: int
    code: Path
    folder: Path

    @property
    def stage(self) -> Stage:
        """What it does."""
        return self.work.stage


class Executor(submitit.SlurmExecutor):
    """submitit's, which also renders scripts on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Whether submitit may use it; whether Slurm is there is found out where it is called."""
        return 2

    def text(self, tasks: int) -> str:
        """The batch script, as `submit` would hand it to sbatch."""
        if tasks > 1:
            self.parameters["map_count"] = tasks
        return self._make_submission_file_text(self._submitit_command_str, "")


def executor(job: StageJob, site: Site, dependency: str | None) -> Executor:
    """submitit's executor with everything this job needs.

    Args:
        job: The job.
        site: The cluster.
        dependency: As sbatch takes it; None for a job that waits for no other.
    """
    made = Executor(folder=job.folder, python=_python(site))
    made.update_parameters(**_parameters(job, site, dependency))
    return made


def submit_tasks(made: Executor, job: StageJob) -> str:
    """Submits a job; returns its id, that of the array where it has several tasks."""
    count = len(job.work.tasks)
    with _outside_any_job():
        if count == 1:
            return str(made.submit(run_rank, str(job.work_file)).job_id)
        first = made.map_array(run_rank, [str(job.work_file)] * count)[0]
        return str(first.job_id).partition("_")[0]


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """sbatch hands the shell's variables on: those of an interactive job would give the new one that job's shape."""
    inside = "SLURM_JOB_ID" in os.environ
    of_that = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in of_that if inside}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _python(site: Site) -> str:
    # USR2 kills a process that does not handle it, and Python needs half a second until it does.
    python = shlex.quote(site.python or sys.executable)
    return f"""sh -c 'trap "" USR2; exec "$@"' sh {python}"""


def _parameters(job: StageJob, site: Site, dependency: str | None) -> dict[str, Any]:
    ask = job.resources
    nodes, tasks = (ask.nodes, ask.tasks_per_node) if isinstance(ask, TrainResources) else (1, 1)
    parameters: dict[str, Any] = {
        "job_name": job.name,
        "partition": ask.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "time": ask.time_limit_min,
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": ask.cpus_per_task,
        "mem": None if ask.mem_gb is None else f"{round(ask.mem_gb * 1024)}M",
        "dependency": dependency,
        "signal_delay_s": job.lead_s,
        "array_parallelism": job.parallel,
        "wckey": None,  # submitit's own, which clusters that check such keys refuse
        "setup": _setup(job, site),
        "teardown": _teardown(job, site),
        # One dead rank would leave the others running; and srun does not take over --cpus-per-task by itself.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={ask.cpus_per_task}"],
        "additional_parameters": {
            "requeue": True,
            # A dependency that can never be satisfied would leave the job pending for ever.
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
            **site.extra_sbatch,
        },
    }
    if ask.gpus_per_node:
        typed = f"{site.gpu_type}:{ask.gpus_per_node}" if site.gpu_type else ask.gpus_per_node
        if site.gpu_request == "gres":
            parameters["gres"] = f"gpu:{typed}"
        else:
            parameters["gpus_per_node"] = typed
    return parameters


def _setup(job: StageJob, site: Site) -> list[str]:
    begin = f"begun=$({_launcher(site)} begin {_quoted(job.work_file)}) || exit $?"
    return [
        # Of the shell that submitted, and of another job's ranks; the site may set them anew.
        "unset MASTER_ADDR MASTER_PORT",
        *(f"module load {shlex.quote(name)}" for name in site.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        *site.setup,
        # With a site's `set -e` the script would end with srun, and nothing would be requeued.
        "set +eu",
        # The working folder is the checkout, whose package must not be found before the submitted one.
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={_quoted(job.code)}${{PYTHONPATH:+:$PYTHONPATH}}",
        begin,
        'eval "$begun"',
    ]


def _teardown(job: StageJob, site: Site) -> list[str]:
    # Without the status in `rc` the next stage would start after a failure. Slurm ends the script by TERM as soon as
    # the job is requeued, and with it what still has to be said about the waiting job: which nodes it must not get.
    return [
        "rc=$?",
        "trap '' TERM",
        f"{_launcher(site)} end {_quoted(job.work_file)} $rc",
        "exit $?",
    ]


def _launcher(site: Site) -> str:
    return f"{shlex.quote(site.python or sys.executable)} -m pipeline.launch.job.attempt"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
