"""The network between the ranks: which transport it uses, and how fast it is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.run.events import Network

_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
_FIRST_BYTES = 64 << 10
_GROWTH = 8
# A sum that takes so long is measured well enough: a slow network must not make the start fail.
_ENOUGH_S = 0.1
_DEBUG = "NCCL_DEBUG"
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Measured:
    """What one rank found about the network."""

    transport: str = ""
    """For example `gloo over TCP`; empty for a single rank."""
    seconds: float = 0.0
    """What a sum over all ranks took on the slowest of them."""
    bytes: int = 0
    """The size of what was summed."""
    infiniband: bool = False
    """Whether its node has an active InfiniBand port."""


def measure(device: torch.device, transport: str) -> Measured:
    """Times sums of more and more bytes over all ranks, up to a few megabytes; all ranks must call it.

    Args:
        device: Where this rank trains.
        transport: The transport of the group.
    """
    most = _BYTES[device.type]
    values, size = torch.zeros(most // 4, device=device), _FIRST_BYTES
    while (seconds := _seconds_of_sum(values[: size // 4])) < _ENOUGH_S and size < most:
        size = min(_GROWTH * size, most)
    return Measured(transport, seconds, size, _has_infiniband(_INFINIBAND))


def _seconds_of_sum(values: torch.Tensor) -> float:
    """Returns what a sum over all ranks takes on the slowest of them: the same number on all, which decide alike."""
    dist.all_reduce(values[:1])  # together: a rank that comes late would count as a slow network
    _finish(values)
    began = time.monotonic()
    dist.all_reduce(values)
    _finish(values)
    slowest = torch.tensor(time.monotonic() - began, dtype=torch.float64, device=values.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def judged(found: Sequence[Measured], hosts: Sequence[str]) -> Network:
    """Returns what all ranks together found, with a warning if the network is not the one that the nodes have."""
    ranks, nodes = len(found), len(set(hosts))
    # Each rank sends so much in a ring; NCCL's own tests call it the bus bandwidth.
    sent = 2 * (ranks - 1) / ranks * found[0].bytes
    transport = found[0].transport if nodes > 1 else found[0].transport.partition(" over ")[0] + " within a node"
    warning = None
    idle = sorted({host for one, host in zip(found, hosts, strict=True) if one.infiniband and _is_sockets(one)})
    if nodes > 1 and idle:
        warning = (
            f"{idle[0]} has an active InfiniBand port, and NCCL uses sockets: see NCCL_IB_DISABLE, NCCL_IB_HCA, and "
            "whether the image has libibverbs and sees /dev/infiniband"
        )
    rate = sent / max(one.seconds for one in found) / 1e9
    return Network(transport=transport, gb_per_s=round(rate, 3), ranks=ranks, nodes=nodes, warning=warning)


def sentence(network: Network) -> str:
    """Returns one line for a person."""
    where = f"{network.ranks} ranks on {network.nodes} node{'s' if network.nodes > 1 else ''}"
    warning = f"; warning: {network.warning}" if network.warning else ""
    return f"network: {network.transport}, {network.gb_per_s:.3g} GB/s per rank between {where}{warning}"


@contextlib.contextmanager
def noted_transport(device: torch.device) -> Iterator[Path | None]:
    """Yields the file in which NCCL notes what it chooses while it connects in the block; None for gloo.

    A user who has set NCCL_DEBUG gets that output where he wants it, and the transport stays unknown.
    """
    if device.type != "cuda" or _DEBUG in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nccl"
        os.environ |= {_DEBUG: "INFO", f"{_DEBUG}_SUBSYS": "INIT,NET", f"{_DEBUG}_FILE": str(file)}
        try:
            yield file
        finally:
            for name in (_DEBUG, f"{_DEBUG}_SUBSYS", f"{_DEBUG}_FILE"):
                os.environ.pop(name, None)


def transport_in(file: Path | None, device: torch.device) -> str:
    """Returns the transport that NCCL noted; gloo has only TCP."""
    if device.type != "cuda":
        return "gloo over TCP"
    try:
        text = "" if file is None else file.read_text(errors="replace")
    except OSError:
        text = ""
    chosen = re.findall(r"NCCL INFO Using network (\S+)", text)
    return f"NCCL over {chosen[-1]}" if chosen else "NCCL"


def _is_sockets(one: Measured) -> bool:
    return one.transport == "NCCL over Socket"


def _finish(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)


def _has_infiniband(folder: Path) -> bool:
    states = folder.glob("*/ports/*/state")
    layers = [state.with_name("link_layer") for state in states if "ACTIVE" in _text(state)]
    return any("InfiniBand" in _text(layer) for layer in layers)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
