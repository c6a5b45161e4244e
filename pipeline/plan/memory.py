"""How much memory a process needs: what this engine keeps, and when the peak occurs (docs/scaling.md).

Every figure is counted from the code, in bytes: train/engine and DeepSpeed's ZeRO optimizers for the state and the
buffers (`buffers.py`), `activations.py` for the rest. tests/plan/test_memory.py measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.model_section import ModelConfig
from pipeline.config.sections import Config
from pipeline.model.flops import num_parameters
from pipeline.plan.activations import Activations, activations, working_bytes
from pipeline.plan.buffers import (
    REDUCE_ELEMENTS,
    block_elements,
    bucket_bytes,
    gathered,
    keeps_gathered,
    largest_of_block,
    overlaps_reduction,
    persistent_elements,
    reducing,
    summed,
    zero_setting,
)

_UPDATED_ELEMENTS = 1_000_000_000  # DeepSpeed's default of `sub_group_size`
CHECKPOINT_BYTES = 12  # per parameter: weight and two moments in float32


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes that a parameter takes in each of the three kinds of state that ZeRO partitions."""

    weights: int = 4
    gradients: int = 4
    optimizer: int = 8


def model_state(parameters: int, ranks: int, stage: int, each: BytesPerParameter) -> tuple[float, float, float]:
    """Returns the bytes of weights, gradients and optimizer on each device (Rajbhandari et al. 2020, figure 1).

    Args:
        parameters: Parameters of the whole model.
        ranks: Devices that share it.
        stage: ZeRO stage: 1 partitions the optimizer, 2 gradients too, 3 weights too.
        each: Bytes per parameter.
    """
    weights = each.weights * parameters / (ranks if stage >= 3 else 1)
    gradients = each.gradients * parameters / (ranks if stage >= 2 else 1)
    optimizer = each.optimizer * parameters / (ranks if stage >= 1 else 1)
    return weights, gradients, optimizer


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes."""

    weights: float
    """Working weights of the model."""
    gradients: float
    """Gradients between two micro-batches."""
    optimizer: float
    """Moments, and from stage 1 on the float32 weights that the optimizer updates."""
    activations: float
    """Activations, the loss included."""
    buffers: float
    """Buffers of the collectives, and the weights that ZeRO-3 gathers."""
    peak: float
    """The most at any one time."""
    moment: str
    """When the peak occurs."""
    host: float
    """Host memory, at start-up or in training: the copy of a save, the offloaded optimizer, weights on their way to the
    device. On the CPU the first two are part of the peak."""


@dataclass(frozen=True)
class _State:
    """What a rank holds, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    own: float
    """Elements that this rank updates."""
    width: int
    """Bytes of a working weight, and of its gradient when it is computed."""
    left: float
    """Gradients that a micro-batch leaves behind for the next."""


def process_memory(config: Config, ranks: int, stage: int | None = None, on_cpu: bool = False) -> Memory:
    """Returns the memory of each of `ranks` processes that train this config.

    Args:
        config: The experiment.
        ranks: Number of processes, one per device.
        stage: ZeRO stage; None takes the config's.
        on_cpu: The device is the CPU: untouched buffers take no memory, and host memory is the device's own.
    """
    stage = config.train.zero_stage if stage is None else stage
    total, state = num_parameters(config.model), _state(config, ranks, stage)
    acts = activations(config, stage, on_cpu)
    copy = CHECKPOINT_BYTES * total / ranks
    offloaded, weights, gradients, optimizer = 0.0, state.weights, state.gradients, state.optimizer
    if config.train.offload_optimizer and stage:
        offloaded = optimizer + 4 * state.own
        optimizer, gradients = 0.0, gradients if stage == 1 else 0.0
    base = weights + optimizer + (gradients if stage == 3 else 0.0)
    moments, buffers = _moments(config, ranks, stage, on_cpu, base, state, acts)
    moments["start-up"] = weights * (2 if stage in (1, 2) and on_cpu else 1) + (4 * state.own if stage else 0.0)
    if offloaded:
        moments["optimizer step"] = base
    moment = max(moments, key=lambda m: moments[m])
    host = max(copy + offloaded, _starting(config.model, stage, ranks, state.width) + offloaded)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=acts.peak,
        buffers=buffers,
        peak=moments[moment] + (copy + offloaded if on_cpu else 0.0),
        moment=moment,
        host=host,
    )


def _state(config: Config, ranks: int, stage: int) -> _State:
    """Returns what a rank holds; gradients add up in float32, and at stage 1 in the dtype of the weights."""
    width, total = working_bytes(config, stage), num_parameters(config.model)
    each = BytesPerParameter(width, width if stage == 1 else 4, 12 if stage else 8)
    weights, gradients, optimizer = model_state(total, ranks, stage, each)
    several = config.train.batch_size > config.train.micro_batch_size * ranks
    # ZeRO-3 allocates gradients once; the other stages when the first of them arrive.
    left = gradients if several and stage < 3 else 0.0
    return _State(weights, gradients, optimizer, total / ranks if stage else total, width, left)


