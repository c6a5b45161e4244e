"""Checks that a cluster can grant what a site file requests, by sinfo and by the times the run has measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pipeline.check.result import Check
from pipeline.errors import PipelineError
from pipeline.launch.site import Resources, Site, TrainResources
from pipeline.launch.slurm import client as slurm
from pipeline.launch.submit.signal_time import signal_time_s
from pipeline.run.folder import Run

_FORMAT = "%P|%D|%c|%m|%l|%G|%a"


@dataclass(frozen=True)
class _Partition:
    """What sinfo reports about a partition; CPUs, memory and GPUs are those of its largest node."""

    nodes: int
    cpus: int
    mem_gb: float
    limit_min: float
    gpus: int
    up: bool


def check_site_request(site: Site, run: Run, runs: int = 1) -> list[Check]:
    """Compares every stage's request with its partition; checks the arrays, the time limit and accounting.

    Args:
        site: The cluster.
        run: The run.
        runs: How many runs a sweep has.
    """
    if not slurm.installed():
        return [Check("slurm", "failed", "its commands are not installed on this machine", "run this on a login node")]
    try:
        partitions = _partitions()
    except slurm.SlurmError as error:
        return [Check("slurm", "failed", str(error), "try `scontrol ping`")]
    requests = [_check_request(stage, asked, partitions) for stage, asked in _stages(site).items()]
    return [*requests, *_arrays(site, runs), _time_limit(site, run), _accounting(site)]


def unmet_requests(site: Site) -> list[Check]:
    """Returns the requests that no partition can ever meet; where Slurm does not answer, sbatch will say so.

    Not every Slurm refuses them (EnforcePartLimits=NO): such a job would wait forever.
    """
    try:
        partitions = _partitions()
        found = [_check_request(stage, asked, partitions, now=False) for stage, asked in _stages(site).items()]
    except slurm.SlurmError:
        return []
    return [check for check in found if check.status == "failed"]


def _stages(site: Site) -> dict[str, Resources]:
    return {"prepare": site.prepare, "train": site.train, "evaluate": site.evaluate}


def _arrays(site: Site, runs: int) -> list[Check]:
    """Compares the slices and the runs of a sweep with the largest array that Slurm takes; silent if it is unknown."""
    try:
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", slurm.call("scontrol", "show", "config"))
    except slurm.SlurmError:
        return []
    if found is None:
        return []
    limit = int(found[1])
    wanted = {"slices of prepare": (site.prepare.slices, "prepare.slices"), "runs of the sweep": (runs, "--sweep")}
    over = {what: cure for what, (count, cure) in wanted.items() if count > limit}
    if over:
        sizes = ", ".join(f"{wanted[what][0]:,} {what}" for what in over)
        return [
            Check("arrays", "failed", f"{sizes}, and MaxArraySize is {limit:,}", f"lower {', '.join(over.values())}")
        ]
    return [Check("arrays", "ok", f"within MaxArraySize = {limit:,}")]


def _check_request(stage: str, asked: Resources, partitions: dict[str, _Partition], now: bool = True) -> Check:
    """Checks one stage's request, and with `now` whether enough nodes work.

    Of several partitions, `a,b`, all must exist and one must fit: Slurm picks it.
    """
    wanted = asked.partition or next((p.rstrip("*") for p in partitions if p.endswith("*")), "")
    known = {p.rstrip("*"): values for p, values in partitions.items()}
    names = wanted.split(",")
    absent = next((name for name in names if name not in known), None)
    if absent is not None:
        cure = f"allowed: {', '.join(sorted(known))}"
        return Check(f"request of {stage}", "failed", f"there is no partition {absent!r}", cure)
    found = [_check_partition(stage, asked, name, known[name], now) for name in names]
    best = min(found, key=lambda check: ("ok", "warning", "failed").index(check.status))
    return best if best.status != "failed" else replace(best, found="; ".join(check.found for check in found))


def _check_partition(stage: str, asked: Resources, partition: str, has: _Partition, now: bool) -> Check:
    name = f"request of {stage}"
    nodes, tasks = (asked.nodes, asked.tasks_per_node) if isinstance(asked, TrainResources) else (1, 1)
    limits = (
        ("nodes", nodes, has.nodes),
        ("CPUs per node", tasks * asked.cpus_per_task, has.cpus),
        ("GB of memory per node", asked.mem_gb or 0, has.mem_gb),
        ("GPUs per node", asked.gpus_per_node, has.gpus),
        ("minutes", asked.time_limit_min, has.limit_min),
    )
    over = [f"{want:g} {what}, and {partition} has {limit:g}" for what, want, limit in limits if want > limit]
    if over:
        return Check(name, "failed", "; ".join(over), f"lower {stage} in the site file, or name another partition")
    if not has.up:
        return Check(name, "warning", f"the partition {partition} is not up", "jobs will wait until it is")
    working = _working_nodes(partition) if now else nodes
    if working < nodes:
        found = f"{nodes} nodes, and {working} of the {has.nodes} in {partition} work now"
        return Check(name, "warning", found, f"jobs will wait for more nodes; see `sinfo -R -p {partition}`")
    return Check(name, "ok", f"fits {partition}: {nodes} of {has.nodes} nodes, {asked.time_limit_min} min")


def _working_nodes(partition: str) -> int:
    """Returns how many nodes of a partition are not down."""
    names = slurm.call("sinfo", "--noheader", "--Node", "--partition", partition, "--format", "%N").split()
    return len(set(names)) - len(slurm.lost_nodes(names))


def _time_limit(site: Site, run: Run) -> Check:
    try:
        seconds = signal_time_s(run, site)
    except PipelineError as error:
        return Check("time limit", "failed", str(error), "raise train.time_limit_min of the site")
    return Check("time limit", "ok", f"jobs are told to save {seconds} s before the end")


def _accounting(site: Site) -> Check:
    if not site.accounting:
        return Check("accounting", "ok", "not used at this site")
    try:
        slurm.call("sacct", "--noheader", "--allocations", "--starttime", "now")
    except slurm.SlurmError as error:
        return Check("accounting", "warning", str(error), "set `accounting: false` in the site file")
    return Check("accounting", "ok", "sacct answers")


def _partitions() -> dict[str, _Partition]:
    """Returns the partitions by name, the default with a star; where nodes differ, the largest of each value counts."""
    found: dict[str, _Partition] = {}
    # Without --exact, sinfo prints one line for nodes that differ, with the smallest value of any of them.
    for line in slurm.call("sinfo", "--noheader", "--exact", "--format", _FORMAT).splitlines():
        try:
            name, nodes, cpus, mem, limit, gres, up = line.split("|")
        except ValueError as error:
            raise slurm.SlurmError(f"sinfo: its answer {line!r} is not understood") from error
        new = _Partition(int(nodes), int(cpus), int(mem) / 1024, _minutes(limit), _gpus(gres), up.strip() == "up")
        old = found.get(name)
        found[name] = new if old is None else _Partition(
            old.nodes + new.nodes, max(old.cpus, new.cpus), max(old.mem_gb, new.mem_gb),
            max(old.limit_min, new.limit_min), max(old.gpus, new.gpus), old.up or new.up,
        )  # fmt: skip
    if not found:
        raise slurm.SlurmError("sinfo: names no partition")
    return found


def _gpus(gres: str) -> int:
    """Counts the GPUs of a gres string: `gpu:a100:4(S:0-1),shard:8` -> 4."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^,:(]+)*:(\d+)", gres))


def _minutes(limit: str) -> float:
    """Returns the minutes of `[days-]hours:minutes:seconds` or `infinite`, as sinfo writes a time limit."""
    if limit in ("infinite", "n/a"):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
