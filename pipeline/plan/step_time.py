"""How long a training step takes on many devices: arithmetic, memory traffic, ring collectives (docs/scaling.md).

It covers data parallelism, the only kind this engine has. The shares of the rated figures that a run reaches come from
published runs: what the slowest and the fastest reach gives bounds, what a calibration found gives an expectation
(`python -m benchmarks.published`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config.sections import Config
from pipeline.model.flops import block_matrices, elements, flops_per_token, num_parameters
from pipeline.plan.activations import activations, working_bytes
from pipeline.plan.buffers import REDUCE_ELEMENTS, keeps_gathered, overlaps_reduction, reduced_bytes, zero_setting
from pipeline.plan.devices import Device

# Seconds that a message takes between ring neighbors: NCCL's tuning table, Ring/Simple.
LATENCY_INTRA_S = 3.4e-6
LATENCY_INTER_S = 14e-6
# Bytes that norms, activation functions, residuals and the loss move, per byte that a block keeps and per byte of bf16
# logits. torch.compile fuses half of them away.
TRAFFIC = 14
TRAFFIC_COMPILED = 7
# Bytes that stage 3 moves per parameter and micro-batch: weights and gradients are copied out of and into the buffers
# of their messages, widened and added.
TRAFFIC_STAGE_3 = 45
# Bytes that the optimizer step moves per element: the norm reads the gradient (4); the fused update reads and writes
# weight and moments (24), reads the gradient and writes it back, divided (8). From stage 1 on, DeepSpeed also copies
# gradients together (8) and the new float32 weight to the working weight (8 in float32, 6 in bf16).
UPDATE_BYTES = 36
UPDATE_BYTES_PARTITIONED = 52


@dataclass(frozen=True)
class Reached:
    """What a run reaches of the rated figures."""

    products: float
    """Share of the device's peak in matrix products."""
    links: float
    """Share of the rated bandwidths."""
    hidden: float
    """Share of the communication that computation can hide, where the engine overlaps the two."""
    traffic: float
    """What forward and backward move in memory, as a multiple of what is expected."""


# Links, what is hidden of their time, and traffic. The links are what NCCL's tests reach.
SLOW, LIKELY, FAST = (0.60, 0.0, 1.5), (0.80, 0.9, 1.0), (0.95, 1.0, 0.8)


@dataclass(frozen=True)
class Network:
    """Devices that train together, and the links between them."""

    nodes: int
    """Number of nodes."""
    per_node: int
    """Devices per node."""
    intra_gb_per_s: float
    """Bandwidth from a device to the other devices of its node, one direction."""
    inter_gb_per_s: float
    """Bandwidth from a node to other nodes, one direction, all its adapters together."""

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return self.nodes * self.per_node

    def ring_s(self, size: float, links: float) -> float:
        """Returns the seconds of a ring all-gather whose result has `size` bytes.

        A reduce-scatter takes as long, an all-reduce twice as long (Patarasuk & Yuan 2009). Every ring leaves a node
        once, so a node's adapters carry what one device sends.

        Args:
            size: Bytes of the whole result.
            links: Attainable share of the rated bandwidth.
        """
        if self.ranks == 1:
            return 0.0
        slowest = self.intra_gb_per_s if self.nodes == 1 else self.inter_gb_per_s
        if self.per_node > 1:
            slowest = min(slowest, self.intra_gb_per_s)
        hops = self.ranks - 1
        between_nodes = self.nodes - 1
        latency = between_nodes * LATENCY_INTER_S + (hops - between_nodes) * LATENCY_INTRA_S
        return latency + hops / self.ranks * size / (slowest * 1e9 * links)


@dataclass(frozen=True)
class Volumes:
    """Collectives of one optimizer step, each as the bytes of its whole result and the number of calls."""

    all_reduce: tuple[float, int] = (0.0, 0)
    """Gradients at stages 0 to 2."""
    reduce_scatter: tuple[float, int] = (0.0, 0)
    """Gradients at stage 3."""
    all_gather: tuple[float, int] = (0.0, 0)
    """Weights."""
    node_all_gather: tuple[float, int] = (0.0, 0)
    """Weights, gathered inside each node: for backward, with `zero_hpz_partition_size`."""


