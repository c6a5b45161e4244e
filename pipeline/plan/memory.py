"""How much memory a process needs: what this engine keeps, and when it is most (docs/scaling.md).

Every figure is counted from the code, in bytes: model/layers.py and model/loss.py for what backward needs,
train/engine.py and DeepSpeed's ZeRO optimisers for the rest. tests/plan/test_memory.py measures them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.sections import Config, ModelConfig
from pipeline.model.flops import num_parameters

# DeepSpeed's defaults, in elements; `deepspeed.zero_optimization` in the config may set others.
REDUCE_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
PREFETCH_ELEMENTS = 50_000_000
_PERSISTENT = 100_000
_CPU_CHUNK = 1 << 18  # elements of an update on the CPU at a time: optim/adamw.py, which needs torch
_RNG_STATE = 5056  # bytes; PyTorch keeps one a checkpointed block
CHECKPOINT_BYTES = 12  # a parameter: weight and two moments in float32


@dataclass(frozen=True)
class Layout:
    """Bytes a parameter takes in each of the three things that ZeRO partitions."""

    weights: int = 4
    gradients: int = 4
    optimizer: int = 8


def engine_layout(stage: int) -> Layout:
    """What this engine keeps: all in float32; from stage 1 on DeepSpeed has a second copy of the weights to update."""
    return Layout(optimizer=8 if stage == 0 else 12)


def model_state(parameters: int, ranks: int, stage: int, layout: Layout) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimiser on each of `ranks` devices (Rajbhandari et al. 2020, figure 1).

    Args:
        parameters: Of the whole model.
        ranks: Devices that share it.
        stage: ZeRO stage: 1 partitions the optimiser, 2 gradients too, 3 weights too.
        layout: Bytes a parameter takes.
    """
    weights = layout.weights * parameters / (ranks if stage >= 3 else 1)
    gradients = layout.gradients * parameters / (ranks if stage >= 2 else 1)
    optimizer = layout.optimizer * parameters / (ranks if stage >= 1 else 1)
    return weights, gradients, optimizer


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes beside the model's state.

    Attributes:
        kept: For backward, from the forward pass on.
        copies: bfloat16 copies of weights that backward needs; 0 in float32.
        logits: Held until the end of backward.
        loss: Logits, their softmax and their gradient, when backward begins.
        again: All there is while the last block is computed again in backward, but the gradients of its weights; 0
            without activation checkpointing.
    """

    kept: float
    copies: float
    logits: float
    loss: float
    again: float

    @property
    def most(self) -> float:
        """The most of them at any one time."""
        return max(self.kept + self.copies + self.loss, self.again)


def activations(model: ModelConfig, sequences: int, precision: str, checkpointing: bool) -> Activations:
    """What forward and backward of a micro-batch keep, without torch.compile, which keeps less.

    A block keeps, in float32, 11 d_model a token: for each norm its input, what is normed, and the result (6), q, k and
    v (3), the attention's result twice (2); and 4 d_ff of the feed-forward. Under autocast the norms stay float32, each
    linear map has a bfloat16 copy of its input, and all else is bfloat16. Two reciprocal norms and the log-sums of the
    heads are float32.
    """
    bf16 = precision == "bf16"
    d, f, layers, heads = model.d_model, model.d_ff, model.num_layers, model.num_heads
    tokens = sequences * model.context_length
    tables = 8 * model.context_length * (d // heads)  # cosines and sines of the positions, for q and for k
    per_token = (36 * d + 8 * f if bf16 else 44 * d + 16 * f) + 4 * heads + 8
    block = per_token * tokens + tables
    ids = 16 * tokens  # of the inputs and the targets
    last_norm = (10 * d + 4 if bf16 else 12 * d + 4) * tokens
    matrices = 4 * d * d + 3 * d * f
    block_copies, head_copy = (2 * matrices, 2 * model.vocab_size * d) if bf16 else (0, 0)
    width = 2 if bf16 else 4
    logits = width * model.vocab_size * tokens
    loss = 12 * model.vocab_size * tokens
    copies = layers * block_copies + head_copy
    if not checkpointing:
        return Activations(layers * block + last_norm + ids, copies, logits, loss, again=0)
    inputs = layers * (4 * d * tokens + _RNG_STATE) + ids
    # The block, the gradients on their way back through it, and its copies.
    again = inputs + logits + block + (8 * d + width * f) * tokens + block_copies
    return Activations(inputs + last_norm, head_copy, logits, loss, again)


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes.

    Attributes:
        weights: Of the model.
        gradients: Between two micro-batches.
        optimizer: Moments, and from stage 1 on the weights it updates.
        activations: With the loss.
        buffers: Of the communication, with what ZeRO-3 gathers of the weights.
        peak: The most at any one time.
        moment: When that is.
        host: In host memory beside the device's: the copy of a save, and the offloaded optimiser. On the CPU it is part
            of the peak.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    peak: float
    moment: str
    host: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def process_memory(config: Config, ranks: int, stage: int | None = None, on_cpu: bool = False) -> Memory:
    """Memory of each of `ranks` processes that train this config.

    Args:
        config: The experiment.
        ranks: Processes, one a device.
        stage: ZeRO stage; the config's if None.
        on_cpu: The device is the CPU: untouched buffers take no memory, and the host's share is its own.
    """
    train, model = config.train, config.model
    stage = train.zero_stage if stage is None else stage
    total = num_parameters(model.vocab_size, model.d_model, model.num_layers, model.d_ff)
    own = total / ranks if stage else total  # elements this process updates
    acts = activations(model, train.micro_batch_size, train.precision, train.activation_checkpointing)
    weights, gradients, optimizer = model_state(total, ranks, stage, engine_layout(stage))
    host = CHECKPOINT_BYTES * total / ranks
    updating = 4 * own * (2 if stage else 1) + 4 * (min(own, _CPU_CHUNK) if on_cpu else own)
    if train.offload_optimizer and stage:
        host += optimizer + 4 * own
        optimizer, updating = 0.0, 0.0
        gradients = gradients if stage == 1 else 0.0
    buffers = _buffers(config, total, stage, ranks, on_cpu)
    base = weights + optimizer + buffers.lasting
    # ZeRO-3 makes room for gradients once; the others when a micro-batch leaves some behind for the next.
    left = gradients if stage == 3 or train.batch_size > train.micro_batch_size * ranks else 0.0
    passing = base + left + buffers.passing
    # Stage 2 makes room for a rank's whole part of the gradients when the first of them is there: on the rank that
    # has the last layers, while all activations are.
    early = gradients if stage == 2 else 0.0
    moments = {
        "start-up": 4.0 * total * (2 if stage in (1, 2) and on_cpu else 1) + (4 * own if stage == 3 else 0.0),
        "forward": passing + acts.kept + acts.copies + acts.logits,
        "backward": passing + acts.kept + acts.copies + acts.loss,
        "first gradients": passing + early + acts.kept + acts.copies + acts.logits,
        "recomputation": passing + early + acts.again + _fresh_gradients(model, stage, left) if acts.again else 0.0,
        "reduction": passing + gradients - left + buffers.reducing + acts.logits,
        "optimizer step": base + updating,
    }
    moment = max(moments, key=lambda m: moments[m])
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=acts.most,
        buffers=buffers.lasting + buffers.passing + buffers.reducing,
        peak=moments[moment] + (host if on_cpu else 0.0),
        moment=moment,
        host=host,
    )


@dataclass(frozen=True)
class _Buffers:
    """Bytes of communication: always there, during forward and backward, while gradients are reduced."""

    lasting: float = 0.0
    passing: float = 0.0
    reducing: float = 0.0


def _fresh_gradients(model: ModelConfig, stage: int, left: float) -> float:
    """Bytes of a block's weight gradients in backward: of one weight, where it is added to others or handed on."""
    d, f = model.d_model, model.d_ff
    return 4.0 * (max(d * d, d * f) if left or stage >= 2 else 4 * d * d + 3 * d * f)


