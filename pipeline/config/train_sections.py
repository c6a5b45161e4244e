"""What training is told: the optimizer and its schedule, the loop, the checkpoints it keeps, and its guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.section_base import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
    rule,
    wrong_value,
)  # fmt: skip
from pipeline.errors import Problem


class OptimizerConfig(Section):
    """AdamW, the learning-rate schedule, and gradient clipping."""

    schedule: Literal["cosine", "wsd", "linear", "constant", "inv_sqrt"] = "cosine"
    """What follows warm-up: a cosine or a line down to the end, a constant rate, a constant rate and then a decay
    (`wsd`), or the inverse square root of the step."""
    learning_rate: Positive
    """Highest learning rate, reached after warm-up."""
    min_learning_rate: NonNegative = 0.0
    """Learning rate at the end of the schedule and afterwards; `inv_sqrt` never falls below it."""
    warmup_iters: NonNegativeInt
    """Steps of linear warm-up from zero."""
    cosine_cycle_iters: Count | None = None
    """Step at which the cosine reaches `min_learning_rate`; unset, `train.max_iters`."""
    decay_iters: Count | None = None
    """Steps of the decay of `wsd`, which ends at `train.max_iters`."""
    decay: Literal["linear", "1-sqrt", "cosine"] = "1-sqrt"
    """Form of the decay of `wsd`."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    decay_norms: bool = False
    """Also decay the gains of the norms."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    gradient_clip_val: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    z_loss: NonNegative = 0.0
    """Factor of the squared log of softmax's denominator, added to the loss to keep the logits small; 1e-4 in PaLM."""

    @rule
    def _warmup_ends_before_the_cosine(self) -> Iterator[Problem]:
        if self.cosine_cycle_iters is not None and self.warmup_iters > self.cosine_cycle_iters:
            most = f"at most cosine_cycle_iters = {self.cosine_cycle_iters}"
            yield wrong_value("warmup_iters", self.warmup_iters, most)

    @rule
    def _each_schedule_has_its_own_keys(self) -> Iterator[Problem]:
        if self.schedule != "cosine" and self.cosine_cycle_iters is not None:
            yield wrong_value("cosine_cycle_iters", self.cosine_cycle_iters, "only with schedule: cosine")
        if self.schedule != "wsd" and self.decay_iters is not None:
            yield wrong_value("decay_iters", self.decay_iters, "only with schedule: wsd")
        if self.schedule == "wsd" and self.decay_iters is None:
            yield Problem(
                "decay_iters", "is missing; schedule: wsd needs it (a tenth to a fifth of all steps is usual)"
            )

    @rule
    def _the_learning_rate_falls(self) -> Iterator[Problem]:
        if self.min_learning_rate > self.learning_rate:
            most = f"at most learning_rate = {self.learning_rate}"
            yield wrong_value("min_learning_rate", self.min_learning_rate, most)


def _of_a_switch(value: Any) -> Any:
    """Reads what runs of earlier versions hold, where it was a switch."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


ActivationCheckpointing = Annotated[Literal["none", "full", "selective"], BeforeValidator(_of_a_switch)]


class TrainConfig(Section):
    """The training loop."""

    batch_size: Count
    """Sequences in the global batch, over all ranks and micro-batches."""
    micro_batch_size: Count
    """Sequences per process and forward pass."""
    max_iters: Count
    """Steps to train for."""
    log_interval: Count = 10
    """Steps between log lines."""
    val_interval: Count = 500
    """Steps between validations."""
    num_val_batches: Count = 50
    """Maximum number of global batches per validation."""
    checkpoint_interval: Count = 500
    """Steps between checkpoints."""
    seed: NonNegativeInt = 1337
    """Seed of the weights and of the order of the data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; `bf16` also moves weights and gradients in bf16 at ZeRO stages 1 to 3. The
    optimiser always updates float32 weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses a GPU if there is one."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    loss_chunk_tokens: Count = 2048
    """Largest number of tokens whose logits are in memory at a time."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward pass recomputes instead of keeping it: nothing, each block, or all of a block but the results
    of attention and matrix products."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what DeepSpeed partitions over the ranks."""
    offload_optimizer: bool = False
    """Keep the optimiser's float32 weights and moments in host memory; with ZeRO stages 1 to 3."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass, at the cost of device memory; unset, only ZeRO stage 3 does."""

    @rule
    def _offload_needs_zero(self) -> Iterator[Problem]:
        if self.offload_optimizer and self.zero_stage == 0:
            yield wrong_value("offload_optimizer", True, "only with zero_stage 1, 2 or 3")

    @rule
    def _overlap_needs_zero(self) -> Iterator[Problem]:
        if self.overlap_comm and self.zero_stage == 0:
            yield wrong_value("overlap_comm", True, "only with zero_stage 1, 2 or 3")


class CheckpointConfig(Section):
    """Which checkpoints are kept, and how they are written."""

    keep_last: Count = 3
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is divisible by this are kept forever; 0 for none."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss."""
    timeout_min: Annotated[float, Field(gt=0, le=1e6)] = 30.0
    """Minutes after which a save gives up on a rank whose file does not arrive."""
    if_busy: Literal["wait", "skip"] = "wait"
    """A save that is due while another is being written waits for it or is skipped; the last save is never skipped."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a failed save, training continues with the last good checkpoint, or ends with status 1 at the next save."""
    max_failures: Count = 5
    """Failed saves in a row after which training ends with status 1 all the same. A save that is still being written
    after `timeout_min` counts once more whenever another is due."""


class GuardConfig(Section):
    """What happens on a loss or gradient that is not finite, and on a loss spike."""

    max_bad_steps: Count = 5
    """Consecutive steps skipped for a loss or gradient that is not finite, before training ends."""
    on_spike: Literal["off", "warn", "rollback"] = "warn"
    """`warn` reports a loss far above those before it; `rollback` rolls back and skips the batches around it."""
    spike_window: Count = 100
    """Number of preceding steps that a loss is compared with."""
    spike_sigma: Positive = 6.0
    """Standard deviations above the mean of the window that make a spike."""
    rollback_skip: Count = 2
    """Batches that a rollback skips: the one whose loss spiked and those right before it."""
    max_rollbacks: Count = 5
    """Rollbacks allowed in one run before training ends."""
