"""Cross-entropy."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target], in nats.

    Computed in float32 and shifted by the largest logit, so that no size of logit overflows.

    Args:
        logits: `(..., vocab)`.
        targets: `(...)` int64, each in `[0, vocab)`.
    """
    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True).detach()
    target_logits = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (shifted.exp().sum(dim=-1).log() - target_logits).mean()
