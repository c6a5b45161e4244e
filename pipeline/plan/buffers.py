"""The buffers through which DeepSpeed reduces gradients and gathers weights (docs/scaling.md).

Counted from DeepSpeed's ZeRO optimizers. tests/plan/test_memory.py measures the sums.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.config.sections import Config
from pipeline.model.flops import Shape, block_matrices, block_vectors, elements, num_parameters, parameter_counts

# DeepSpeed's defaults, in elements; `deepspeed.zero_optimization` in the config can change them.
REDUCE_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
PREFETCH_ELEMENTS = 50_000_000
PERSISTENT_ELEMENTS = 100_000


def zero_setting(config: Config, key: str, default: int) -> int:
    """Returns a DeepSpeed ZeRO setting of the config, or DeepSpeed's default."""
    return int(config.deepspeed.get("zero_optimization", {}).get(key, default))


def overlaps_reduction(config: Config, stage: int) -> bool:
    """Returns whether gradients are reduced beside backward: by DeepSpeed's default at stage 3, never at stage 0."""
    overlap = config.train.overlap_comm
    return stage == 3 if overlap is None else overlap and stage > 0


def bucket_bytes(config: Config, total: int, width: int, on_cpu: bool) -> float:
    """Returns the bytes of the buffer in which gradients are reduced, and of its copy for a wider reduction."""
    size = zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS)
    filled = min(total, size)
    copied = 4.0 * filled if reduced_bytes(config, width) > width else 0.0
    return width * (filled if on_cpu else size) + copied  # a host does not provide memory that is never written


def reducing(config: Config, width: int, own: float, part: float, kept: float) -> float:
    """Returns the most bytes that stage 2 takes to reduce buckets in backward, besides the bucket itself.

    A full bucket is copied together. The gradients in it are those of the last blocks, whose activations are done with.
    In bf16 the rank adds its part of the copy in float32, one weight after the other; in float32 it allocates its part
    of the gradients when the first bucket is reduced.

    Args:
        config: The experiment.
        width: Bytes of a gradient when it is computed.
        own: Elements that the rank updates.
        part: Bytes that the rank allocates for its part of the gradients.
        kept: Bytes of the activations as backward begins.
    """
    model, total = config.model, num_parameters(config.model)
    size = min(zero_setting(config, "reduce_bucket_size", REDUCE_ELEMENTS), total)
    table = model.vocab_size * model.d_model
    with_head = not model.tie_embeddings and table <= size  # a larger one is reduced alone
    blocks = model.num_layers * block_elements(model)

    def left(buckets: int) -> float:
        return kept * max(0.0, 1 - (buckets * size - (table if with_head else 0)) / blocks)

    if width == 2:
        weight = table if with_head or size == total else largest_of_block(model)
        return part + width * size + left(1) + summed(weight, own, width)
    first, second = width * size, width * min(size, total - size)
    return max(first + left(1), part + left(1), part + second + left(2))


def summed(weight: int, own: float, width: int) -> float:
    """Returns the bytes of the float32 copy of a rank's part of a bf16 gradient of this many elements."""
    return 4 * min(weight, own) if width == 2 else 0.0


def reduced_bytes(config: Config, width: int) -> int:
    """Returns the bytes that a gradient has while it is reduced."""
    return 4 if config.deepspeed.get("communication_data_type") == "fp32" else width


def keeps_gathered(config: Config) -> bool:
    """Returns whether ZeRO-3 keeps the weights that forward gathered until backward has used them."""
    return num_parameters(config.model) <= min(
        zero_setting(config, key, LIVE_ELEMENTS) for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    )


class Gathered(NamedTuple):
    """Bytes of weights that ZeRO-3 gathers. What arrives lies in one message and is copied out of it."""

    live: float = 0.0
    """The most that are gathered."""
    live_blocks: float = 0.0
    """The most without a table that is only gathered alone."""
    message: float = 0.0
    """A prefetch in forward."""
    prefetched: float = 0.0
    """A prefetch in backward: of blocks, because the head comes first."""


def gathered(config: Config, width: int) -> Gathered:
    """Returns what ZeRO-3 gathers where a weight has this many bytes."""
    model = config.model
    parts = num_parameters(model) - persistent_elements(config)
    if parts == 0:
        return Gathered()
    table = model.vocab_size * model.d_model
    blocks = max(0, parts - (1 if model.tie_embeddings else 2) * table)
    live = max(block_elements(model), min(parts, zero_setting(config, "stage3_max_live_parameters", LIVE_ELEMENTS)))
    prefetch = zero_setting(config, "stage3_prefetch_bucket_size", PREFETCH_ELEMENTS)
    return Gathered(*(float(width * n) for n in (max(table, live), live, min(parts, prefetch), min(blocks, prefetch))))


def block_elements(model: Shape) -> int:
    """Returns the elements of a block's weights."""
    return elements(block_matrices(model)) + elements(block_vectors(model))


def largest_of_block(model: Shape) -> int:
    """Returns the elements of a block's largest weight."""
    return model.d_model * max(model.d_q, model.d_ff)


def persistent_elements(config: Config) -> int:
    """Returns the number of elements in parameters so small that ZeRO-3 keeps them whole."""
    threshold = zero_setting(config, "stage3_param_persistence_threshold", PERSISTENT_ELEMENTS)
    return elements(count for count in parameter_counts(config.model) if count.elements < threshold)
