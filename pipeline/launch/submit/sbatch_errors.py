"""Turns sbatch's refusal of a job into one message that names the field to change."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import PipelineError, UsageError
from pipeline.launch.slurm import client as slurm
from pipeline.run.attempts import Stage


@dataclass(frozen=True)
class _Rule:
    """The words of sbatch, the field of the site file they refer to, and the cure."""

    words: str
    field: str
    cure: str


@dataclass(frozen=True)
class Fault:
    """The field that has to change."""

    where: str
    """File and field."""
    cure: str


# QOSMaxWallDurationPerJobLimit, AssocMaxNodePerJobLimit, QOSMinGRES ...: a single job exceeds them, and waiting does
# not help.
_LIMIT = r"\b(qos|assoc)\w*"
_LIMITS_HERE = (
    "your limits: `sacctmgr show qos format=name,maxwall,maxtres,mintres` and "
    "`sacctmgr show associations user=$USER format=account,qos,maxwall,maxtres`"
)

_NODES = _Rule(
    "node configuration|node count|processors|cpu count|partitionnodelimit|nodes? required",
    "{stage}.nodes" + ", tasks_per_node, cpus_per_task, gpus_per_node",
    "nodes, cores and GPUs here: `sinfo --format '%P %D %c %G'`",
)
# {stage} is the section of the stage. Order matters: Slurm often adds a general message to a specific one.
_RULES = (
    _Rule("invalid partition", "{stage}.partition", "partitions here: {partitions}"),
    _Rule("invalid account", "account", "your accounts: `sacctmgr show associations user=$USER format=account`"),
    _Rule("invalid qos", "qos", "yours: `sacctmgr show associations user=$USER format=account,qos`"),
    _Rule("invalid feature", "constraint", "features here: `sinfo --format '%N %f'`"),
    _Rule("job array", "{array}", "arrays here are smaller than `scontrol show config | grep MaxArraySize` says"),
    _Rule(_LIMIT + "wall", "{stage}.time_limit_min", _LIMITS_HERE),
    _Rule(_LIMIT + "(gres|gpu)", "{stage}.gpus_per_node", _LIMITS_HERE),
    _Rule(_LIMIT + "mem", "{stage}.mem_gb", _LIMITS_HERE),
    _Rule(_LIMIT + "cpu", "{stage}.cpus_per_task", _LIMITS_HERE),
    _Rule(_LIMIT + "node", "{stage}.nodes", _LIMITS_HERE),
    _Rule("time limit", "{stage}.time_limit_min", "limits here: `sinfo --format '%P %l'`"),
    _Rule("memory", "{stage}.mem_gb", "memory of the nodes here: `sinfo --format '%P %N %m'` (in MB)"),
    _Rule("gres|gpu", "{stage}.gpus_per_node", "GPUs here: `sinfo --format '%P %N %G'` (gpu_request and gpu_type too)"),
    _NODES,
    _Rule("dependency", "the chain", "a job it waits for is gone; submit again"),
)
_TOO_MANY = r"submit\w*limit|max(imum)? (number of )?jobs"
_NO_ANSWER = (
    "unable to contact|connection refused|connect failure|timed out|no answer|not responding|standby|zero bytes|"
    "not connected|retry"
)
_PASSES = f"{_TOO_MANY}|{_NO_ANSWER}|busy|down|drain|reserved|not available|temporarily"
# Slurm adds this to the message of every limit; the rules would match its words.
_POLICY = re.compile(r"job violates accounting/qos policy.*", re.IGNORECASE)


def refused(words: str, stage: Stage, site_file: str) -> PipelineError:
    """Returns the error for what sbatch wrote on stderr: exit status 2 where the request must change, else 1."""
    said = "; ".join(re.sub(r"^sbatch: (error: )?", "", line) for line in words.splitlines() if line.strip())
    said = said.replace("Batch job submission failed: ", "")
    if re.search(_NO_ANSWER, words, re.IGNORECASE):
        return PipelineError(
            f"Slurm's controller does not answer ({said}); nothing was submitted. "
            "Check with `scontrol ping` and submit again when it answers"
        )
    special = _POLICY.sub("", words)
    if re.search(_TOO_MANY, special, re.IGNORECASE):
        return PipelineError(
            f"{stage}: Slurm refuses more jobs of yours ({said}); nothing was submitted. "
            "Wait until some of them have ended (`squeue --me`), or ask for a higher limit"
        )
    fault = at_fault(words, stage, site_file)
    if fault is not None:
        return UsageError(f"{fault.where}: Slurm refuses it ({said}); {fault.cure}. Nothing was submitted")
    if special != words:
        return PipelineError(
            f"{stage}: a limit of your account or QOS is reached ({said}); nothing was submitted. Wait until some of "
            f"your jobs have ended (`squeue --me`), or request less in {site_file}; {_LIMITS_HERE}"
        )
    return PipelineError(f"{stage}: sbatch failed ({said or 'with no message'}); nothing was submitted")


def at_fault(words: str, stage: Stage, site_file: str) -> Fault | None:
    """Returns the field of the site file that sbatch's words refer to; None if they refer to none."""
    rule = _rule(words)
    if rule is None:
        return None
    field = rule.field.format(stage=stage, array="prepare.slices" if stage == "prepare" else "--sweep")
    where = field if field.startswith("--") else f"{site_file}: {field}"
    return Fault(where, rule.cure.replace("{partitions}", _partitions()))


def may_pass(words: str) -> bool:
    """Whether sbatch would accept the job at another time: Slurm is busy, or the nodes are down, reserved or taken.

    It says the same of nodes that no job will ever get.
    """
    rule, special = _rule(words), _POLICY.sub("", words)
    if rule is not None:
        return rule is _NODES
    return special != words or re.search(_PASSES, special, re.IGNORECASE) is not None


def _rule(words: str) -> _Rule | None:
    special = _POLICY.sub("", words)
    return next((rule for rule in _RULES if re.search(rule.words, special, re.IGNORECASE)), None)


def _partitions() -> str:
    try:
        return ", ".join(slurm.call("sinfo", "--noheader", "--format", "%R").split())
    except slurm.SlurmError:
        return "`sinfo --format %R`"
