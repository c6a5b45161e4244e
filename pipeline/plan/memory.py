"""How much memory a process needs: what this engine keeps, and when the peak occurs (docs/scaling.md).

Every figure is counted from the code, in bytes: train/engine and DeepSpeed's ZeRO optimizers for the state and the
buffers, `activations.py` for the rest. tests/plan/test_memory.py measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.model_section import ModelConfig
from pipeline.config.sections import Config
from pipeline.model.flops import block_matrices, block_vectors, elements, num_parameters, parameter_counts
from pipeline.plan.activations import Activations, activations, working_bytes

# DeepSpeed's defaults, in elements; `deepspeed.zero_optimization` in the config can change them.
REDUCE_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
PREFETCH_ELEMENTS = 50_000_000
_UPDATED_ELEMENTS = 1_000_000_000
_PERSISTENT = 100_000
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
    head, block = width * model.vocab_size * model.d_model, width * _block(model)
    # Of the gradients of the last block and the head: one weight's only, if each is added or handed on.
    handed_on = width * model.d_model * max(model.d_q, model.d_ff)
    recomputing = acts.recomputing and acts.recomputing + (handed_on if left or stage >= 2 else head + block)
    if stage == 0:
        reducing = 4.0 * min(total, REDUCE_ELEMENTS) if ranks > 1 else 0.0
        return {
            "loss": base + left + acts.kept + acts.loss,
            "recomputation": base + left + recomputing,
            "reduction": base + state.gradients + reducing,
            "optimizer step": base + state.gradients,
        }, reducing
    bucket = _bucket(config, total, width, on_cpu)
    if stage == 3:
        whole = width * _persistent(model, zero_setting(config, "stage3_param_persistence_threshold", _PERSISTENT))
        live, arriving = _gathered(config, width)
        block = min(block, int(live))  # nothing is gathered where every weight is kept whole
        node_ranks = zero_setting(config, "zero_hpz_partition_size", 1)
        second = width * total / node_ranks if node_ranks > 1 else 0.0
        base += bucket + whole + second
        shares = 4 * head / width / ranks if bf16 else 0.0  # the head's gradient, reduced, in float32
        return {
            "loss": base + live + acts.kept + acts.loss,
            "first gradients": base + live + arriving + acts.kept + 2 * head + shares,
            "gathering": base + live + block + acts.kept,
            "recomputation": base + live + max(arriving, block) + recomputing,
            "optimizer step": base + 4.0 * min(state.own, zero_setting(config, "sub_group_size", _UPDATED_ELEMENTS)),
        }, bucket + whole + second + live + max(arriving, block)
    if overlaps_reduction(config, stage):
        bucket *= 2
    base_and_left = base + left
    if stage == 1:
        # The gradients of this rank's part are copied together; float32 ones once more for the step.
        step = state.own * (2 + 2 + 4 if bf16 else 4 + 4)
        return {
            "loss": base_and_left + (bucket if left else 0.0) + acts.kept + acts.loss,
            "recomputation": base_and_left + (bucket if left else 0.0) + recomputing,
            "reduction": base + state.gradients + width * state.own + bucket,
            "optimizer step": base + step,
        }, bucket
    # A rank allocates its whole part of the gradients when the first of them arrives: on the rank that owns the last
    # layers, while all activations are still held. Float32 ones are added to those of the micro-batches before.
    early = state.gradients if not (bf16 and left) else 0.0
    return {
        "loss": base_and_left + acts.kept + acts.loss,
        "first gradients": base_and_left + early + bucket + acts.kept + acts.head,
        "recomputation": base_and_left + early + bucket + recomputing,
        "optimizer step": base + state.gradients * (1 if bf16 else 2),
    }, bucket


def overlaps_reduction(config: Config, stage: int) -> bool:
    """Returns whether gradients are reduced beside backward: by DeepSpeed's default at stage 3, never at stage 0."""
    overlap = config.train.overlap_comm
    return stage == 3 if overlap is None else overlap and stage > 0


def _bucket(config: Config, total: int, width: int, on_cpu: bool) -> float:
    """Returns the bytes of the buffer in which gradients are reduced, and of its copy for a wider reduction."""
    size = zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS)
    filled = min(total, size)
    copied = 4.0 * filled if reduced_bytes(config, width) > width else 0.0
    return width * (filled if on_cpu else size) + copied  # a host does not provide memory that is never written


def reduced_bytes(config: Config, width: int) -> int:
    """Returns the bytes that a gradient has while it is reduced."""
    return 4 if config.deepspeed.get("communication_data_type") == "fp32" else width


def _gathered(config: Config, width: int) -> tuple[float, float]:
    """Returns the bytes of the weights that ZeRO-3 holds gathered, and of those that arrive.

    What arrives lies in one buffer and is copied out of it.
    """
    model = config.model
    parts = num_parameters(model) - _persistent(
        model, zero_setting(config, "stage3_param_persistence_threshold", _PERSISTENT)
    )
    largest = max(model.vocab_size * model.d_model, _block(model))
    if parts == 0:
        return 0.0, 0.0
    live = max(largest, min(parts, zero_setting(config, "stage3_max_live_parameters", LIVE_ELEMENTS)))
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    blocks = max(0, parts - tables)
    arriving = min(blocks, zero_setting(config, "stage3_prefetch_bucket_size", PREFETCH_ELEMENTS))
    return float(width * live), float(width * arriving)


def _starting(model: ModelConfig, stage: int, ranks: int, width: int) -> float:
    """Returns the bytes of host memory at start-up, beside what the process takes without a model.

    Stages 1 and 2 flatten the weights there if the device has no room for them twice. At stage 3 a rank sees its share,
    and one parameter at a time. What stage 0 builds is on the device.
    """
    total = num_parameters(model)
    if stage == 3:
        return width * (total / ranks + model.vocab_size * model.d_model)
    return float(width * total) if stage else 0.0


def zero_setting(config: Config, key: str, default: int) -> int:
    """Returns a DeepSpeed ZeRO setting of the config, or DeepSpeed's default."""
    return int(config.deepspeed.get("zero_optimization", {}).get(key, default))


def checkpoint_bytes(config: Config) -> int:
    """Returns the bytes of one checkpoint, all ranks together, without the kilobytes of its manifest and headers."""
    return CHECKPOINT_BYTES * num_parameters(config.model)


def _block(model: ModelConfig) -> int:
    """Returns the elements of a block's weights."""
    return elements(block_matrices(model)) + elements(block_vectors(model))


def _persistent(model: ModelConfig, threshold: int) -> int:
    """Returns the number of elements in parameters so small that ZeRO-3 keeps them whole."""
    return elements(count for count in parameter_counts(model) if count.elements < threshold)
