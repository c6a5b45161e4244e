"""What a config needs and reaches on many nodes, before anyone waits for them: bounds and expectations.

Everything is a pure function of the config and of stated inputs; nothing is measured. docs/scaling.md explains the
model, its sources and its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.load import problems_of_ranks
from pipeline.config.sections import Config
from pipeline.model.flops import flops_per_token
from pipeline.plan.devices import GIB, Device
from pipeline.plan.failure_model import Failures
from pipeline.plan.memory import Memory, checkpoint_bytes, process_memory
from pipeline.plan.step_time import Network, expected_step_time, step_time_bounds

# On top of what PyTorch allocates: the context of CUDA or ROCm, NCCL's buffers, and what the allocator cannot use.
RESERVE_BYTES = 1 * GIB
FRAGMENTATION = 0.05
# One process, hashing, writing and syncing (benchmarks/checkpoint.py, 103M parameters, synchronous: 0.27 to 0.35).
WRITER_GB_PER_S = 0.35
# 419 unexpected interruptions in 54 days on 2,048 nodes (Grattafiori et al. 2024, section 3.3.4).
MTBF_NODE_HOURS = 54 * 24 * 2048 / 419


@dataclass(frozen=True)
class Cluster:
    """What a plan assumes about the cluster."""

    device: Device
    """The device of each rank."""
    per_node: int
    """Devices per node."""
    intra_gb_per_s: float
    """Bandwidth between the devices of a node, one direction."""
    inter_gb_per_s: float
    """Bandwidth from a node to other nodes, one direction, all adapters together."""
    storage_gb_per_s: float = 20.0
    """Bandwidth of the shared file system, for all writers together."""
    mtbf_node_hours: float = MTBF_NODE_HOURS
    """Mean hours until one node fails and ends its job."""
    restart_s: float = 300.0
    """Seconds from a failure to the first new step."""
    price_per_device_hour: float | None = None
    """What an hour of one device costs, in any currency; None if nobody asks."""

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are cores of the host."""
        return self.device.name.startswith("CPU")


Range = tuple[float, float]


@dataclass(frozen=True)
class Expected:
    """What published runs on such devices lead one to expect."""

    step_s: float
    """Seconds per step."""
    tokens_per_s: float
    """Tokens per second, all devices together."""
    mfu: float
    """Share of the devices' peak that goes into the model's own arithmetic."""
    days: float
    """Days until `max_iters`, failures included."""
    device_hours: float
    """Hours of all devices in those days."""
    cost: float | None
    """What they cost; None without a price."""


@dataclass(frozen=True)
class PlanRow:
    """Estimates for one number of nodes; a range is (lowest, highest)."""

    nodes: int
    """Number of nodes."""
    ranks: int
    """Number of processes, one per device."""
    batch_size: int
    """The config's global batch, or the next larger one that these ranks can share."""
    refused: tuple[str, ...]
    """Why so many processes would refuse to train the config."""
    memory: Memory
    """Memory of each process at the config's ZeRO stage."""
    peak_by_stage: tuple[float, ...]
    """Peak bytes at ZeRO stages 0 to 3."""
    fits: bool | None
    """Whether a process fits the device; None if the device's memory is not known."""
    step_s: Range
    """Seconds per step."""
    communication_s: Range
    """Seconds of a step's collectives."""
    tokens_per_s: Range
    """Tokens per second, all devices together."""
    tokens_per_device_s: Range
    """Tokens per second of each device."""
    efficiency: Range
    """Share of a step in which devices compute."""
    mfu: Range
    """Share of the devices' peak that goes into the model's own arithmetic, recomputation not counted."""
    days: Range
    """Days until `max_iters`, failures included."""
    node_hours: Range
    """Hours of all nodes in those days."""
    device_hours: Range
    """Hours of all devices in those days."""
    cost: Range | None
    """What the devices' hours cost; None without a price."""
    expected: Expected | None
    """What lies between these bounds, as expected; None where too few runs were published."""
    checkpoint_gb: float
    """Size of a checkpoint."""
    save_s: float
    """Seconds until a checkpoint is durable."""
    mtbf_hours: float
    """Mean hours between failures of the job."""
    best_interval_steps: int
    """Steps between checkpoints at which the share of new work is highest."""
    goodput: float
    """Expected share of time that is new work, at the config's interval."""
    best_goodput: float
    """The same at the best interval."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def make_plan(config: Config, nodes: Sequence[int], cluster: Cluster) -> list[PlanRow]:
    """Returns one row for each number of nodes."""
    return [_row(config, count, cluster) for count in nodes]


def fits_device(memory: Memory, device_gib: float) -> bool:
    """Returns whether the peak fits a device, with room for what PyTorch does not allocate."""
    return needed_bytes(memory) <= device_gib * GIB


def needed_bytes(memory: Memory) -> float:
    """Returns the bytes of the peak, plus what fragmentation, the driver's context and NCCL take."""
    return memory.peak * (1 + FRAGMENTATION) + RESERVE_BYTES


