"""What forward and backward of a micro-batch take in memory beside the model's state (docs/scaling.md).

Counted from model/layers.py and model/chunked_loss.py. tests/plan/test_memory.py measures the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.sections import Config
from pipeline.model.flops import block_matrices, elements

# Of model/on_cpu.py, which imports torch.
_SHORT_CONTEXT, _CACHED = 512, 1 << 19
_RNG_STATE = 5056  # bytes; PyTorch keeps one per checkpointed block


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes on top of the model's state."""

    block: float
    """What one block keeps without activation checkpointing, without copies of weights."""
    kept: float
    """What the blocks and the last norm keep for backward."""
    before_last_block: float
    """The most in forward before the last block is called."""
    loss: float
    """What the loss in chunks needs beside what is kept: the gradient of the head in float32, and the logits of a chunk
    or, as backward begins, that gradient in the dtype of the weights."""
    head: float
    """What of the loss is still there when backward begins, as the gradient of the head arrives."""
    recomputing: float
    """Everything present while backward recomputes the last block; 0 without activation checkpointing."""

    @property
    def peak(self) -> float:
        """The most at any one time."""
        return max(self.kept + self.loss, self.recomputing)


def working_bytes(config: Config, stage: int) -> int:
    """Returns the bytes of a working weight: at stage 0 bf16 is autocast around float32 weights."""
    return 2 if config.train.precision == "bf16" and stage > 0 else 4


def activations(config: Config, stage: int, on_cpu: bool = False) -> Activations:
    """Returns what a micro-batch takes, without torch.compile, which keeps less.

    Per token, a block keeps the inputs of its two norms, the inputs of its linear maps, q, k and v, the attention's
    result twice, and four tensors of the feed-forward's width; and the inputs of the norms of queries and keys. With
    bf16 weights all of them are bf16. Under autocast the residual stream stays float32, and on a GPU the norms; each
    linear map has a bf16 copy of its weight, and of its input if that is not bf16.

    Args:
        config: The experiment.
        stage: ZeRO stage, which decides between bf16 weights and autocast.
        on_cpu: A CPU's norms return bf16 under autocast, its head's logits are products of float32, and attention to
            few tokens keeps its weights. With AMX, the loss takes less than is counted.
    """
    model, train = config.model, config.train
    bf16 = train.precision == "bf16"
    autocast = bf16 and stage == 0
    width = 2 if bf16 else 4
    stream = 4 if autocast else width
    d, f, layers, heads, vocab = model.d_model, model.d_ff, model.num_layers, model.num_heads, model.vocab_size
    projected = model.d_q + 2 * model.d_kv
    tokens = train.micro_batch_size * model.context_length
    norm = (stream * d + 4) * tokens
    inputs = (10 if autocast and not on_cpu else 2 * width) * d
    attention = width * (projected + 2 * model.d_q) + 4 * heads
    scores = 0  # and weights of attention that exist as such
    if bf16 and on_cpu and model.context_length <= _SHORT_CONTEXT and not model.document_mask:
        scores = width * heads * model.context_length
        attention = width * (projected + model.d_q) + scores
    if model.qk_norm:
        attention += width * (model.d_q + model.d_kv) + 4 * (heads + model.kv_heads)
    block = 2 * norm + (inputs + attention + 4 * width * f) * tokens
    weight_copies = 2 * elements(block_matrices(model)) if autocast else 0
    results = width * (projected + model.d_q + 2 * d + 2 * f) + 4 * heads
    per_block = {
        "none": block + weight_copies,
        "full": stream * d * tokens + _RNG_STATE,
        # The input, and the results of the seven matrix products and of attention.
        "selective": (stream * d + results) * tokens + _RNG_STATE,
    }[train.activation_checkpointing]
    ids = 16 * tokens  # inputs and targets
    kept = layers * per_block + norm + ids
    rows_at_once = min(train.loss_chunk_tokens, tokens)
    gradient = 4 * vocab * d
    # Float32 logits, over which their gradient is written; in bf16 also that gradient, on a GPU before it the product.
    logits = (6 if bf16 else 4) * vocab * rows_at_once
    copy = product = 0  # of the head's weight in the dtype of the products; what is added to its gradient
    if bf16 and on_cpu:
        copy, product = 2 * vocab * d if autocast else gradient, 6 * min(vocab * d, _CACHED) + 4 * d * rows_at_once
    elif bf16:
        copy, product = 2 * vocab * d if autocast else 0, gradient
    rows = 2 * (width if on_cpu else stream) * d * tokens  # the normed input and its gradient
    head = gradient + (2 * vocab * d if bf16 and not autocast else 0)
    loss = max(rows + gradient + copy + logits + product, rows / 2 + head)
    recomputing = 0.0
    # A block's result, or what its feed-forward has at a time: all of it is kept if nothing is recomputed.
    ahead = {
        "none": stream * d,
        "full": stream * d + width * (d + 3 * f),
        "selective": stream * d + width * (d + 2 * f),
    }[train.activation_checkpointing]
    before_last_block = kept - norm - per_block + ahead * tokens
    if train.activation_checkpointing != "none":
        # The block without what is kept of it, its copies, and the gradients that pass back through it; the last norm
        # is done with.
        same = stream * d  # the norm's input
        if train.activation_checkpointing == "selective":
            same += width * (model.d_q + model.d_kv + 2 * f) + 4 * heads
        # In the feed-forward, or in attention, when the feed-forward's are gone.
        passing = 2 * stream * d + max(width * f, 2 * (scores + width * model.d_q) - width * (d + 4 * f))
        recomputing = kept - norm + block + weight_copies + (passing - same) * tokens
    return Activations(block, kept, before_last_block, loss, head, recomputing)
