"""Log-likelihoods and greedy texts of many rows at a time, with the key-value cache where it saves computation.

A request is a context and a continuation. Requests that differ only in their last token share a row, requests of one
context share the reading of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.model.attention import KeyValueCache
from pipeline.model.transformer import TransformerLM

Ids = tuple[int, ...]

_SAVED = 0.5  # of the tokens to read, from which the cache is worth a second forward with a mask
_ROWS = 256
_PAD = 0  # to the right of what a row attends to


class Request(NamedTuple):
    """A continuation to score."""

    number: int
    """Names it in the answers."""
    context: Ids
    """What comes before; at least one token."""
    continuation: Ids
    """At least one token; together with the context at most one token longer than the model's context."""


class Score(NamedTuple):
    """What the model thinks of a continuation."""

    logprob: float
    """The sum of its tokens' log-probabilities, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


@dataclass(frozen=True)
class Row:
    """A text to read behind a context, and the requests that it answers: they end with one more token."""

    tokens: Ids
    requests: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """A context and the rows behind it."""

    context: Ids
    rows: list[Row]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, without the context."""
        return max(len(row.tokens) for row in self.rows)


@dataclass(frozen=True)
class Batch:
    """What one or two forwards answer."""

    groups: list[Group]
    cached: bool
    """Whether the contexts are read once, into a cache; otherwise each row is read whole."""


