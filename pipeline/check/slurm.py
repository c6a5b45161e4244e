"""Whether a cluster can give what a site file asks for: by sinfo, and by the times the run has measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pipeline.check.result import Check
from pipeline.config.sections import Config
from pipeline.errors import PipelineError
from pipeline.launch.site import Resources, Site, TrainResources
from pipeline.launch.slurm import client as slurm
from pipeline.launch.submit.signal_time import signal_time_s
from pipeline.run.folder import Run

_FORMAT = "%P|%D|%c|%m|%l|%G|%a"


@dataclass(frozen=True)
class _Partition:
    """What sinfo says of a partition, at its best node."""

    nodes: int
    cpus: int
    mem_gb: float
    limit_min: float
    gpus: int
    up: bool


def check_slurm(config: Config, site: Site, run: Run) -> list[Check]:
    """Every stage's request against its partition, the time limit, and accounting."""
    if not slurm.installed():
        return [Check("slurm", "failed", "its commands are not on this machine", "run this on a login node")]
    try:
        partitions = _partitions()
    except slurm.SlurmError as error:
        return [Check("slurm", "failed", str(error), "try `scontrol ping`")]
    stages = {"prepare": site.prepare, "train": site.train, "evaluate": site.evaluate}
    found = [_fits(stage, ask, partitions) for stage, ask in stages.items()]
    return [*found, _time_limit(site, run), _accounting(site)]


def _fits(stage: str, ask: Resources, partitions: dict[str, _Partition]) -> Check:
    """Of several partitions, `a,b`, all have to be there, and a job goes to one that it fits."""
    wanted = ask.partition or next((p.rstrip("*") for p in partitions if p.endswith("*")), "")
    known = {p.rstrip("*"): values for p, values in partitions.items()}
    names = wanted.split(",")
    absent = next((name for name in names if name not in known), None)
    if absent is not None:
        cure = f"allowed: {', '.join(sorted(known))}"
        return Check(f"request of {stage}", "failed", f"there is no partition {absent!r}", cure)
    found = [_fits_one(stage, ask, name, known[name]) for name in names]
    best = min(found, key=lambda check: ("ok", "warning", "failed").index(check.status))
    return best if best.status != "failed" else replace(best, found="; ".join(check.found for check in found))


def _fits_one(stage: str, ask: Resources, wanted: str, has: _Partition) -> Check:
    name = f"request of {stage}"
    nodes, tasks = (ask.nodes, ask.tasks_per_node) if isinstance(ask, TrainResources) else (1, 1)
    asked = (
        ("nodes", nodes, has.nodes),
        ("CPUs a node", tasks * ask.cpus_per_task, has.cpus),
        ("GB of memory a node", ask.mem_gb or 0, has.mem_gb),
        ("GPUs a node", ask.gpus_per_node, has.gpus),
        ("minutes", ask.time_limit_min, has.limit_min),
    )
    over = [f"{want:g} {what}, and {wanted} has {limit:g}" for what, want, limit in asked if want > limit]
    if over:
        return Check(name, "failed", "; ".join(over), f"lower {stage} in the site file, or name another partition")
    if not has.up:
        return Check(name, "warning", f"the partition {wanted} is not up", "jobs will wait until it is")
    working = _working(wanted)
    if working < nodes:
        found = f"{nodes} nodes, and {working} of the {has.nodes} in {wanted} work now"
        return Check(name, "warning", found, f"jobs will wait for the others; `sinfo -R -p {wanted}` says why")
    return Check(name, "ok", f"fits {wanted}: {nodes} of {has.nodes} nodes, {ask.time_limit_min} min")


def _working(partition: str) -> int:
    """How many nodes of a partition are not down."""
    names = slurm.call("sinfo", "--noheader", "--Node", "--partition", partition, "--format", "%N").split()
    return len(set(names)) - len(slurm.lost_nodes(names))


def _time_limit(site: Site, run: Run) -> Check:
    try:
        seconds = signal_time_s(run, site)
    except PipelineError as error:
        return Check("time limit", "failed", str(error), "raise train.time_limit_min of the site")
    return Check("time limit", "ok", f"the signal to save comes {seconds} s before the end")


def _accounting(site: Site) -> Check:
    if not site.accounting:
        return Check("accounting", "ok", "not used at this site")
    try:
        slurm.call("sacct", "--noheader", "--allocations", "--starttime", "now")
    except slurm.SlurmError as error:
        return Check("accounting", "warning", str(error), "set `accounting: false` in the site file")
    return Check("accounting", "ok", "sacct answers")


def _partitions() -> dict[str, _Partition]:
    """By name, the default's with a star; different kinds of node in one partition count at their best."""
    found: dict[str, _Partition] = {}
    # Without --exact, nodes that differ are one line with the least that any of them has.
    for line in slurm.call("sinfo", "--noheader", "--exact", "--format", _FORMAT).splitlines():
        name, nodes, cpus, mem, limit, gres, up = line.split("|")
        new = _Partition(int(nodes), int(cpus), int(mem) / 1024, _minutes(limit), _gpus(gres), up.strip() == "up")
        old = found.get(name)
        found[name] = new if old is None else _Partition(
            old.nodes + new.nodes, max(old.cpus, new.cpus), max(old.mem_gb, new.mem_gb),
            max(old.limit_min, new.limit_min), max(old.gpus, new.gpus), old.up or new.up,
        )  # fmt: skip
    return found


def _gpus(gres: str) -> int:
    """`gpu:a100:4(S:0-1),shard:8` -> 4."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^,:(]+)*:(\d+)", gres))


def _minutes(limit: str) -> float:
    """`[days-]hours:minutes:seconds` or `infinite`, as sinfo writes it."""
    if limit in ("infinite", "n/a"):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
