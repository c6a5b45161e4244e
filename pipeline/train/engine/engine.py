"""The DeepSpeed engine behind the few verbs the loop needs; the only file that imports deepspeed.

The weights are always float32; `bf16` runs forward and backward under autocast. So every ZeRO stage meets one
kind of optimiser, and gradients accumulate in float32.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.read import CheckpointReader
from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW, decay_groups
from pipeline.optim.clipping import scale_to_norm, squared_norm
from pipeline.run.world import World
from pipeline.train.engine.deepspeed_config import deepspeed_settings
from pipeline.train.engine.step_numbers import Agreed

_MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHERED_AT_ONCE = 1 << 18  # elements of each rank


class Engine:
    """One model in training on all ranks.

    Args:
        model: The model, with the same fresh weights on every rank.
        config: The experiment.
        world: This process's place.
        device: Where it trains.
    """

    def __init__(self, model: TransformerLM, config: Config, world: World, device: torch.device) -> None:
        self.device = device
        self._world = world
        self._stage = config.train.zero_stage
        self._offloads = config.train.offload_optimizer
        model.to(device)
        model.activation_checkpointing = config.train.activation_checkpointing
        if config.train.precision == "bf16":
            # Each weight is used once a forward: a cache of their copies would only hold them all until its end.
            cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            model.forward = cast(model.forward)  # type: ignore[method-assign]
        settings = config.optimizer
        self._optimizer = AdamW(
            decay_groups(model, settings.weight_decay, settings.decay_norms),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.module = model
        self._engine = _initialize(model, self._optimizer, deepspeed_settings(config, world), device)
        if config.train.compile:
            self._engine.compile()

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits of a micro-batch."""
        return self._engine(token_ids)

    def set_learning_rate(self, lr: float) -> None:
        """Sets the rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        """Forgets gradients."""
        self._engine.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch; with the last one of a step they are averaged over the ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; no weight moves before the boundary

    @torch.no_grad()
    def clip(self, max_norm: float, losses: list[Tensor], stop: bool) -> Agreed:
        """Clips the averaged gradients by their global norm, with the one all-reduce of a step.

        Own clipping at every stage: the gradients are `p.grad` at stage 0 (the same on all ranks) and this rank's
        partition of the averaged gradients at stages 1-3. DeepSpeed's own clipping is switched off.

        A step whose loss or norm is not finite will change nothing. Where the optimiser works on the device, the
        device decides that and the host does not wait for it.

        Args:
            max_norm: Largest norm; 0 leaves the gradients alone.
            losses: Mean losses of this rank's micro-batches.
            stop: Whether this rank was asked to stop.
        """
        grads = self._gradients()
        square = squared_norm(grads).to(self.device)
        loss = torch.stack(losses).float().mean() / self._world.size
        if self._stage == 0:
            square = square / self._world.size
        # A fill, where a new tensor of a Python number would be a copy that the host waits for.
        numbers = torch.stack((loss, square, square.new_full((), float(stop))))
        if self._world.size > 1:
            dist.all_reduce(numbers)
        _, norm, _ = numbers.unbind()
        norm.sqrt_()
        finite = numbers.isfinite().all()
        self._optimizer.counts = finite if finite.is_cuda and not self._offloads else bool(finite)
        if max_norm > 0:
            scale_to_norm(grads, norm, max_norm)
        return Agreed(numbers)

    def step(self) -> None:
        """Moves weights and moments, unless `clip` found the step not finite; then none of them, on all ranks alike."""
        self._engine.step()

    def _gradients(self) -> list[Tensor]:
        if self._stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._offloads:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # DeepSpeed's copies to the host are waited for in its step only
            return [flat.grad for flat in self._updated_tensors() if flat.grad is not None]
        averaged = self._engine.optimizer.averaged_gradients
        return [gradient for group in averaged.values() if group is not None for gradient in group]

    # ---- state: what a checkpoint holds ----------------------------------------------------

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimiser has taken: skipped ones do not count."""
        # Of all parameters alike: one is asked, for the host waits for the device at each.
        return next((int(state["step"]) for state in self._optimizer.state.values()), 0)

    def fragments(self) -> list[OwnedFragment]:
        """The parts of weights and moments this rank owns, as writable float32 views."""
        self._make_state()
        owned = []
        for name, parameter in self.module.named_parameters():
            fragment = self._fragment(name, parameter)
            if fragment is not None:
                owned.append(fragment)
        return owned

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """Takes weights and moments from a checkpoint, whatever world size and stage wrote it.

        Each rank reads its own parts only; the working weights are made from them afterwards.
        """
        self._make_state()
        steps = int(reader.manifest.state["optimizer_steps"])
        for state in self._optimizer.state.values():
            state["step"] = steps
        for fragment in self._replicas() if self._stage == 0 else self.fragments():
            for key, tensor in fragment.tensors.items():
                reader.read(key, fragment.name, fragment.start, tensor)
        self._refresh()

    def _make_state(self) -> None:
        """Moments exist from the first step on; loading and saving before it need them earlier."""
        for flat in self._updated_tensors():
            state = self._optimizer.state[flat]
            if not state:
                state["step"] = 0
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(flat)

    def _updated_tensors(self) -> list[Tensor]:
        """The tensors our optimiser really updates on this rank."""
        zero = self._engine.optimizer
        if self._stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        if self._stage in (1, 2):
            return list(zero.single_partition_of_fp32_groups)
        return list(self.module.parameters())

    def _fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        if self._stage == 3:
            return self._stage_3_fragment(name, parameter)
        if self._stage in (1, 2):
            return self._stage_1_2_fragment(name, parameter)
        # Replicated: the ranks share the writing, each an equal part of every parameter.
        part = -(-parameter.numel() // self._world.size)
        start = min(part * self._world.rank, parameter.numel())
        length = min(part, parameter.numel() - start)
        if length == 0:
            return None
        return _part(_replica(name, parameter, self._optimizer.state[parameter]), start, length)

    def _stage_1_2_fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        state = self._optimizer.state[self._updated_tensors()[mapping.param_group_index]]
        moments = {key: state[key].narrow(0, address.start, address.numel) for key in _MOMENTS}
        tensors = {"weight": mapping.hp_fragment, **moments}
        return OwnedFragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)

    def _stage_3_fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        # DeepSpeed's own accessors return copies on the device where the state is offloaded: what is loaded into
        # those is lost without a word.
        zero = self._engine.optimizer
        group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
        start = part * self._world.rank
        length = min(part, parameter.ds_numel - start)  # the last partition is padded
        if length <= 0:
            return None
        flat = zero.fp32_partitioned_groups_flat[group]
        wholes = {"weight": flat.detach(), **{key: self._optimizer.state[flat][key] for key in _MOMENTS}}
        tensors = {key: whole.narrow(0, offset, length) for key, whole in wholes.items()}
        return OwnedFragment(name, tuple(parameter.ds_shape), start, tensors)

    def _replicas(self) -> list[OwnedFragment]:
        return [_replica(n, p, self._optimizer.state[p]) for n, p in self.module.named_parameters()]

    def _refresh(self) -> None:
        """Working weights from the partitions just loaded."""
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            for parts, own in zip(
                zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups, strict=True
            ):
                parts[self._world.rank].copy_(own)
                _gather(parts, self._world)
        elif self._stage == 3:
            zero._partition_all_parameters()
            zero.invalidate_secondary_tensor()  # a node's own copy of the weights before, with hierarchical partitions
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
                zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
                zero._unflatten_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _gather(parts: list[Tensor], world: World) -> None:
    """Fills every rank's part in; in pieces, for gloo gathers into a buffer as large as what it gathers."""
    if world.size > 1:
        for pieces in zip(*(part.split(_GATHERED_AT_ONCE) for part in parts), strict=True):
            dist.all_gather(list(pieces), pieces[world.rank])


