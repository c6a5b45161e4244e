"""Texts that continue many prompts at a time, each until a stop sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.evaluate.scoring import Ids, Limits, read_contexts
from pipeline.model.generate import draw
from pipeline.model.transformer import TransformerLM

_MOST_TOKENS = 256  # the harness's default
_ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {"until", "do_sample", "temperature", "top_p", *_ALIASES}
# A character has at most four bytes, and a token at least one.
_BYTES = 4


@dataclass(frozen=True)
class Settings:
    """How a text is generated."""

    stops: tuple[str, ...]
    """The text ends before the first of them."""
    max_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    top_p: float

    @classmethod
    def of(cls, given: dict[str, Any], task: str, context_length: int) -> Settings:
        """Reads a task's `generation_kwargs`, as the harness reads them for its own models.

        Raises:
            UsageError: They ask for what is not supported, or for more tokens than the model's context has.
        """
        unknown = sorted(given.keys() - _KNOWN)
        if unknown:
            raise UsageError(
                f"task {task}: generation_kwargs.{unknown[0]} is not supported; "
                f"supported are {', '.join(sorted(_KNOWN))}"
            )
        until = given.get("until") or []
        most = next((int(given[name]) for name in _ALIASES if given.get(name) is not None), _MOST_TOKENS)
        if most >= context_length:
            raise UsageError(
                f"task {task}: generates up to {most} tokens, and the model's context holds {context_length}; "
                "set generation_kwargs.max_gen_toks of the task to less"
            )
        sampled = given.get("do_sample")
        temperature = float(given.get("temperature") or 0.0) if sampled is not False else 0.0
        stops = (until,) if isinstance(until, str) else tuple(until)
        return cls(tuple(s for s in stops if s), most, temperature, float(given.get("top_p") or 1.0))


class Prompt(NamedTuple):
    """A text to continue."""

    number: int
    """Names it in the answers, and seeds its randomness."""
    tokens: Ids
    """Not empty, and with the new tokens no longer than the context."""
    settings: Settings


def prompt_batches(prompts: Sequence[Prompt], vocab_size: int, limits: Limits) -> list[list[Prompt]]:
    """Returns the prompts in batches of the same settings and similar length, the longest first."""
    kinds = dict.fromkeys(prompt.settings for prompt in prompts)
    return [
        batch
        for kind in kinds
        for batch in _cut([p for p in prompts if p.settings == kind], kind.max_tokens, vocab_size, limits)
    ]


def _cut(prompts: list[Prompt], new: int, vocab_size: int, limits: Limits) -> Iterator[list[Prompt]]:
    taken: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda p: (-len(p.tokens), p.tokens)):
        longest = len(taken[0].tokens) if taken else len(prompt.tokens)
        # The first forward returns logits from the end of the shortest prompt on.
        if taken and len(taken) >= limits.rows(longest + new, longest - len(prompt.tokens) + 1, vocab_size):
            yield taken
            taken = []
        taken.append(prompt)
    if taken:
        yield taken


@torch.inference_mode()
def generate_batch(model: TransformerLM, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[tuple[int, str]]:
    """Returns the new text of each prompt, with its number; finished rows leave the batch."""
    settings = prompts[0].settings
    tail = _BYTES * max(map(len, settings.stops), default=0) + 1
    generators = [torch.Generator().manual_seed(prompt.number) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    read, logits = read_contexts(model, [prompt.tokens for prompt in prompts]), None
    active = list(range(len(prompts)))
    for _ in range(settings.max_tokens):
        tokens = _next_tokens(read.logits if logits is None else logits, settings, [generators[i] for i in active])
        kept = []
        for place, (i, token) in enumerate(zip(active, tokens, strict=True)):
            if token == tokenizer.end_of_text_id:
                continue
            new[i].append(token)
            end = _text(tokenizer, new[i][-tail:]) if settings.stops else ""
            if not any(stop in end for stop in settings.stops):
                kept.append(place)
        if not kept:
            break
        if len(kept) < len(active):
            read = read.rows(torch.tensor(kept, device=model.device))
            active = [active[place] for place in kept]
        latest = torch.tensor([[new[i][-1]] for i in active], device=model.device)
        logits = read.more(model, latest)[:, -1]
    return [
        (prompt.number, _until_stop(_text(tokenizer, ids), settings.stops))
        for prompt, ids in zip(prompts, new, strict=True)
    ]


def _next_tokens(logits: Tensor, settings: Settings, generators: list[torch.Generator]) -> list[int]:
    if settings.temperature == 0:
        return logits.argmax(-1).tolist()
    rows = logits.cpu()  # each row has a generator of its own, so that its text does not depend on its batch
    return [draw(row, settings.temperature, settings.top_p, g) for row, g in zip(rows, generators, strict=True)]


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    special = set(tokenizer.special_tokens.values())
    return tokenizer.decode([i for i in ids if i not in special])


def _until_stop(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
