"""Sampling text with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.model.layers import softmax
from pipeline.model.transformer import TransformerLM


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continues a prompt token by token and returns the new tokens.

    When the context is full, its newer half is kept and read again, so that the text can be longer than the context.

    Args:
        model: The model.
        prompt_ids: At least one token; only the last `context_length - 1` tokens count.
        max_new_tokens: Largest number of tokens to add.
        temperature: 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens that holds this much probability (Holtzman et al. 2020).
        stop_id: The token that ends the text; it is not returned. By it, a model with a document mask also knows the
            documents of the prompt.
        generator: Source of randomness, on the model's device.
    """
    device = model.device
    context = list(prompt_ids)[-max(1, model.context_length - 1) :]
    caches, cached = model.new_caches(), 0
    new: list[int] = []
    while len(new) < max_new_tokens:
        if len(context) > model.context_length:
            context = context[-(model.context_length // 2 or 1) :]
            caches, cached = model.new_caches(), 0
        ids = torch.tensor([context[cached:]], device=device)
        starts = _document_starts(context, cached, stop_id, device) if model.document_mask else None
        logits = model(ids, caches, start=cached, document_starts=starts)[0, -1]
        cached = len(context)
        token = draw(logits, temperature, top_p, generator)
        if token == stop_id:
            break
        new.append(token)
        context.append(token)
    return new


def _document_starts(context: Sequence[int], first: int, end_id: int | None, device: torch.device) -> Tensor:
    """Returns where the document of each token from `first` on starts, `(1, tokens)`."""
    starts, begin = [], 0
    for place, token in enumerate(context):
        starts.append(begin)
        if token == end_id:
            begin = place + 1
    return torch.tensor([starts[first:]], device=device)


# Below it the likeliest token is certain for any float32 logits that differ, and dividing by it may give infinities.
_GREEDY = 1e-6


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Draws one token from logits `(vocab,)`."""
    if temperature < _GREEDY:
        return int(logits.argmax())
    probabilities, order = softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    # A token is kept while the likelier ones hold less than top_p: the likeliest always is.
    kept = torch.where(probabilities.cumsum(-1) - probabilities < top_p, probabilities, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