def save_seconds(config: Config, ranks: int, storage_gb_per_s: float) -> float:
    """Returns the seconds until a checkpoint is durable: each rank writes its part, all share the file system."""
    size = checkpoint_bytes(config) / 1e9
    return max(size / ranks / WRITER_GB_PER_S, size / storage_gb_per_s)


def shared_batch(config: Config, ranks: int) -> int:
    """Returns the config's global batch, or the next larger one that ranks and micro-batches divide."""
    unit = config.train.micro_batch_size * ranks
    return -(-config.train.batch_size // unit) * unit


def _row(config: Config, nodes: int, cluster: Cluster) -> PlanRow:
    network = Network(nodes, cluster.per_node, cluster.intra_gb_per_s, cluster.inter_gb_per_s)
    ranks, train = network.ranks, config.train
    batch = shared_batch(config, ranks)
    grown = config.model_copy(update={"train": train.model_copy(update={"batch_size": batch})})
    memory = process_memory(grown, ranks, on_cpu=cluster.on_cpu)
    times = step_time_bounds(grown, cluster.device, network, batch)
    fastest, slowest = times[0], times[-1]
    likely = expected_step_time(grown, cluster.device, network, batch)
    tokens = batch * config.model.context_length
    rates = (tokens / slowest.total_s, tokens / fastest.total_s)
    # Useful seconds at the peak, over the seconds that the devices are held.
    useful = flops_per_token(config.model) / cluster.device.flops_per_s(train.precision) / ranks
    size = checkpoint_bytes(config)
    failures = Failures(
        mtbf_s=cluster.mtbf_node_hours * 3600 / nodes,
        restart_s=cluster.restart_s,
        stall_s=size / ranks / (cluster.device.host_gb_per_s * 1e9),
        save_s=save_seconds(config, ranks, cluster.storage_gb_per_s),
    )
    typical = likely.total_s if likely else (fastest.total_s * slowest.total_s) ** 0.5
    best = failures.best_interval_s()
    goodput = failures.goodput(train.checkpoint_interval * typical)
    hours_per_second = train.max_iters / max(goodput, 1e-9) / 3600  # of a step
    hours = [hours_per_second * t.total_s for t in (fastest, slowest)]
    device_hours = _range([ranks * h for h in hours])
    price = cluster.price_per_device_hour
    expected = None
    if likely is not None:
        rate, likely_hours = tokens / likely.total_s, hours_per_second * likely.total_s
        likely_cost = None if price is None else price * ranks * likely_hours
        shares = (rate, useful * rate, likely_hours / 24, ranks * likely_hours)
        expected = Expected(likely.total_s, *shares, likely_cost)
    memory_gib = cluster.device.memory_gib
    return PlanRow(
        nodes=nodes,
        ranks=ranks,
        batch_size=batch,
        refused=tuple(map(str, problems_of_ranks(grown, ranks))),
        memory=memory,
        peak_by_stage=tuple(process_memory(grown, ranks, stage, cluster.on_cpu).peak for stage in range(4)),
        fits=fits_device(memory, memory_gib) if memory_gib else None,
        step_s=(fastest.total_s, slowest.total_s),
        communication_s=_range([t.communication_s for t in times]),
        tokens_per_s=rates,
        tokens_per_device_s=_range([rate / ranks for rate in rates]),
        efficiency=_range([t.efficiency for t in times]),
        mfu=_range([useful * rate for rate in rates]),
        days=_range([h / 24 for h in hours]),
        node_hours=_range([nodes * h for h in hours]),
        device_hours=device_hours,
        cost=None if price is None else _range([price * h for h in device_hours]),
        expected=expected,
        checkpoint_gb=size / 1e9,
        save_s=failures.save_s,
        mtbf_hours=failures.mtbf_s / 3600,
        best_interval_steps=max(1, round(best / typical)),
        goodput=goodput,
        best_goodput=failures.goodput(best),
    )


def _range(values: Sequence[float]) -> Range:
    return min(values), max(values)
