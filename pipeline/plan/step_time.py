"""How long a training step takes on many devices: arithmetic, the optimiser's memory traffic, rings (docs/scaling.md).

Data parallelism only: that is what this engine does. Bounds, not predictions: both ends of what is attainable of each
rated figure, which published runs have measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.sections import Config
from pipeline.model.flops import flops_per_token, num_parameters
from pipeline.plan.devices import Device
from pipeline.plan.memory import LIVE_ELEMENTS, REDUCE_ELEMENTS, zero_setting

# Attainable parts of the rated figures, (at worst, at best): arithmetic from 30% (Megatron-Turing NLG) to 55% (the best
# of Chowdhery et al. 2022, table 3, and Touvron et al. 2023); links from what NCCL's tests reach on them.
ARITHMETIC = (0.30, 0.55)
LINKS = (0.60, 0.95)
# Seconds a message takes from one ring neighbour to the next: NCCL's tuning table, Ring/Simple.
LATENCY_INTRA_S = 3.4e-6
LATENCY_INTER_S = 14e-6
# Bytes the optimiser step moves an element: eight passes of optim/adamw.py and two of optim/clipping.py.
UPDATE_BYTES = 92


@dataclass(frozen=True)
class Network:
    """Devices that train together, and what connects them.

    Attributes:
        nodes: Number of nodes.
        per_node: Devices a node.
        intra_gb_per_s: From a device to the others of its node, one direction.
        inter_gb_per_s: From a node to other nodes, one direction, all its adapters together.
    """

    nodes: int
    per_node: int
    intra_gb_per_s: float
    inter_gb_per_s: float

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.nodes * self.per_node

    def ring_s(self, size: float, links: float) -> float:
        """Seconds in which every rank sends `size` bytes to each place of the ring but one: an all-gather of that much.

        A reduce-scatter takes as long, an all-reduce twice as long (Patarasuk & Yuan 2009). Every ring leaves a node
        once, so that a node's adapters carry what one device sends.

        Args:
            size: Bytes of the whole result.
            links: Attainable part of the rated bandwidth.
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
    """Collectives of one optimizer step: bytes of the whole result, and how many calls carry them.

    Attributes:
        all_reduce: Gradients at stages 0 to 2.
        reduce_scatter: Gradients at stage 3.
        all_gather: Weights.
    """

    all_reduce: tuple[float, int] = (0.0, 0)
    reduce_scatter: tuple[float, int] = (0.0, 0)
    all_gather: tuple[float, int] = (0.0, 0)

    def sent_per_rank(self, ranks: int) -> float:
        """Bytes each rank sends in rings."""
        once = self.reduce_scatter[0] + self.all_gather[0]
        return (ranks - 1) / ranks * (2 * self.all_reduce[0] + once)


def step_volumes(config: Config, micro_batches: int, stage: int | None = None) -> Volumes:
    """What one step sends: everything in float32, as DeepSpeed does by default.

    Stages 0 and 1 reduce gradients once a step, 2 and 3 after every micro-batch. Stages 1 and 2 all-reduce their
    buckets (`use_multi_rank_bucket_allreduce`) and gather the weights after the update. Stage 3 gathers them for
    forward and again for backward, unless the model is small enough to be kept in between.
    """
    stage = config.train.zero_stage if stage is None else stage
    model = config.model
    total = num_parameters(model.vocab_size, model.d_model, model.num_layers, model.d_ff)
    size = 4.0 * total
    if stage == 0:
        return Volumes(all_reduce=(size, -(-total // REDUCE_ELEMENTS)))
    buckets = -(-total // zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS))
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        return Volumes(all_reduce=(times * size, times * buckets), all_gather=(size, buckets))
    kept = total <= min(
        zero_setting(config, key, LIVE_ELEMENTS) for key in ("max_live_parameters", "max_reuse_distance")
    )
    gathers = micro_batches * (1 if kept else 2)
    calls = gathers * (1 if kept else model.num_layers + 2)
    return Volumes(reduce_scatter=(micro_batches * size, micro_batches * buckets), all_gather=(gathers * size, calls))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute_s: Forward and backward.
        update_s: Clipping and the optimiser.
        communication_s: All collectives.
        total_s: All together, without the communication that hides behind the computation.
    """

    compute_s: float
    update_s: float
    communication_s: float
    total_s: float

    @property
    def efficiency(self) -> float:
        """The part of the step in which devices compute."""
        return self.compute_s / self.total_s


def step_time(
    config: Config, device: Device, network: Network, batch_size: int, arithmetic: float, links: float, overlaps: bool
) -> StepTime:
    """Time of one step.

    Args:
        config: The experiment.
        device: Every rank's.
        network: Nodes and links.
        batch_size: Sequences of the global batch; divisible by ranks and micro-batch.
        arithmetic: Attainable part of the device's peak.
        links: Attainable part of the rated bandwidths.
        overlaps: Whether communication hides behind the computation, as far as it can.
    """
    train, model = config.train, config.model
    shape = (model.d_model, model.num_layers, model.d_ff)
    share = batch_size // network.ranks
    per_token = flops_per_token(model.vocab_size, model.context_length, *shape)
    # Recomputing forward is a third more work; the published ranges count useful work.
    recomputed = 4 / 3 if train.activation_checkpointing else 1.0
    compute = per_token * recomputed * share * model.context_length / (device.flops_per_s(train.precision) * arithmetic)
    own = num_parameters(model.vocab_size, *shape) / (network.ranks if train.zero_stage else 1)
    update = UPDATE_BYTES * own / (device.memory_gb_per_s * 1e9)
    volumes = step_volumes(config, share // train.micro_batch_size)
    communication = sum(
        passes * calls * network.ring_s(size / calls, links)
        for (size, calls), passes in ((volumes.all_reduce, 2), (volumes.reduce_scatter, 1), (volumes.all_gather, 1))
        if calls
    )
    exposed = max(0.0, communication - compute) if overlaps else communication
    return StepTime(compute, update, communication, compute + update + exposed)