def _replica(name: str, parameter: Tensor, state: dict[str, Tensor]) -> OwnedFragment:
    tensors = {"weight": parameter.detach().view(-1), **{key: state[key].view(-1) for key in _MOMENTS}}
    return OwnedFragment(name, tuple(parameter.shape), 0, tensors)


def _part(whole: OwnedFragment, start: int, length: int) -> OwnedFragment:
    parts = {key: tensor[start : start + length] for key, tensor in whole.tensors.items()}
    return OwnedFragment(whole.name, whole.shape, start, parts)


def _import_deepspeed() -> Any:
    """DeepSpeed without its autotuner's mlflow, whose import costs every rank two seconds of a processor."""
    if "mlflow" in sys.modules:
        import deepspeed.ops

        return deepspeed
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import fails, as if it were not installed
    try:
        import deepspeed.ops
    finally:
        del sys.modules["mlflow"]
    return deepspeed


def _initialize(model: TransformerLM, optimizer: AdamW, settings: dict[str, Any], device: torch.device) -> Any:
    os.environ["DS_ACCELERATOR"] = device.type
    if device.index is not None:
        # It takes the local rank for the number of the device, now and in later steps; where Slurm shows each rank
        # its own GPU only, that device is not there.
        os.environ["LOCAL_RANK"] = str(device.index)
    # DeepSpeed calls functions that PyTorch is about to rename; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    deepspeed = _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfigError

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Otherwise it compiles a shared-memory collective for half a minute that training never uses.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UsageError(f"deepspeed: DeepSpeed refuses these settings ({str(error).strip()})") from error
    return engine