def _moments(
    config: Config, ranks: int, stage: int, on_cpu: bool, base: float, state: _State, acts: Activations
) -> tuple[dict[str, float], float]:
    """Returns the bytes at each moment of a step at which the peak can be, and the bytes of buffers."""
    model, total = config.model, num_parameters(config.model)
    width, left, bf16 = state.width, state.left, state.width == 2
    head, block = width * model.vocab_size * model.d_model, width * block_elements(model)
    # Of the gradients of the last block and the head: one weight's only, if each is added or handed on.
    handed_on = width * largest_of_block(model)
    # Autograd holds a tied head's gradient until it has the embedding's, at the end of backward, and adds them up.
    tied = head if model.tie_embeddings else 0
    recomputing = acts.recomputing and acts.recomputing + (handed_on + tied if left or stage >= 2 else head + block)
    both = left + 2 * tied if left else state.gradients + tied  # at stages 0 and 1, with all other gradients
    if stage == 0:
        copy = 4.0 * min(total, REDUCE_ELEMENTS) if ranks > 1 else 0.0
        return {
            "loss": base + left + acts.kept + acts.loss,
            "recomputation": base + left + recomputing,
            "reduction": base + state.gradients + copy,
            "optimizer step": base + state.gradients,
            "last gradients": base + both,
        }, copy
    bucket = bucket_bytes(config, total, width, on_cpu)
    if stage == 3:
        whole = width * persistent_elements(config)
        live, live_blocks, message, prefetched = gathered(config, width)
        block = min(block, int(live))  # nothing is gathered where every weight is kept whole
        again = 0.0 if keeps_gathered(config) else max(prefetched, block)
        node_ranks = zero_setting(config, "zero_hpz_partition_size", 1)
        second = width * total / node_ranks if node_ranks > 1 else 0.0
        base += bucket + whole + second
        shares = 4 * head / width / ranks if bf16 else 0.0  # the head's gradient, reduced, in float32
        first = max(acts.head, tied + handed_on) if tied else 2 * head + shares
        return {
            "loss": base + live + acts.kept + acts.loss,
            "first gradients": base + live + min(prefetched, again) + acts.kept + first,
            # A message lies in memory until the last of its weights is used: the head's, or of the last block.
            "gathering": base + live + max(message, block) + (acts.before_last_block if tied else acts.kept),
            "recomputation": base + live_blocks + again + recomputing,
            "optimizer step": base + 4.0 * min(state.own, zero_setting(config, "sub_group_size", _UPDATED_ELEMENTS)),
            "last gradients": base + live + 2 * tied + shares,
        }, bucket + whole + second + live + max(message, again)
    if overlaps_reduction(config, stage):
        bucket *= 2
    base_and_left = base + left
    if stage == 1:
        # The gradients of this rank's part are copied together; float32 ones once more for the step.
        step = state.own * (2 + 2 + 4 if bf16 else 4 + 4)
        # They are reduced from the embedding on. Those in the bucket have left the place where they were computed.
        size = zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS)
        overlaps = overlaps_reduction(config, stage)
        moved = 0 if overlaps or model.vocab_size * model.d_model > size else width * min(size, total)
        return {
            "loss": base_and_left + (bucket if left else 0.0) + acts.kept + acts.loss,
            "recomputation": base_and_left + (bucket if left else 0.0) + recomputing,
            "reduction": base + state.gradients + width * state.own + max(0.0, bucket - moved),
            "optimizer step": base + step,
            "last gradients": base + bucket + both,
        }, bucket
    # A rank allocates its whole part of the gradients when the first of them is reduced: on the rank that owns the last
    # layers, while most activations are still held. Float32 ones are added to those of the micro-batches before.
    early = state.gradients if not (bf16 and left) else 0.0
    table = model.vocab_size * model.d_model
    base_and_bucket = base_and_left + bucket
    # The first gradients are those of an untied head, or else of the last block.
    first = tied + handed_on + summed(largest_of_block(model), state.own, width) if tied else early + acts.head
    return {
        "loss": base_and_left + acts.kept + acts.loss,
        "first gradients": base_and_bucket + acts.kept + first,
        "reduction": base_and_bucket + tied + handed_on + reducing(config, width, state.own, early, acts.kept),
        "recomputation": base_and_bucket + early + recomputing,
        "optimizer step": base + state.gradients * (1 if bf16 else 2),
        "last gradients": base_and_bucket + early + tied + max(tied, summed(table, state.own, width)),
    }, bucket


def _starting(model: ModelConfig, stage: int, ranks: int, width: int) -> float:
    """Returns the bytes of host memory at start-up, beside what the process takes without a model.

    Stages 1 and 2 flatten the weights there if the device has no room for them twice. At stage 3 a rank sees its share,
    and one parameter at a time. What stage 0 builds is on the device.
    """
    total = num_parameters(model)
    if stage == 3:
        return width * (total / ranks + model.vocab_size * model.d_model)
    return float(width * total) if stage else 0.0


def checkpoint_bytes(config: Config) -> int:
    """Returns the bytes of one checkpoint, all ranks together, without the kilobytes of its manifest and headers."""
    return CHECKPOINT_BYTES * num_parameters(config.model)
