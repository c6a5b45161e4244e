"""How much memory a process needs: what this engine keeps, and when the peak occurs (docs/scaling.md).

Every figure is counted from the code, in bytes: model/layers.py and model/loss.py for what backward needs,
train/engine/engine.py and DeepSpeed's ZeRO optimizers for the rest. tests/plan/test_memory.py measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.sections import Config, ModelConfig
from pipeline.model.flops import num_parameters

# DeepSpeed's defaults, in elements; `deepspeed.zero_optimization` in the config can change them.
REDUCE_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
PREFETCH_ELEMENTS = 50_000_000
_PERSISTENT = 100_000
_CPU_CHUNK = 1 << 18  # elements per update on the CPU: as in optim/adamw.py, which needs torch
_RNG_STATE = 5056  # bytes; PyTorch keeps one per checkpointed block
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
class Activations:
    """Bytes that one micro-batch takes on top of the model's state."""

    kept: float
    """What the forward pass keeps for backward."""
    copies: float
    """bfloat16 copies of weights that backward needs; 0 in float32."""
    logits: float
    """Logits, held until the end of backward."""
    loss: float
    """Logits, their softmax and their gradient, when backward begins."""
    recomputing: float
    """Everything present while backward recomputes the last block, except the gradients of the block's weights; 0
    without activation checkpointing."""

    @property
    def peak(self) -> float:
        """The most at any one time."""
        return max(self.kept + self.copies + self.loss, self.recomputing)


