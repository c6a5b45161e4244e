"""Where each ZeRO stage keeps a rank's gradients, weights and moments: the only knowledge of DeepSpeed's internals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW
from pipeline.run.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHERED_AT_ONCE = 1 << 18  # elements per rank


@dataclass(frozen=True, eq=False)
class Partitions:
    """Stage 0, where every rank holds everything; the stages that partition override it."""

    zero: Any
    """DeepSpeed's optimizer of this stage."""
    model: TransformerLM
    optimizer: AdamW
    """Our optimizer, which the stage drives."""
    world: World
    device: torch.device
    offloads: bool
    """Whether gradients and the optimizer's state are in host memory."""
    replicated: ClassVar[bool] = True

    def gradients(self) -> list[Tensor]:
        """Returns the averaged gradients that this rank holds."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def updated_tensors(self) -> list[Tensor]:
        """Returns the tensors that our optimizer really updates on this rank."""
        return list(self.model.parameters())

    def owned(self) -> list[OwnedFragment]:
        """Returns the parts of weights and moments that this rank saves, as writable float32 views."""
        self._create_moments()
        fragments = (self._fragment(name, parameter) for name, parameter in self.model.named_parameters())
        return [fragment for fragment in fragments if fragment is not None]

    def held(self) -> list[OwnedFragment]:
        """Returns the parts that this rank must load: all that it holds, whoever saves them."""
        self._create_moments()
        return [self._replica(name, parameter) for name, parameter in self.model.named_parameters()]

    def refresh(self) -> None:
        """Makes the working weights from the partitions just loaded."""

    def _create_moments(self) -> None:
        """Creates the moments that the optimizer makes only in its first step: saving and loading need them earlier."""
        for flat in self.updated_tensors():
            state = self.optimizer.state[flat]
            if not state:
                state["step"] = 0
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(flat)

    def _replica(self, name: str, parameter: Tensor) -> OwnedFragment:
        state = self.optimizer.state[parameter]
        tensors = {"weight": parameter.detach().view(-1), **{key: state[key].view(-1) for key in _MOMENTS}}
        return OwnedFragment(name, tuple(parameter.shape), 0, tensors)

    def _fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        # The ranks share the writing: each an equal part of every parameter.
        part = -(-parameter.numel() // self.world.size)
        start = min(part * self.world.rank, parameter.numel())
        length = min(part, parameter.numel() - start)
        if length == 0:
            return None
        whole = self._replica(name, parameter)
        parts = {key: tensor[start : start + length] for key, tensor in whole.tensors.items()}
        return OwnedFragment(name, whole.shape, start, parts)


class _Partitioned(Partitions):
    """What stages 1 to 3 have in common: gradients in partitions, and one rank that holds each part."""

    replicated: ClassVar[bool] = False

    def gradients(self) -> list[Tensor]:
        if self.offloads:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # DeepSpeed waits for its copies to the host only in its step
            return [flat.grad for flat in self.updated_tensors() if flat.grad is not None]
        averaged = self.zero.averaged_gradients
        return [gradient for group in averaged.values() if group is not None for gradient in group]

    def held(self) -> list[OwnedFragment]:
        return self.owned()


class _Stage12(_Partitioned):
    """Stages 1 and 2: partitions of the optimizer's state, and of the gradients at stage 2."""

    def updated_tensors(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def _fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        state = self.optimizer.state[self.updated_tensors()[mapping.param_group_index]]
        moments = {key: state[key].narrow(0, address.start, address.numel) for key in _MOMENTS}
        tensors = {"weight": mapping.hp_fragment, **moments}
        return OwnedFragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)

    def refresh(self) -> None:
        groups = self.zero.parallel_partitioned_bit16_groups
        for parts, own in zip(groups, self.zero.single_partition_of_fp32_groups, strict=True):
            parts[self.world.rank].copy_(own)
            _gather(parts, self.world)


class _Stage3(_Partitioned):
    """Stage 3: partitions of the weights too."""

    def updated_tensors(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def _fragment(self, name: str, parameter: Any) -> OwnedFragment | None:
        # Not DeepSpeed's own accessors: where the state is offloaded they return copies on the device, and what is
        # loaded into a copy is silently lost.
        zero = self.zero
        group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
        start = part * self.world.rank
        length = min(part, parameter.ds_numel - start)  # the last partition is padded
        if length <= 0:
            return None
        flat = zero.fp32_partitioned_groups_flat[group]
        wholes = {"weight": flat.detach(), **{key: self.optimizer.state[flat][key] for key in _MOMENTS}}
        tensors = {key: whole.narrow(0, offset, length) for key, whole in wholes.items()}
        return OwnedFragment(name, tuple(parameter.ds_shape), start, tensors)

    def refresh(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        zero.invalidate_secondary_tensor()  # a node's copy of the old weights, with hierarchical partitions
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


PARTITIONS = {0: Partitions, 1: _Stage12, 2: _Stage12, 3: _Stage3}
"""Where things are, by ZeRO stage."""


def _gather(parts: list[Tensor], world: World) -> None:
    """Fills in every rank's part; piecewise, because gloo gathers into a buffer as large as what it gathers."""
    if world.size > 1:
        for pieces in zip(*(part.split(_GATHERED_AT_ONCE) for part in parts), strict=True):
            dist.all_gather(list(pieces), pieces[world.rank])
