"""The batch script of a stage, rendered by submitit; nothing here talks to Slurm."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
import submitit.slurm.slurm as submitit_slurm

import pipeline
from pipeline.launch.job.causes import MOST_LOGS
from pipeline.launch.job.rank import run_rank
from pipeline.launch.job.spec import JobSpec
from pipeline.launch.site import Site, TrainResources
from pipeline.launch.slurm.inputs import is_input
from pipeline.run.folder import Run
from pipeline.run.provenance import git_state

# Why a line of the script is there, by its beginning.
_REASONS = {
    "#SBATCH --open-mode=": "Every attempt of the job adds to the same files.",
    "#SBATCH --requeue": "After a lost node or a preemption the job starts again and resumes.",
    "#SBATCH --signal=": "Tells the ranks to save before the time limit.",
    "#SBATCH --kill-on-invalid-dep=": "If the stage before fails for good, this one must not wait forever.",
    "unset MASTER_ADDR": "They belong to the submitting shell or to another job; the site may set its own.",
    "unset SLURM_EXPORT_ENV": "With --export=NONE, as some centres want, srun would hide all this from the tasks.",
    'cd "$submitted"': "Relative paths of the config begin where Slurm has started the job.",
    "set +eu": "With a site's `set -e` the script would end together with srun, and nothing would be requeued.",
    "export PYTHONSAFEPATH": "The working folder is the checkout: the submitted code must be found before it.",
    "begun=": "Records the attempt; prints what the tasks need to know, such as when the time limit is.",
    "srun ": "One task per process. USR2 would kill a Python without a handler for it. A dead rank ends the others.",
    "rc=$?": "Without the status in `rc` the next stage would start after a failure.",
    "while :": "After a failure the tasks may start once more in this allocation.",
    "trap '' TERM": "Slurm sends TERM once the job is requeued; bad nodes must still be excluded from the waiting job.",
}
# How much lower the priority of a job beside the chain is.
_NICE = 10_000


class Executor(submitit.SlurmExecutor):
    """submitit's Slurm executor, which also renders scripts on a machine without Slurm."""

    header: Sequence[str] = ()
    """Lines of the comment at the top of the script."""

    @classmethod
    def affinity(cls) -> int:
        """Tells submitit that Slurm is usable; a missing Slurm shows when its commands are called."""
        return 2

    def text(self, tasks: int) -> str:
        """Returns the batch script that submitting would hand to sbatch."""
        if tasks > 1:
            self.parameters["map_count"] = tasks
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Returns submitit's script with a header that says what it is, and a reason above each odd line."""
        text = super()._make_submission_file_text(command, uid)
        text = re.sub(r"(?m)^(#SBATCH --time=)(\d+)$", lambda found: found[1] + _slurm_time(int(found[2])), text)
        for line, reason in _REASONS.items():
            text = re.sub(rf"(?m)^{re.escape(line)}", f"# {reason}\n{line}", text, count=1)
        shebang, _, rest = text.partition("\n")
        return "\n".join([shebang, *(f"# {line}" for line in self.header), rest])


def executor(job: JobSpec, dependency: str | None) -> Executor:
    """Returns submitit's executor, configured for this job; `dependency` has sbatch's form."""
    made = Executor(folder=job.folder, python=_python(job.site))
    made.header = _header(job)
    made.update_parameters(**_parameters(job, dependency))
    return made


def submit_tasks(made: Executor, job: JobSpec) -> str:
    """Submits a job and returns its id, which is that of the array if it has several tasks."""
    count = len(job.tasks)
    with _inputs_hidden():
        if count == 1:
            return str(made.submit(run_rank, str(job.file)).job_id)
        with _arrays_rendered_by(made):
            first = made.map_array(run_rank, [str(job.file)] * count)[0]
        return str(first.job_id).partition("_")[0]


@contextlib.contextmanager
def _arrays_rendered_by(made: Executor) -> Iterator[None]:
    """Has the script of an array rendered as ours: submitit makes a new executor of its own class for each array."""

    def same(folder: Path, max_num_timeout: int) -> Executor:
        copy = Executor(folder=folder, max_num_timeout=max_num_timeout, python=made.python)
        copy.header = made.header
        return copy

    names = vars(submitit_slurm)
    before, names["SlurmExecutor"] = names["SlurmExecutor"], same
    try:
        yield
    finally:
        names["SlurmExecutor"] = before


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
        # srun does not inherit --cpus-per-task by itself.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={ask.cpus_per_task}", *_logs(job, nodes * tasks)],
        "additional_parameters": {
            "requeue": True,
            **({"nice": _NICE} if job.beside else {}),
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


def _logs(job: JobSpec, ranks: int) -> list[str]:
    """Returns srun's options for the files of many ranks: one per node, instead of submitit's two per rank."""
    if ranks <= MOST_LOGS:
        return []
    stem = str(job.folder / ("%A_%a" if len(job.tasks) > 1 else "%j"))
    # Not quoted: submitit does that.
    return [f"--{kind}={stem}_%n_log.{end}" for kind, end in (("output", "out"), ("error", "err"))]


def _setup(job: JobSpec) -> list[str]:
    site = job.site
    begin = f"begun=$({_launcher(site)} begin {_quoted(job.file)}) || exit $?"
    secrets = ["# Not in this file, which Slurm keeps and shows: a variable may be a password."]
    return [
        "submitted=$PWD",
        "unset MASTER_ADDR MASTER_PORT",
        "unset SLURM_EXPORT_ENV",
        *(f"module load {shlex.quote(name)}" for name in site.modules),
        *([*secrets, f". {_quoted(job.environment_file)} || exit $?"] if site.environment else []),
        *site.setup,
        "set +eu",
        'cd "$submitted"',
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={_quoted(job.code)}${{PYTHONPATH:+:$PYTHONPATH}}",
        begin,
        'eval "$begun"',
        "while :; do",
    ]


def _teardown(job: JobSpec) -> list[str]:
    return [
        "rc=$?",
        "trap '' TERM",
        "# Requeues the job, and then does not return, or prints what the tasks need to know if they start once more.",
        f"begun=$({_launcher(job.site)} end {_quoted(job.file)} $rc)",
        "rc=$?",
        '[ -n "$begun" ] || exit $rc',
        'eval "$begun"',
        "trap - TERM",
        "done",
    ]


def _header(job: JobSpec) -> list[str]:
    """Returns what a person who finds the script wants to know."""
    runs = list(dict.fromkeys(task.run for task in job.tasks))
    first = Run(Path(runs[0]).absolute())
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return [
        f"{job.stage} of the run {first.path}{more}, submitted to {job.site.name} by `pipeline submit`.",
        f"config: {first.config_file}",
        f"code:   {job.code}, {_commit()}",
        f"state:  pipeline status {shlex.quote(str(first.path))}",
        "To resume by hand after it has ended, submit again (sbatch of this file alone would not find its task):",
        f"    pipeline submit {_quoted(first.config_file)} --site SITE.yaml",
    ]


@functools.cache
def _commit() -> str:
    state = git_state(Path(pipeline.__file__).parent)
    if state["commit"] is None:
        return "no commit is known"
    return f"commit {state['commit'][:12]}" + (" with changes" if state["dirty"] else "")


def _slurm_time(minutes: int) -> str:
    """Returns minutes as Slurm writes a time limit: 1-02:30:00."""
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00"


def _launcher(site: Site) -> str:
    return f"{shlex.quote(site.python or sys.executable)} -m pipeline.launch.job.attempt"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