def _buffers(config: Config, total: int, stage: int, ranks: int, on_cpu: bool) -> _Buffers:
    if stage == 0:
        return _Buffers(reducing=4.0 * min(total, REDUCE_ELEMENTS) if ranks > 1 else 0.0)
    bucket_size = zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS)
    filled = 4.0 * min(total, bucket_size)
    bucket = filled if on_cpu else 4.0 * bucket_size  # memory that is never written to is not taken from a host
    if stage == 3:
        # Reduced from a copy of the bucket, with room for the padding and the result.
        whole = _persistent(config.model, zero_setting(config, "param_persistence_threshold", _PERSISTENT))
        live = min(total - whole, zero_setting(config, "max_live_parameters", LIVE_ELEMENTS))
        # Weights that are gathered ahead arrive in one buffer and are copied out of it.
        ahead = min(total - whole, zero_setting(config, "prefetch_bucket_size", PREFETCH_ELEMENTS))
        return _Buffers(lasting=bucket + 4.0 * whole, passing=4.0 * (live + ahead), reducing=2 * filled)
    return _Buffers(passing=bucket * (2 if config.train.overlap_comm else 1), reducing=filled)


def zero_setting(config: Config, key: str, default: int) -> int:
    """A setting of DeepSpeed's ZeRO that the config may pass through, under its name or its alias for stage 3."""
    given = config.deepspeed.get("zero_optimization", {})
    return int(given.get(key, given.get(f"stage3_{key}", default)))


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint, all ranks together, without the few kilobytes of its manifest and headers."""
    model = config.model
    return CHECKPOINT_BYTES * num_parameters(model.vocab_size, model.d_model, model.num_layers, model.d_ff)


def _persistent(model: ModelConfig, threshold: int) -> int:
    """Elements of the parameters so small that ZeRO-3 keeps them whole."""
    d, f = model.d_model, model.d_ff
    sizes = [
        (2, model.vocab_size * d),
        (4 * model.num_layers, d * d),
        (3 * model.num_layers, d * f),
        (2 * model.num_layers + 1, d),
    ]
    return sum(count * size for count, size in sizes if size <= threshold)
