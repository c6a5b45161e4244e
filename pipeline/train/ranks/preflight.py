"""Checks all ranks before the first step, in a fraction of a second: a bad node is named and the job ends at once.

Without it, a broken device, an unreachable node or a wrong clock shows only after minutes, as the timeout of some
collective that names no rank.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.layout import KEYS
from pipeline.config.sections import Config
from pipeline.errors import PipelineError, listing
from pipeline.files import MAX_CLOCK_SKEW_S, clock_skew_s
from pipeline.model.flops import num_parameters
from pipeline.run.events import BadNode, Network, append
from pipeline.run.folder import Run
from pipeline.run.provenance import IMAGE_SHA256_VARIABLE
from pipeline.run.world import World
from pipeline.train.ranks import group
from pipeline.train.ranks.network import Measured, judged, measure, noted_transport, transport_in

# The ranks have only just met: one that takes longer than this hangs. NCCL connects all ranks within the limit, which
# takes it longer the more there are.
MEET_LIMIT_S = 60.0
MEET_LIMIT_PER_RANK_S = 0.1

_SIZE = 256
_SLOWEST_S = 10.0
_POLL_S = 0.01
_ELEMENTS = 1 << 18  # a megabyte: too large to bypass a real transfer


@dataclass(frozen=True)
class Findings:
    """The findings of one rank."""

    host: str
    """Its node, by Slurm's name if there is one."""
    faults: list[str] = field(default_factory=list)
    """Problems of its node."""
    problems: list[str] = field(default_factory=list)
    """Problems that any other node would have too."""
    skew: float | None = None
    """Seconds by which its clock is ahead of the file system's; None if unknown."""
    image: str = ""
    """SHA-256 of the image it runs in; empty outside an image."""
    dataset: str = ""
    """Digest of the data it opened."""
    network: dict[str, Any] = field(default_factory=dict)
    """What it measured of the network; empty for a single rank."""


def preflight(config: Config, world: World, device: torch.device, run: Run, dataset: str) -> Network | None:
    """Checks device, network, disk, clocks and digests, together with all ranks.

    Args:
        config: The experiment.
        world: This process's place.
        device: Where it trains.
        run: The run; its folder exists.
        dataset: Digest of the manifest that this rank has read.

    Returns:
        The network between the ranks; None for a single rank.

    Raises:
        PipelineError: Something is wrong; the message is the same on all ranks and names node and rank. A faulty node
            is also recorded as the event `bad_node`, so that a retry can avoid it.
    """
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    store = group.store()
    store.set(f"preflight/{world.rank}", host)  # the other ranks know it even if the device never answers
    faults = _device_faults(device)
    problems = _disk_problems(config, run)
    missing = _meet(world)
    if missing:
        _refuse_ranks(missing, "did not get through its checks", world, run)
    network, wrong = _network(world, device, run)
    image = os.environ.get(IMAGE_SHA256_VARIABLE, "")
    own = Findings(host, faults + wrong, problems, _skew_s(run), image, dataset, network)
    findings = [Findings(**found) for found in group.gather(asdict(own), world)]
    _judge(findings, world, run)
    return judged([Measured(**f.network) for f in findings], [f.host for f in findings]) if world.size > 1 else None


def _device_faults(device: torch.device) -> list[str]:
    """Multiplies small integer matrices, whose product is exact in any order of summation."""
    a, b = torch.randint(-3, 4, (2, _SIZE, _SIZE), generator=torch.Generator())
    try:
        # Not timed: the first product loads the device's libraries, on a healthy node too.
        _product(a, b, device)
        began = time.monotonic()
        found = _product(a, b, device)
    except RuntimeError as error:
        return [f"{device} cannot multiply matrices: {str(error).splitlines()[0]}"]
    wrong = int((found != (a @ b).float()).sum())
    if wrong:
        return [f"{device} multiplies matrices wrongly: {wrong} of {found.numel()} elements"]
    seconds = time.monotonic() - began
    return [f"{device} took {seconds:.0f} s for a small product of matrices"] if seconds > _SLOWEST_S else []


