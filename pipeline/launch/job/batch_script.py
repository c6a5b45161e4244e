"""The batch script of a stage, rendered by submitit; nothing here talks to Slurm."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit

from pipeline.launch.job.rank import run_rank
from pipeline.launch.job.spec import JobSpec
from pipeline.launch.site import Site, TrainResources
from pipeline.launch.slurm.inputs import is_input


class Executor(submitit.SlurmExecutor):
    """submitit's Slurm executor, which also renders scripts on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Tells submitit that Slurm is usable; a missing Slurm shows when its commands are called."""
        return 2

    def text(self, tasks: int) -> str:
        """Returns the batch script that submitting would hand to sbatch."""
        if tasks > 1:
            self.parameters["map_count"] = tasks
        return self._make_submission_file_text(self._submitit_command_str, "")


def executor(job: JobSpec, dependency: str | None) -> Executor:
    """Returns submitit's executor, configured for this job; `dependency` has sbatch's form."""
    made = Executor(folder=job.folder, python=_python(job.site))
    made.update_parameters(**_parameters(job, dependency))
    return made


def submit_tasks(made: Executor, job: JobSpec) -> str:
    """Submits a job and returns its id, which is that of the array if it has several tasks."""
    count = len(job.tasks)
    with _inputs_hidden():
        if count == 1:
            return str(made.submit(run_rank, str(job.file)).job_id)
        first = made.map_array(run_rank, [str(job.file)] * count)[0]
        return str(first.job_id).partition("_")[0]


@contextlib.contextmanager
def _inputs_hidden() -> Iterator[None]:
    """Hides what would change the job: input variables of the shell, and those of an interactive job around it."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_input(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _python(site: Site) -> str:
    # USR2 kills a process that does not handle it, and Python needs half a second before it can.
    python = shlex.quote(site.python or sys.executable)
    return f"""sh -c 'trap "" USR2; exec "$@"' sh {python}"""


def _parameters(job: JobSpec, dependency: str | None) -> dict[str, Any]:
    ask, site = job.resources, job.site
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
        "signal_delay_s": job.signal_before_end_s,
        "array_parallelism": job.parallel,
        "wckey": None,  # clusters that check such keys refuse submitit's own
        "setup": _setup(job),
        "teardown": _teardown(job),
        # One dead rank would leave the other ranks running; srun does not inherit --cpus-per-task by itself.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={ask.cpus_per_task}"],
        "additional_parameters": {
            "requeue": True,
            # A dependency that can never be satisfied would leave the job pending forever.
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


def _setup(job: JobSpec) -> list[str]:
    site = job.site
    begin = f"begun=$({_launcher(site)} begin {_quoted(job.file)}) || exit $?"
    return [
        # They belong to the submitting shell or to another job's ranks; the site may set its own.
        "unset MASTER_ADDR MASTER_PORT",
        *(f"module load {shlex.quote(name)}" for name in site.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        *site.setup,
        # With a site's `set -e` the script would end together with srun, and nothing would be requeued.
        "set +eu",
        # The working folder is the checkout: its package must not be found before the submitted one.
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={_quoted(job.code)}${{PYTHONPATH:+:$PYTHONPATH}}",
        begin,
        'eval "$begun"',
    ]


def _teardown(job: JobSpec) -> list[str]:
    # Without the status in `rc` the next stage would start after a failure. Slurm sends TERM to the script as soon as
    # the job is requeued; untrapped, it would end the script before the bad nodes are excluded from the waiting job.
    return [
        "rc=$?",
        "trap '' TERM",
        f"{_launcher(job.site)} end {_quoted(job.file)} $rc",
        "exit $?",
    ]


def _launcher(site: Site) -> str:
    return f"{shlex.quote(site.python or sys.executable)} -m pipeline.launch.job.attempt"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
