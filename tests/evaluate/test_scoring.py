"""Batches, padding and the cache change no score: they are those of each request by itself."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.evaluate.scoring import Limits, Request, Score, batches, read_contexts, score
from pipeline.model.transformer import TransformerLM

VOCABULARY, CONTEXT = 50, 32


@pytest.fixture
def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(VOCABULARY, CONTEXT, 32, 2, 4, 64, 1e4, num_kv_heads=2).eval()


def drawn(count: int, seed: int) -> list[Request]:
    """Requests of which some share a context, and some all but the last token."""
    rng = random.Random(seed)
    contexts = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 25))) for _ in range(count // 3)]
    continuations = [tuple(rng.randrange(3) for _ in range(rng.randint(1, 8))) for _ in range(count)]
    return [Request(n, rng.choice(contexts), continuations[n]) for n in range(count)]


def alone(model: TransformerLM, request: Request) -> Score:
    """The definition, in float64 on one row."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, len(request.context) - 1 :].double()
    target = torch.tensor(request.continuation)
    found = logits.log_softmax(-1)[torch.arange(len(target)), target]
    return Score(float(found.sum()), bool((logits.argmax(-1) == target).all()))


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(100, 10_000), Limits(1 << 14, 1 << 24)])
def test_scores_are_those_of_each_request_alone(model: TransformerLM, limits: Limits):
    requests = drawn(60, 1)
    work = batches(requests, CONTEXT, VOCABULARY, limits)
    assert {batch.cached for batch in work} == {True, False}
    found = dict(pair for batch in work for pair in score(model, batch))
    assert sorted(found) == list(range(60))
    for request in requests:
        expected = alone(model, request)
        assert found[request.number].logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert found[request.number].is_greedy == expected.is_greedy


def test_no_forward_is_larger_than_the_limits_and_none_exceeds_the_context(model: TransformerLM):
    limits = Limits(200, 5_000)
    for batch in batches(drawn(90, 2), CONTEXT, VOCABULARY, limits):
        rows = sum(len(group.rows) for group in batch.groups)
        longest = max(len(group.context) + group.longest for group in batch.groups)
        if batch.cached:
            longest = max(len(group.context) for group in batch.groups) + max(group.longest for group in batch.groups)
        assert longest <= CONTEXT
        assert len(batch.groups) == 1 or rows * longest <= limits.tokens


def test_what_differs_only_in_its_last_token_is_read_once(model: TransformerLM):
    (batch,) = batches([Request(n, (1, 2, 3), (4, n)) for n in range(5)], CONTEXT, VOCABULARY, Limits(100, 10_000))
    assert [len(group.rows) for group in batch.groups] == [1] and not batch.cached


def test_contexts_of_different_lengths_continue_at_the_same_place(model: TransformerLM):
    texts = [(1, 2, 3, 4, 5), (6,), (7, 8, 9)]
    with torch.no_grad():
        read = read_contexts(model, texts).rows(torch.tensor([2, 0]))
        more = [read.more(model, torch.tensor([[10], [11]])), read.more(model, torch.tensor([[12, 13], [14, 15]]))]
        for row, text in enumerate([(7, 8, 9, 10, 12, 13), (1, 2, 3, 4, 5, 11, 14, 15)]):
            whole = model(torch.tensor([text]))[0, -3:]
            torch.testing.assert_close(torch.cat([part[row] for part in more]), whole, rtol=0, atol=1e-5)