def _product(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    return (a.float().to(device) @ b.float().to(device)).cpu()


def _disk_problems(config: Config, run: Run) -> list[str]:
    model = config.model
    needed = 4 * len(KEYS) * num_parameters(model)
    free = shutil.disk_usage(run.path).free
    if free >= needed:
        return []
    return [
        f"{run.path}: {free / 1e9:.2f} GB are free, and a checkpoint needs {needed / 1e9:.2f} GB; make room, "
        "or choose another runs_dir"
    ]


def _skew_s(run: Run) -> float | None:
    try:
        return clock_skew_s(run.path)
    except OSError:  # another check findings a disk that cannot be written
        return None


def _limit_s(world: World) -> float:
    return MEET_LIMIT_S + MEET_LIMIT_PER_RANK_S * world.size


def _meet(world: World) -> list[int]:
    """Waits until all ranks have passed their own checks; returns those that did not in time."""
    store = group.store()
    _arrive("ready", world)
    if store.add("preflight/ready", 1) == world.size:
        store.set("preflight/all", "")
    try:
        store.wait(["preflight/all"], timedelta(seconds=_limit_s(world)))
    except RuntimeError:
        return _missing("ready", world)
    return []


def _arrive(where: str, world: World) -> None:
    group.store().set(f"preflight/{world.rank}/{where}", "")


def _missing(where: str, world: World) -> list[int]:
    return [rank for rank in range(world.size) if not group.store().check([f"preflight/{rank}/{where}"])]


def _network(world: World, device: torch.device, run: Run) -> tuple[dict[str, Any], list[str]]:
    """Sums a megabyte over all ranks, with a time limit; returns what the network is like, and its faults.

    The sum runs in a thread, because NCCL connects inside the first call and has no time limit of its own there.
    """
    if world.size == 1:
        return {}, []
    failed: list[Exception] = []
    sums: list[Tensor] = []
    measured: list[Measured] = []

    def add() -> None:
        try:
            ones = torch.ones(_ELEMENTS, device=device)
            _arrive("adding", world)
            with noted_transport(device) as noted:
                dist.all_reduce(ones)
                added = ones.cpu()
                measured.append(measure(device, transport_in(noted, device)))
            sums.append(added)
        except RuntimeError as error:
            failed.append(error)

    deadline = time.monotonic() + _limit_s(world)
    thread = threading.Thread(target=add, name="preflight", daemon=True)
    thread.start()
    thread.join(_limit_s(world))
    if sums:
        wrong = int((sums[0] != world.size).sum())
        faults = [f"a sum over all ranks is wrong in {wrong} of {_ELEMENTS} elements"] if wrong else []
        return asdict(measured[0]), faults
    # A sum may also fail because another rank gave up just before: only a rank that never comes is to blame.
    while (late := _missing("adding", world)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if late:
        _refuse_ranks(late, "did not join the sum over all ranks", world, run)
    why = (
        str(failed[0]).splitlines()[0]
        if failed
        else f"it did not end in {_limit_s(world):.0f} s, though all ranks had begun"
    )
    raise PipelineError(
        f"rank {world.rank} on {socket.gethostname()}: a sum over all ranks failed: {why}; "
        "check the network between the nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    )


def _judge(findings: list[Findings], world: World, run: Run) -> None:
    bad = {rank: (f.host, "; ".join(f.faults)) for rank, f in enumerate(findings) if f.faults}
    for rank, skew in _wrong_clocks([f.skew for f in findings]).items():
        bad.setdefault(
            rank, (findings[rank].host, f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}")
        )
    problems = list(dict.fromkeys(p for f in findings for p in f.problems))
    for what, values in (("image", [f.image for f in findings]), ("dataset", [f.dataset for f in findings])):
        usual = statistics.mode(values)
        problems += [
            f"rank {rank} on {findings[rank].host} has another {what}: {value[:12] or 'none'}, "
            f"not {usual[:12] or 'none'}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    if bad or problems:
        _refuse(world.is_first, run, bad, problems)


def _wrong_clocks(skews: list[float | None]) -> dict[int, float]:
    """Returns by how many seconds wrong clocks differ from the majority, in which the file system's clock votes too."""
    known = [skew for skew in skews if skew is not None]
    if len(skews) == 1 or not known:
        return {}
    right = statistics.median_low([0.0, *known])
    wrong = {rank: skew - right for rank, skew in enumerate(skews) if skew is not None}
    return {rank: seconds for rank, seconds in wrong.items() if abs(seconds) > MAX_CLOCK_SKEW_S}


def _refuse_ranks(missing: list[int], what: str, world: World, run: Run) -> NoReturn:
    """Fails this rank because other ranks hang; the first rank that does not hang records their nodes."""
    hosts = {rank: group.store().get(f"preflight/{rank}").decode() for rank in missing}
    why = f"{what} in {_limit_s(world):.0f} s (its device or its network hangs)"
    records = world.rank == min(set(range(world.size)) - set(missing), default=0)
    _refuse(records, run, {rank: (host, why) for rank, host in hosts.items()}, [])


def _refuse(records: bool, run: Run, bad: dict[int, tuple[str, str]], problems: list[str]) -> NoReturn:
    """Fails this rank with the message that all ranks show; one rank records the bad nodes."""
    if bad and records:
        nodes = sorted({host for host, _ in bad.values()})
        append(run.events_file, BadNode(nodes=nodes, problems=[what for _, what in bad.values()]))
    lines = [*(f"rank {rank} on {host}: {what}" for rank, (host, what) in bad.items()), *problems]
    raise PipelineError(listing("preflight: training was not started:", lines))
