"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# 256k float32 elements of weight, gradient and two moments are 4 MB, which stay in a core's cache during the passes of
# the update. On one flat tensor that halves the time (benchmarks/adamw.py).
CPU_CHUNK = 1 << 18

StepCount = int | Tensor


class AdamW(torch.optim.Optimizer):
    """Elementwise AdamW, which works on ZeRO's flat partitions as on whole parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay: each step shrinks the weights by lr * weight_decay.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        allowed = {
            "lr": lr >= 0,
            "betas": all(0 <= beta < 1 for beta in betas),
            "eps": eps >= 0,
            "weight_decay": weight_decay >= 0,
        }
        for name, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(f"AdamW: {name} = {locals()[name]} is out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.counts: bool | Tensor = True
        """Whether the next step counts; if not, weights, moments and step count stay as they are.

        A tensor `()` is never read by the host: the device, which runs behind it, decides by itself.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the loss of the closure, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        counts = self.counts if isinstance(self.counts, Tensor) else None
        if counts is None and not self.counts:
            return loss
        for group in self.param_groups:
            for (step, device), tensors in self._by_step_and_device(group).items():
                if device.type == "cpu":
                    for one in zip(*tensors, strict=True):
                        _update_in_chunks(one, group, step, counts)
                else:
                    _update(tensors, group, step, counts)
        return loss

    def _by_step_and_device(self, group: dict[str, Any]) -> dict[tuple[StepCount, torch.device], list[list[Tensor]]]:
        """Groups weights, gradients and both moments by their step count and device."""
        batches: dict[tuple[StepCount, torch.device], list[list[Tensor]]] = {}
        one = self.counts.double() if isinstance(self.counts, Tensor) else 1
        after: dict[StepCount, StepCount] = {}  # parameters that share a count keep sharing one, even if it is a tensor
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise ValueError("AdamW does not support sparse gradients")
            state = self.state[param]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            before = state["step"]
            if before not in after:
                after[before] = before + one
            state["step"] = after[before]
            lists = batches.setdefault((state["step"], param.device), [[], [], [], []])
            for target, tensor in zip(lists, (param, param.grad, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                target.append(tensor)
        return batches


def _update_in_chunks(
    tensors: tuple[Tensor, ...], group: dict[str, Any], step: StepCount, counts: Tensor | None
) -> None:
    if tensors[0].numel() <= CPU_CHUNK or not all(t.is_contiguous() for t in tensors):
        _update([[t] for t in tensors], group, step, counts)
        return
    for chunks in zip(*(t.view(-1).split(CPU_CHUNK) for t in tensors), strict=True):
        _update([[c] for c in chunks], group, step, counts)


def _update(tensors: list[list[Tensor]], group: dict[str, Any], step: StepCount, counts: Tensor | None) -> None:
    if counts is not None:
        _update_where(counts, tensors, group, torch.as_tensor(step))
        return
    params, grads, exp_avgs, exp_avg_sqs = tensors
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))


def _update_where(counts: Tensor, tensors: list[list[Tensor]], group: dict[str, Any], step: Tensor) -> None:
    """Makes the same update with tensors as factors: where `counts` is False, no line changes a bit.

    No number moves between host memory and the device, so neither waits for the other.
    """
    params, grads, exp_avgs, exp_avg_sqs = tensors
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    one = counts.double()
    started = step.clamp(min=1)  # before the first step that counts, the corrections would be zero
    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * one)
    towards = [torch.where(counts, g, m) for g, m in zip(grads, exp_avgs, strict=True)]
    torch._foreach_lerp_(exp_avgs, towards, 1 - beta1)
    del towards  # as large as the weights; otherwise both would exist at once
    towards = [g.masked_fill(counts.logical_not(), 0.0) for g in grads]
    torch._foreach_mul_(exp_avg_sqs, 1 - (1 - beta2) * one)
    torch._foreach_addcmul_(exp_avg_sqs, towards, towards, 1 - beta2)
    del towards
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**started).sqrt())
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_mul_(denominators, (1 - beta1**started) / one)  # infinite where nothing counts
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr)


def decay_groups(model: torch.nn.Module, weight_decay: float, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Returns the non-empty parameter groups: matrices decay, the gains of norms only with `decay_norms`.

    A parameter that ZeRO-3 has partitioned looks flat; its real shape is its `ds_shape`.
    """
    decays = [decay_norms or len(getattr(p, "ds_shape", p.shape)) >= 2 for p in model.parameters()]
    decayed = [p for p, decay in zip(model.parameters(), decays, strict=True) if decay]
    gains = [p for p, decay in zip(model.parameters(), decays, strict=True) if not decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
