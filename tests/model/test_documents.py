"""With a document mask a document is computed as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline.model.documents as module
import pipeline.model.transformer as transformer
from pipeline.model.attention import grouped_query_attention
from pipeline.model.chunked_loss import IGNORED
from pipeline.model.documents import Layout, attention_mask, block_mask, document_attention, document_layout
from pipeline.model.generate import generate
from pipeline.model.transformer import TransformerLM

END = 0
# Two rows of 24 tokens with documents of 1 to 24.
LENGTHS = [[5, 1, 11, 7], [24]]
VARIANTS: list[dict[str, Any]] = [{}, {"num_kv_heads": 2}, {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True}]


def starts_of(lengths: list[list[int]]) -> Tensor:
    """The first place of each token's document."""
    rows = [[sum(row[:i]) for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows)


STARTS = starts_of(LENGTHS)


def model(**variant: Any) -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(50, 24, 32, 2, 4, 64, 10000.0, **variant)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(1, 50, STARTS.shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    net: TransformerLM, ids: Tensor, starts: Tensor | None, keep: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the gradient by the embedded tokens, and those by the weights, of a loss on the tokens to keep."""
    embedded: list[Tensor] = []
    hook = net.token_embeddings.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), embedded.append(output))[1]  # type: ignore[func-returns-value]
    )
    net.zero_grad()
    logits = net(ids, document_starts=starts)
    hook.remove()
    (logits * keep.unsqueeze(-1)).square().sum().backward()
    assert embedded[0].grad is not None
    return logits.detach(), embedded[0].grad, [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("one_mask", [False, True], ids=["a call for each", "one mask"])
def test_neighbours_change_no_bit_of_a_documents_logits_and_gradients(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], one_mask: bool
) -> None:
    net = model(**variant)
    monkeypatch.setattr(module, "SHORT", 256 if one_mask else 0)
    inside = torch.zeros_like(STARTS, dtype=torch.bool)
    inside[0, 6:17] = True  # the document of eleven tokens
    ids = tokens()
    logits, grad, weights = gradients(net, ids, STARTS, inside)
    assert not grad[~inside].any(), "no other token counts"
    others = torch.where(inside, ids, tokens(seed=1))
    again, grad_again, weights_again = gradients(net, others, STARTS, inside)
    assert not torch.equal(ids, others)
    assert torch.equal(logits[inside], again[inside]) and torch.equal(grad, grad_again)
    if "tie_embeddings" not in variant:  # else the head's gradient sums over other tokens too, with zeros
        own = {index: w for index, w in enumerate(weights) if index > 0}
        assert all(torch.equal(w, weights_again[index]) for index, w in own.items())
    plain = net(others)
    assert not torch.allclose(plain[inside], again[inside], atol=1e-3), "without the mask they do"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("one_mask", [False, True], ids=["a call for each", "one mask"])
def test_logits_and_gradients_are_those_of_the_documents_alone(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], one_mask: bool
) -> None:
    monkeypatch.setattr(module, "SHORT", 256 if one_mask else 0)
    net, ids = model(**variant), tokens()
    everywhere = torch.ones_like(STARTS, dtype=torch.bool)
    logits, grad, weights = gradients(net, ids, STARTS, everywhere)
    total = [torch.zeros_like(w) for w in weights]
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths):
            place = slice(sum(lengths[:number]), sum(lengths[:number]) + length)
            alone, grad_alone, parts = gradients(net, ids[row : row + 1, place], None, everywhere[:1, :length])
            torch.testing.assert_close(logits[row, place], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad[row, place], grad_alone[0], rtol=1e-4, atol=1e-4)
            total = [a + b for a, b in zip(total, parts, strict=True)]
    for ours, theirs in zip(weights, total, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_way_to_compute_it_gives_the_same(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    """flex_attention, which a GPU takes, runs forward here too; the mask is written out by hand."""
    monkeypatch.setattr(module, "SHORT", 0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 24, 8) for heads in (4, kv_heads, kv_heads))
    made = {
        "lengths": document_layout(STARTS, 0, compiled=False),
        "mask": document_layout(STARTS, 0, compiled=True),
        "blocks": Layout(blocks=block_mask(STARTS, compiled=False)),
    }
    assert [name for name, layout in made.items() if getattr(layout, name) is not None] == list(made)
    assert made["lengths"].lengths == (5, 1, 11, 7, 24)
    scores = (q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2)) / 8**0.5
    for row in range(2):
        for query in range(24):
            for key in range(24):
                if key > query or key < STARTS[row, query]:
                    scores[row, :, query, key] = -torch.inf
    expected = scores.softmax(-1) @ v.repeat_interleave(4 // kv_heads, 1)
    for layout in made.values():
        torch.testing.assert_close(document_attention(q, k, v, layout, grouped_query_attention), expected)


@pytest.mark.parametrize("one_mask", [False, True], ids=["a call for each", "one mask"])
def test_the_loss_and_its_gradients_are_the_same_however_activations_are_checkpointed(
    monkeypatch: pytest.MonkeyPatch, one_mask: bool
) -> None:
    monkeypatch.setattr(module, "SHORT", 256 if one_mask else 0)
    found = []
    targets = tokens(seed=2)
    targets[1, 20:] = IGNORED
    for mode in ("none", "full", "selective"):
        net = model()
        net.activation_checkpointing, net.loss_chunk_tokens = mode, 7  # type: ignore[assignment]
        parts = net(tokens(), targets=targets, document_starts=STARTS)
        parts.loss.backward()
        found.append([parts.loss.detach(), *(p.grad for p in net.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    logits = model()(tokens(), document_starts=STARTS)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(found[0][0], plain.detach())


def test_a_cache_gives_the_logits_of_the_whole_sequence() -> None:
    """In one piece, then token by token over the border of a document, then in a piece that holds a border."""
    net, ids = model(num_kv_heads=2).eval(), tokens()
    whole = net(ids, document_starts=STARTS)
    caches, parts, begin = net.new_caches(), [], 0
    for end in (9, 10, 11, 16, 17, 18, 24):
        piece = slice(begin, end)
        parts.append(net(ids[:, piece], caches, start=begin, document_starts=STARTS[:, piece]))
        begin = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert attention_mask(STARTS[:, 10:11], 10).shape == (2, 1, 1, 11)


def test_a_prompt_of_several_documents_continues_the_last() -> None:
    net = model(document_mask=True)
    expected = generate(net, [7, 8, 9], 6, temperature=0.0, stop_id=END)
    assert generate(net, [3, 4, 5, END, 7, 8, 9], 6, temperature=0.0, stop_id=END) == expected
    assert len(expected) == 6
    blind = model()
    assert generate(blind, [7, 8, 9], 6, temperature=0.0, stop_id=END) == expected, "one document needs no mask"


def test_without_starts_a_block_gets_the_arguments_it_always_had(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    whole = transformer.recomputed

    def noting(block: Any, mode: Any) -> Any:
        return lambda *args: (seen.append(args[1:]), whole(block, mode)(*args))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(transformer, "recomputed", noting)
    model()(tokens())
    assert seen == [(slice(0, 24), None)] * 2
