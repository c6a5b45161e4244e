"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LANES = 16
"""Float32 numbers in the widest vector of a CPU."""


class _Update(NamedTuple):
    """One parameter's tensors in a step, all of one shape but the step count `()`."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """The number of this step; float32, on the weight's device."""


class AdamW(torch.optim.Optimizer):
    """Elementwise AdamW, which works on ZeRO's flat partitions as on whole parameters.

    The formula is `adamw_formula`. Float32 tensors take PyTorch's fused kernel of it, which makes one pass over memory
    and rounds a little differently.

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
        self.grad_divisor: Tensor | None = None
        """What the next step divides the gradients by, a float32 tensor `()`; see `clip_divisor`. None: by nothing.

        It saves clipping its own pass over memory. The step may overwrite the gradients with the quotients.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own; see `torch.optim.Optimizer`."""
        # PyTorch's, without its guard against tracing, whose first call imports the compiler: a second of CPU time.
        torch.optim.Optimizer.add_param_group.__wrapped__(self, param_group)  # type: ignore[attr-defined]

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
            for device, updates in self._by_device(group).items():
                here = [None if t is None else t.to(device) for t in (counts, self.grad_divisor)]
                fused = [u for u in updates if _fits_the_kernel(u)]
                if fused:
                    _update_fused(fused, group, *here)
                for update in updates:
                    if not _fits_the_kernel(update):
                        _update_by_formula(update, group, *here)
        return loss

    def _by_device(self, group: dict[str, Any]) -> dict[torch.device, list[_Update]]:
        """Returns what to update on each device, and counts the step in the state."""
        updates: dict[torch.device, list[_Update]] = {}
        after: dict[Any, Tensor] = {}  # parameters that share a count keep sharing one
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
            key = (param.device, state["step"])
            if key not in after:
                # Filled on the device: a new tensor of a Python number would be a copy that the host waits for.
                one = torch.ones((), device=param.device)
                after[key] = one * self.counts + state["step"]
            state["step"] = after[key]
            update = _Update(param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            updates.setdefault(param.device, []).append(update)
        return updates


def adamw_formula(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weight and both moments after a step (Loshchilov & Hutter 2019, algorithm 2).

    Args:
        weight: The weight before the step; gradient and moments have its shape.
        grad: Its gradient.
        exp_avg: First moment before the step.
        exp_avg_sq: Second moment before the step.
        step: The number of this step `()`, from 1.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """
    beta1, beta2 = betas
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    step = step.double()  # in float32, 1 - 0.999^1 has only three digits
    unbiased = exp_avg / (1 - beta1**step)
    unbiased_sq = exp_avg_sq / (1 - beta2**step)
    weight = (1 - lr * weight_decay) * weight - lr * unbiased / (unbiased_sq.sqrt() + eps)
    return weight, exp_avg, exp_avg_sq


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def _update_by_formula(update: _Update, group: dict[str, Any], counts: Tensor | None, divisor: Tensor | None) -> None:
    grad = update.grad.to(update.exp_avg.dtype)
    update = update._replace(grad=grad if divisor is None else grad / divisor)
    old = (update.weight, update.exp_avg, update.exp_avg_sq)
    for target, new in zip(old, adamw_formula(*update, **_settings(group)), strict=True):
        target.copy_(new if counts is None else torch.where(counts, new, target))


def _fits_the_kernel(update: _Update) -> bool:
    """Whether the fused kernel, which reads bare memory, takes these tensors."""
    return update.weight.device.type in ("cpu", "cuda") and all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in update
    )


def _update_fused(updates: list[_Update], group: dict[str, Any], counts: Tensor | None, divisor: Tensor | None) -> None:
    padded: list[tuple[Tensor, Tensor]] = []
    if updates[0].weight.is_cpu:
        updates, padded = _split_ends(updates)
    weights, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*updates, strict=True))
    settings = _settings(group)
    beta1, beta2 = settings.pop("betas")
    torch._fused_adamw_(
        weights, grads, exp_avgs, exp_avg_sqs, [], steps, beta1=beta1, beta2=beta2, **settings, amsgrad=False,
        maximize=False, grad_scale=divisor, found_inf=None if counts is None else counts.logical_not().float(),
    )  # fmt: skip
    for end, copy in padded:
        end.copy_(copy[: len(end)])


def _split_ends(updates: list[_Update]) -> tuple[list[_Update], list[tuple[Tensor, Tensor]]]:
    """Moves what follows the last whole vector of each parameter into padded copies, which the caller copies back.

    PyTorch's CPU kernel rounds the elements behind the last whole vector differently. Where a parameter ends depends on
    the layout (whole, or in ZeRO's partitions), and the same weights would get other bits.
    """
    whole: list[_Update] = []
    padded: list[tuple[Tensor, Tensor]] = []
    for update in updates:
        flat = [tensor.view(-1) for tensor in update[:4]]
        length = len(flat[0]) // _LANES * _LANES
        if length:
            whole.append(_Update._make([*(tensor[:length] for tensor in flat), update.step]))
        if length < len(flat[0]):
            ends = [tensor[length:] for tensor in flat]
            missing = _LANES - len(ends[0])
            copies = [torch.nn.functional.pad(end, (0, missing)) for end in ends]
            whole.append(_Update._make([*copies, update.step]))
            padded += zip(ends, copies, strict=True)
    return whole, padded


def decay_groups(model: torch.nn.Module, weight_decay: float, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Returns the non-empty parameter groups: matrices decay, the gains of norms only with `decay_norms`."""
    parameters = [(p, decay_norms or len(_whole_shape(p)) >= 2) for p in model.parameters()]
    decayed = [p for p, decays in parameters if decays]
    gains = [p for p, decays in parameters if not decays]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    # A parameter that ZeRO-3 has partitioned is flat, and its whole shape an attribute.
    return getattr(parameter, "ds_shape", parameter.shape)
