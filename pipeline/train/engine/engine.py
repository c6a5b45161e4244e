"""The DeepSpeed engine behind the few verbs that the loop needs.

The optimizer updates float32 weights at every stage and precision. With `bf16`, stages 1 to 3 keep bf16 working weights
beside them, which are what is gathered and whose gradients are reduced; stage 0 runs under autocast.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.read import CheckpointReader
from pipeline.config.sections import Config
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.model.chunked_loss import LossParts
from pipeline.model.transformer import TransformerLM, recomputed
from pipeline.optim.adamw import AdamW, decay_groups
from pipeline.optim.clipping import clip_divisor, squared_norm
from pipeline.run.world import World
from pipeline.train.engine.build import build, working_dtype
from pipeline.train.engine.deepspeed_config import deepspeed_config
from pipeline.train.engine.deepspeed_setup import announce_collectives, initialize, prepare
from pipeline.train.engine.fresh import fill_fresh
from pipeline.train.engine.partitions import PARTITIONS
from pipeline.train.engine.step_numbers import PendingNumbers, asked_of
from pipeline.train.ranks.activity import Activity


class Engine:
    """One model in training on all ranks.

    Its weights are zero until `draw`, `take` or `load`.

    Args:
        config: The experiment.
        world: This process's place.
        device: Where it trains.
        activity: Where the engine notes what it does; None if nobody looks.

    Raises:
        UsageError: DeepSpeed refuses the settings.
    """

    def __init__(self, config: Config, world: World, device: torch.device, activity: Activity | None = None) -> None:
        self.device = device
        self._activity = activity or Activity(device)
        self._world = world
        self._offloads = config.train.offload_optimizer
        self._tied = config.model.tie_embeddings
        settings, optim = deepspeed_config(config, world), config.optimizer
        prepare(device)
        announce_collectives(self._activity.begin_collective)
        self.module = model = build(config, device, settings)
        model.activation_checkpointing = config.train.activation_checkpointing
        model.loss_chunk_tokens, model.z_loss = config.train.loss_chunk_tokens, config.optimizer.z_loss
        if config.train.precision == "bf16" and working_dtype(config.train) == torch.float32:
            # A forward uses each weight once: a cache of their casts would only keep all of them in memory to its end.
            cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            model.forward = cast(model.forward)  # type: ignore[method-assign]
        if config.train.compile:
            _compile(model)
        self._optimizer = AdamW(
            decay_groups(model, optim.weight_decay, optim.decay_norms),
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
        )
        self._engine = initialize(model, self._optimizer, settings)
        if world.size == 1 and config.train.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # it copies all gradients twice, and nothing is to be added
        self._partitions = PARTITIONS[config.train.zero_stage](
            self._engine.optimizer, model, self._optimizer, world, device, self._offloads
        )

    def loss(
        self, token_ids: Tensor, targets: Tensor, document_starts: Tensor | None = None, weight: float | None = None
    ) -> LossParts:
        """Returns the loss of a micro-batch; every rank calls it equally often, as ZeRO-3 demands.

        Args:
            token_ids: `(sequences, context)` int64.
            targets: The token after each; a negative one is ignored.
            document_starts: Where the document of each token starts in its row; with `model.document_mask`.
            weight: What the loss is multiplied with; None where no target is ignored. See `BatchReader.weight`.
        """
        documents = {} if document_starts is None else {"document_starts": document_starts}
        with self._activity.phase("forward"):
            parts: LossParts = self._engine(token_ids, targets=targets, **documents)
            if weight is not None:
                parts = LossParts(parts.loss * weight, parts.cross_entropy * weight)
        return parts

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self._engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch; the last one of a step averages them over the ranks."""
        with self._activity.phase("backward"):
            self._engine.backward(loss)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # counts the micro-batch; no weight moves before the boundary

    def reduce_and_clip(self, max_norm: float, losses: list[Tensor], stop: bool, profile: int = 0) -> PendingNumbers:
        """Agrees on loss, norm and stop by the one all-reduce of a step, and clips the averaged gradients.

        We clip ourselves at every stage, and DeepSpeed's own clipping is off: the gradients are `p.grad` at stage 0
        (the same on all ranks) and this rank's partition of the averaged gradients at stages 1-3. They are scaled in
        the step that follows.

        A step whose loss or norm is not finite changes nothing. Where the optimizer works on the device, the device
        decides that, and the host does not wait for it.

        Args:
            max_norm: Largest norm; 0 leaves the gradients alone.
            losses: Cross-entropies of this rank's micro-batches.
            stop: Whether this rank was asked to stop.
            profile: Number of the profile that rank 0 is asked for; 0 on the other ranks.
        """
        with self._activity.phase("reduce and clip"):
            return self._reduce_and_clip(max_norm, losses, asked_of(stop, profile, self._world.size))

    @torch.no_grad()
    def _reduce_and_clip(self, max_norm: float, losses: list[Tensor], asked: float) -> PendingNumbers:
        grads = self._partitions.gradients()
        square = squared_norm(grads).to(self.device)
        loss = torch.stack(losses).float().mean() / self._world.size
        if self._partitions.replicated:
            square = square / self._world.size
        # Filled on the device: a new tensor of a Python number would be a copy that the host waits for.
        numbers = torch.stack((loss, square, square.new_full((), asked)))
        if self._world.size > 1:
            self._activity.begin_collective()
            dist.all_reduce(numbers)
        _, norm, _ = numbers.unbind()
        norm.sqrt_()
        finite = numbers.isfinite().all()
        self._optimizer.counts = finite if finite.is_cuda and not self._offloads else bool(finite)
        # The step divides by it: one pass over the gradients less.
        self._optimizer.grad_divisor = clip_divisor(norm, max_norm) if max_norm > 0 else None
        return PendingNumbers(numbers, self._world.size)

    def step(self) -> None:
        """Updates weights and moments; if `reduce_and_clip` found the step not finite, none of them on any rank."""
        with self._activity.phase("optimizer"):
            self._engine.step()

    # ---- state: what a checkpoint holds ----------------------------------------------------

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer has taken; skipped ones do not count."""
        # The same for all parameters: only one is read, because the host waits for the device at each.
        return next((int(state["step"]) for state in self._optimizer.state.values()), 0)

    def fragments(self) -> list[OwnedFragment]:
        """Returns the parts of weights and moments that this rank owns, as writable float32 views."""
        return self._partitions.owned()

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draws fresh weights, each rank those that it holds; the same numbers at any world size and stage."""
        for fragment in self._partitions.held():
            fill_fresh(fragment.tensors["weight"], fragment.name, fragment.shape, seed, fragment.start, self._tied)
        self._partitions.refresh()

    @torch.no_grad()
    def take(self, weights: OpenWeights | CheckpointReader) -> None:
        """Takes weights from elsewhere, each rank those that it holds; the moments stay zero."""
        for fragment in self._partitions.held():
            weights.read("weight", fragment.name, fragment.start, fragment.tensors["weight"])
        self._partitions.refresh()

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """Loads weights and moments from a checkpoint, whatever world size and stage wrote it.

        Each rank reads only its own parts; the working weights are made from them afterwards.
        """
        held = self._partitions.held()
        steps = int(reader.manifest.state["optimizer_steps"])
        for state in self._optimizer.state.values():
            state["step"] = steps
        for fragment in held:
            for key, tensor in fragment.tensors.items():
                reader.read(key, fragment.name, fragment.start, tensor)
        self._partitions.refresh()


def _compile(model: TransformerLM) -> None:
    """Compiles each block, and the passes of the loss over the logits.

    Not the whole model: DeepSpeed's hooks between the blocks would break the graph. Not by a block's `compile()`, which
    would trace the hooks of the block itself.
    """
    for block in model.layers:
        block.forward = torch.compile(recomputed(block.forward, model.activation_checkpointing), dynamic=False)
    model.activation_checkpointing = "none"  # the compiled blocks see to it
    model.compiled_blocks = True
    model.compiled_loss = model.device.type == "cuda"