def activations(model: ModelConfig, sequences: int, precision: str, checkpointing: bool) -> Activations:
    """Returns what forward and backward of a micro-batch keep, without torch.compile, which keeps less.

    In float32 a block keeps 11 d_model per token: for each norm its input, the normed input and the result (6), q, k
    and v (3), the attention's result twice (2); and 4 d_ff of the feed-forward. Under autocast the norms stay float32,
    each linear map has a bfloat16 copy of its input, and everything else is bfloat16. Two reciprocal norms and the
    log-sums of the heads are float32.
    """
    bf16 = precision == "bf16"
    d, f, layers, heads = model.d_model, model.d_ff, model.num_layers, model.num_heads
    tokens = sequences * model.context_length
    tables = 8 * model.context_length * (d // heads)  # cosines and sines of the positions, for q and k
    per_token = (36 * d + 8 * f if bf16 else 44 * d + 16 * f) + 4 * heads + 8
    block = per_token * tokens + tables
    ids = 16 * tokens  # inputs and targets
    last_norm = (10 * d + 4 if bf16 else 12 * d + 4) * tokens
    matrices = 4 * d * d + 3 * d * f
    block_copies, head_copy = (2 * matrices, 2 * model.vocab_size * d) if bf16 else (0, 0)
    width = 2 if bf16 else 4
    logits = width * model.vocab_size * tokens
    loss = 12 * model.vocab_size * tokens
    copies = layers * block_copies + head_copy
    if not checkpointing:
        return Activations(layers * block + last_norm + ids, copies, logits, loss, recomputing=0)
    inputs = layers * (4 * d * tokens + _RNG_STATE) + ids
    # The block, the gradients that pass back through it, and its copies.
    recomputing = inputs + logits + block + (8 * d + width * f) * tokens + block_copies
    return Activations(inputs + last_norm, head_copy, logits, loss, recomputing)


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes."""

    weights: float
    """Weights of the model."""
    gradients: float
    """Gradients between two micro-batches."""
    optimizer: float
    """Moments, and from stage 1 on the weights that the optimizer updates."""
    activations: float
    """Activations, the loss included."""
    buffers: float
    """Buffers of the collectives, and the weights that ZeRO-3 gathers."""
    peak: float
    """The most at any one time."""
    moment: str
    """When the peak occurs."""
    host: float
    """Host memory: the copy of a save, and the offloaded optimizer. On the CPU it is part of the peak."""


def process_memory(config: Config, ranks: int, stage: int | None = None, on_cpu: bool = False) -> Memory:
    """Returns the memory of each of `ranks` processes that train this config.

    Args:
        config: The experiment.
        ranks: Number of processes, one per device.
        stage: ZeRO stage; None takes the config's.
        on_cpu: The device is the CPU: untouched buffers take no memory, and host memory is the device's own.
    """
    train, model = config.train, config.model
    stage = train.zero_stage if stage is None else stage
    total = num_parameters(model.vocab_size, model.d_model, model.num_layers, model.d_ff)
    own = total / ranks if stage else total  # elements this process updates
    acts = activations(model, train.micro_batch_size, train.precision, train.activation_checkpointing)
    # All in float32; from stage 1 on DeepSpeed updates a second copy of the weights.
    each = BytesPerParameter(optimizer=12 if stage else 8)
    weights, gradients, optimizer = model_state(total, ranks, stage, each)
    host = CHECKPOINT_BYTES * total / ranks
    updating = 4 * own * (2 if stage else 1) + 4 * (min(own, _CPU_CHUNK) if on_cpu else own)
    if train.offload_optimizer and stage:
        host += optimizer + 4 * own
        optimizer, updating = 0.0, 0.0
        gradients = gradients if stage == 1 else 0.0
    buffers = _buffers(config, total, stage, ranks, on_cpu)
    base = weights + optimizer + buffers.lasting
    # ZeRO-3 allocates gradients once; the other stages when a micro-batch leaves some behind for the next.
    left = gradients if stage == 3 or train.batch_size > train.micro_batch_size * ranks else 0.0
    passing = base + left + buffers.passing
    # Stage 2 allocates a rank's whole part of the gradients when the first of them arrives: on the rank that owns the
    # last layers, while all activations are still held.
    early = gradients if stage == 2 else 0.0
    fresh = _fresh_gradients(model, stage, left)
    recomputation = passing + early + acts.recomputing + fresh if acts.recomputing else 0.0
    moments = {
        "start-up": 4.0 * total * (2 if stage in (1, 2) and on_cpu else 1) + (4 * own if stage == 3 else 0.0),
        "forward": passing + acts.kept + acts.copies + acts.logits,
        "backward": passing + acts.kept + acts.copies + acts.loss,
        "first gradients": passing + early + acts.kept + acts.copies + acts.logits,
        "recomputation": recomputation,
        "reduction": passing + gradients - left + buffers.reducing + acts.logits,
        "optimizer step": base + updating,
    }
    moment = max(moments, key=lambda m: moments[m])
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=acts.peak,
        buffers=buffers.lasting + buffers.passing + buffers.reducing,
        peak=moments[moment] + (host if on_cpu else 0.0),
        moment=moment,
        host=host,
    )


@dataclass(frozen=True)
class _Buffers:
    """Bytes that the collectives need."""

    lasting: float = 0.0
    """Always held."""
    passing: float = 0.0
    """Held during forward and backward."""
    reducing: float = 0.0
    """Held while gradients are reduced."""


def _fresh_gradients(model: ModelConfig, stage: int, left: float) -> float:
    """Returns the bytes of a block's weight gradients in backward: of one weight only if each is added or handed on."""
    d, f = model.d_model, model.d_ff
    return 4.0 * (max(d * d, d * f) if left or stage >= 2 else 4 * d * d + 3 * d * f)


def _buffers(config: Config, total: int, stage: int, ranks: int, on_cpu: bool) -> _Buffers:
    if stage == 0:
        return _Buffers(reducing=4.0 * min(total, REDUCE_ELEMENTS) if ranks > 1 else 0.0)
    bucket_size = zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS)
    filled = 4.0 * min(total, bucket_size)
    bucket = filled if on_cpu else 4.0 * bucket_size  # a host does not provide memory that is never written
    if stage == 3:
        # Reduced from a copy of the bucket, with room for the padding and the result.
        whole = _persistent(config.model, zero_setting(config, "param_persistence_threshold", _PERSISTENT))
        live = min(total - whole, zero_setting(config, "max_live_parameters", LIVE_ELEMENTS))
        # Prefetched weights arrive in one buffer and are copied out of it.
        prefetched = min(total - whole, zero_setting(config, "prefetch_bucket_size", PREFETCH_ELEMENTS))
        return _Buffers(lasting=bucket + 4.0 * whole, passing=4.0 * (live + prefetched), reducing=2 * filled)
    return _Buffers(passing=bucket * (2 if config.train.overlap_comm else 1), reducing=filled)


def zero_setting(config: Config, key: str, default: int) -> int:
    """Returns a DeepSpeed ZeRO setting that the config may pass through under its name or its alias for stage 3."""
    given = config.deepspeed.get("zero_optimization", {})
    return int(given.get(key, given.get(f"stage3_{key}", default)))


def checkpoint_bytes(config: Config) -> int:
    """Returns the bytes of one checkpoint, all ranks together, without the kilobytes of its manifest and headers."""
    model = config.model
    return CHECKPOINT_BYTES * num_parameters(model.vocab_size, model.d_model, model.num_layers, model.d_ff)


def _persistent(model: ModelConfig, threshold: int) -> int:
    """Returns the number of elements in parameters so small that ZeRO-3 keeps them whole."""
    d, f = model.d_model, model.d_ff
    sizes = [
        (2, model.vocab_size * d),
        (4 * model.num_layers, d * d),
        (3 * model.num_layers, d * f),
        (2 * model.num_layers + 1, d),
    ]
    return sum(count * size for count, size in sizes if size <= threshold)