class Limits(NamedTuple):
    """How much one forward computes; the batches depend on it, and not on the number of processes."""

    tokens: int
    logits: int

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Returns what keeps a device busy and fits beside the weights: 1 GiB of logits on a GPU."""
        return cls(1 << 14, 1 << 28) if device.type == "cuda" else cls(1 << 11, 1 << 25)

    def rows(self, length: int, positions: int, vocab_size: int) -> int:
        """Returns how many rows of this length go into one forward that returns this many positions of each."""
        return max(1, min(_ROWS, self.tokens // length, self.logits // (positions * vocab_size)))


def batches(requests: Sequence[Request], context_length: int, vocab_size: int, limits: Limits) -> list[Batch]:
    """Returns the batches that answer all requests, the longest first."""
    groups = _grouped(requests)
    whole = [Group(g.context, [row]) for g in groups if not _saves(g) for row in g.rows]
    made = [*_cut(whole, context_length, vocab_size, limits, cached=False)]
    return [*made, *_cut([g for g in groups if _saves(g)], context_length, vocab_size, limits, cached=True)]


def _grouped(requests: Iterable[Request]) -> list[Group]:
    found: dict[Ids, dict[Ids, Row]] = {}
    for request in requests:
        rows = found.setdefault(request.context, {})
        tokens = request.continuation[:-1]
        rows.setdefault(tokens, Row(tokens)).requests.append(request)
    return [Group(context, list(rows.values())) for context, rows in found.items()]


def _saves(group: Group) -> bool:
    behind = sum(len(row.tokens) for row in group.rows)
    whole = len(group.rows) * len(group.context) + behind
    return len(group.context) + behind <= (1 - _SAVED) * whole


def _cut(groups: list[Group], context_length: int, vocab_size: int, limits: Limits, *, cached: bool) -> Iterator[Batch]:
    """Yields batches of similar length: a forward is as long as its longest row."""
    taken: list[Group] = []
    shape = _Shape()
    for group in sorted(groups, key=lambda g: (-len(g.context) - g.longest, g.context)):
        grown = shape.with_group(group)
        length = grown.context + grown.behind if cached else grown.whole
        positions = grown.behind + 1 if cached else grown.whole - grown.shortest + 1
        if taken and (length > context_length or grown.rows > limits.rows(length, positions, vocab_size)):
            yield Batch(taken, cached)
            taken, grown = [], _Shape().with_group(group)
        taken.append(group)
        shape = grown
    if taken:
        yield Batch(taken, cached)


class _Shape(NamedTuple):
    """The extent of some groups, in tokens."""

    rows: int = 0
    context: int = 0
    behind: int = 0
    whole: int = 0
    shortest: int = 1 << 62

    def with_group(self, group: Group) -> _Shape:
        """Returns the extent with one more group."""
        length = len(group.context)
        return _Shape(
            self.rows + len(group.rows), max(self.context, length), max(self.behind, group.longest),
            max(self.whole, length + group.longest), min(self.shortest, length),
        )  # fmt: skip


@torch.inference_mode()
def score(model: TransformerLM, batch: Batch) -> list[tuple[int, Score]]:
    """Returns the scores of a batch's requests, each with its request's number."""
    rows = [(group, row) for group in batch.groups for row in group.rows]
    if batch.cached:
        logits = _logits_behind_contexts(model, batch.groups)
        firsts = [0] * len(rows)
    else:
        texts = [group.context + row.tokens for group, row in rows]
        skipped = min(len(group.context) for group, _ in rows) - 1
        logits = model(_padded(texts, model.device), logits_from=skipped)
        firsts = [len(group.context) - 1 - skipped for group, _ in rows]
    return _scores(logits, [row for _, row in rows], firsts)


def _logits_behind_contexts(model: TransformerLM, groups: Sequence[Group]) -> Tensor:
    """Returns the logits of the token after each context, and after each token behind it: `(rows, 1 + seq, vocab)`."""
    read = read_contexts(model, [group.context for group in groups])
    counts = torch.tensor([len(group.rows) for group in groups], device=model.device)
    each = torch.arange(len(groups), device=model.device).repeat_interleave(counts)
    first = read.logits[each, None]
    if not max(group.longest for group in groups):
        return first
    behind = _padded([row.tokens for group in groups for row in group.rows], model.device)
    return torch.cat([first, read.rows(each).more(model, behind)], dim=1)


def _scores(logits: Tensor, rows: Sequence[Row], firsts: Sequence[int]) -> list[tuple[int, Score]]:
    """Returns the scores of all requests of the rows, of which `firsts` are the places of the first logits."""
    asked = [(r, request) for r, row in enumerate(rows) for request in row.requests]
    row = [r for r, request in asked for _ in request.continuation]
    place = [firsts[r] + i for r, request in asked for i in range(len(request.continuation))]
    token = torch.tensor([t for _, request in asked for t in request.continuation], device=logits.device)
    # Not log_softmax, which would be a second tensor of this size, and a third in its place.
    picked = logits[row, place, token] - logits.logsumexp(-1)[row, place]
    likeliest = logits.argmax(-1)[row, place] == token
    logprobs, hits = picked.double().tolist(), likeliest.tolist()  # the only wait for the device
    found, start = [], 0
    for _, request in asked:
        end = start + len(request.continuation)
        found.append((request.number, Score(sum(logprobs[start:end]), all(hits[start:end]))))
        start = end
    return found


@dataclass
class ReadContexts:
    """Contexts of different lengths in a key-value cache, in which all of them end at the same place."""

    logits: Tensor
    """`(rows, vocab)`, of the token after each context."""
    caches: list[KeyValueCache]
    starts: Tensor
    """`(rows,)`: where each context begins in the cache; what is before is not attended to."""
    cached: int
    """Tokens in the cache."""

    def rows(self, which: Tensor) -> ReadContexts:
        """Returns some of the rows, in any order and number."""
        caches = []
        for old in self.caches:
            assert old.keys is not None and old.values is not None
            made = KeyValueCache()
            made.extend(old.keys[which], old.values[which])
            caches.append(made)
        return ReadContexts(self.logits[which], caches, self.starts[which], self.cached)

    def more(self, model: TransformerLM, tokens: Tensor) -> Tensor:
        """Appends tokens `(rows, seq)` to the cache and returns their logits `(rows, seq, vocab)`."""
        # Each row is one document that begins where its context does: so the mask and the positions leave out the rest.
        starts = self.starts[:, None].expand(tokens.shape)
        logits: Tensor = model(tokens, self.caches, start=self.cached, document_starts=starts)
        self.cached += tokens.shape[1]
        return logits


def read_contexts(model: TransformerLM, contexts: Sequence[Ids]) -> ReadContexts:
    """Reads contexts into a cache.

    They are read padded on the right, with plain causal attention, for which every device has its fast kernel; then
    keys and values move to the right end, where the next tokens of all rows have the same place.
    """
    lengths = torch.tensor([len(context) for context in contexts], device=model.device)
    shortest, longest = min(map(len, contexts)), max(map(len, contexts))
    caches = model.new_caches()
    logits = model(_padded(contexts, model.device), caches, logits_from=shortest - 1)
    starts = longest - lengths
    if shortest < longest:
        places = (torch.arange(longest, device=model.device) - starts[:, None]) % longest
        for cache in caches:
            assert cache.keys is not None and cache.values is not None
            cache.keys = cache.keys.take_along_dim(places[:, None, :, None], dim=2)
            cache.values = cache.values.take_along_dim(places[:, None, :, None], dim=2)
    rows = torch.arange(len(contexts), device=model.device)
    return ReadContexts(logits[rows, lengths - shortest], caches, starts, longest)


def _padded(texts: Sequence[Ids], device: torch.device) -> Tensor:
    """Returns texts as `(rows, longest)`, padded on the right."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[_PAD] * (longest - len(text))] for text in texts], device=device)