def step_volumes(config: Config, micro_batches: int, stage: int | None = None) -> Volumes:
    """Returns the collectives of one step, as DeepSpeed runs them by default.

    Weights are gathered in their working dtype. Gradients are reduced in the same dtype, or in float32 if
    `communication_data_type` says so.

    Stages 0 and 1 reduce gradients once per step, 2 and 3 after every micro-batch. Stages 1 and 2 all-reduce their
    buckets (`use_multi_rank_bucket_allreduce`) and gather the weights after the update. Stage 3 gathers the weights for
    forward and again for backward, unless the model is small enough to be kept in between.
    """
    stage = config.train.zero_stage if stage is None else stage
    model = config.model
    total = num_parameters(model)
    width = working_bytes(config, stage)
    size, reduced = float(width * total), float(reduced_bytes(config, width) * total)
    if stage == 0:
        return Volumes(all_reduce=(reduced, -(-total // REDUCE_ELEMENTS)))
    buckets = -(-total // zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS))
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        return Volumes(all_reduce=(times * reduced, times * buckets), all_gather=(size, buckets))
    kept = keeps_gathered(config)
    once = (micro_batches * size, micro_batches * (1 if kept else model.num_layers + 2))
    scattered = (micro_batches * reduced, micro_batches * buckets)
    if kept:
        return Volumes(reduce_scatter=scattered, all_gather=once)
    if zero_setting(config, "zero_hpz_partition_size", 1) > 1:
        return Volumes(reduce_scatter=scattered, all_gather=once, node_all_gather=once)
    return Volumes(reduce_scatter=scattered, all_gather=(2 * once[0], 2 * once[1]))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute_s: float
    """Forward and backward."""
    update_s: float
    """Clipping and the optimizer."""
    communication_s: float
    """All collectives."""
    total_s: float
    """The whole step, without the communication that overlaps with computation."""

    @property
    def efficiency(self) -> float:
        """The share of the step in which devices compute."""
        return self.compute_s / self.total_s


def step_time_bounds(config: Config, device: Device, network: Network, batch_size: int) -> list[StepTime]:
    """Returns the step times at the ends of what published runs reach, fastest first."""
    times = [
        step_time(config, device, network, batch_size, Reached(products, *rest))
        for products in (device.products.lowest, device.products.highest)
        for rest in (SLOW, FAST)
    ]
    return sorted(times, key=lambda time: time.total_s)


def expected_step_time(config: Config, device: Device, network: Network, batch_size: int) -> StepTime | None:
    """Returns the step time that published runs lead one to expect; None if too few are known: all are in bf16."""
    products = device.products.expected
    if products is None or config.train.precision != "bf16":
        return None
    return step_time(config, device, network, batch_size, Reached(products, *LIKELY))


def step_time(config: Config, device: Device, network: Network, batch_size: int, reached: Reached) -> StepTime:
    """Returns the time of one step.

    Args:
        config: The experiment.
        device: The device of every rank.
        network: Nodes and links.
        batch_size: Sequences in the global batch; divisible by ranks and micro-batch.
        reached: What the run reaches of the rated figures.
    """
    train = config.train
    micro_batches = batch_size // network.ranks // train.micro_batch_size
    compute = micro_batches * _micro_batch_s(config, device, reached)
    own = num_parameters(config.model) / (network.ranks if train.zero_stage else 1)
    moved = UPDATE_BYTES_PARTITIONED if train.zero_stage else UPDATE_BYTES
    update = moved * own / (device.memory_gb_per_s * 1e9)
    volumes = step_volumes(config, micro_batches)
    node = replace(network, nodes=1)
    rings = (
        (volumes.all_reduce, 2, network),
        (volumes.reduce_scatter, 1, network),
        (volumes.all_gather, 1, network),
        (volumes.node_all_gather, 1, node),
    )
    communication = sum(
        passes * calls * where.ring_s(size / calls, reached.links) for (size, calls), passes, where in rings if calls
    )
    hidden = reached.hidden if overlaps_reduction(config, train.zero_stage) else 0.0
    exposed = max((1 - hidden) * communication, communication - compute)
    return StepTime(compute, update, communication, compute + update + exposed)


def _micro_batch_s(config: Config, device: Device, reached: Reached) -> float:
    """Returns the seconds of forward and backward: matrix products at a share of the peak, and what the rest moves."""
    model, train = config.model, config.train
    stage = train.zero_stage
    tokens = train.micro_batch_size * model.context_length
    flops = float(flops_per_token(model))
    moved = model.num_layers * activations(config, stage).block
    if train.activation_checkpointing != "none":
        moved *= 4 / 3
    if train.activation_checkpointing == "full":  # forward of the blocks; the loss computes its gradients in forward
        flops += 2 * model.num_layers * (elements(block_matrices(model)) + 2 * model.d_q * model.context_length)
    moved = (TRAFFIC_COMPILED if train.compile else TRAFFIC) * (moved + 2 * model.vocab_size * tokens)
    if stage == 3:
        moved += TRAFFIC_STAGE_3 * num_parameters(model)
    products_s = tokens * flops / (device.flops_per_s(train.precision) * reached.products)
    return products_s + reached.traffic * moved / (device.memory_gb_per_s * 1e9)
