"""Attention within documents: which way it is computed on which device is chosen here and nowhere else.

A batch comes with `starts`, `(batch, seq)` int64: the place, in its row, of the first token of each token's document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SHORT = 256
"""Tokens of a row up to which one mask is faster on a CPU than a call for each document."""


class Layout(NamedTuple):
    """How attention within documents is computed; exactly one field is set."""

    lengths: tuple[int, ...] | None = None
    """Tokens of each document, row after row: one call for each."""
    mask: Tensor | None = None
    """`(batch, 1, queries, keys)` bool, True = attend: one call for all."""
    blocks: BlockMask | None = None
    """For PyTorch's flex_attention, which leaves out blocks of keys that no query of a block sees."""


def document_layout(starts: Tensor, first: int, compiled: bool) -> Layout:
    """Returns how attention is computed for these documents.

    On a GPU by flex_attention; on a CPU with one call for each document or with a mask, whichever is faster at the
    length of the rows (`benchmarks/document_mask.py`). A cache, whose keys are more than the queries, takes the mask,
    and so do compiled blocks on a CPU, which other lengths would compile again.

    Args:
        starts: `(batch, seq)`: the first token of each token's document, as its position in the row.
        first: Position of the first of these tokens: the number of tokens in the cache.
        compiled: Whether the blocks are compiled.
    """
    if starts.is_cuda and first == 0:
        return Layout(blocks=block_mask(starts, compiled=True))
    if compiled or first > 0 or starts.shape[-1] <= SHORT:
        return Layout(mask=attention_mask(starts, first))
    begins = (starts == torch.arange(starts.shape[-1])).flatten().nonzero().flatten().tolist()
    ends = [*begins[1:], starts.numel()]
    return Layout(lengths=tuple(end - begin for begin, end in zip(begins, ends, strict=True)))


def attention_mask(starts: Tensor, first: int = 0) -> Tensor:
    """Returns which keys each query sees, `(batch, 1, seq, first + seq)`: those of its document up to itself."""
    queries = torch.arange(first, first + starts.shape[-1], device=starts.device)
    keys = torch.arange(first + starts.shape[-1], device=starts.device)
    return ((keys <= queries[:, None]) & (keys >= starts[..., None]))[:, None]


def block_mask(starts: Tensor, compiled: bool) -> BlockMask:
    """Returns the same mask for flex_attention; compiled, no mask of all queries and keys exists in between."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    make = _compiled(create_block_mask) if compiled else create_block_mask
    rows, length = starts.shape
    found: BlockMask = make(sees, rows, None, length, length, device=starts.device)
    return found


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, attention: Callable[..., Tensor]) -> Tensor:
    """Returns attention in which each query sees the keys of its own document up to itself.

    Args:
        q: `(batch, heads, queries, d_k)`.
        k: `(batch, kv_heads, keys, d_k)`.
        v: `(batch, kv_heads, keys, d_v)`.
        layout: How to compute it.
        attention: Attention without documents: takes q, k, v and `is_causal` or `mask`.
    """
    if layout.mask is not None:
        return attention(q, k, v, is_causal=False, mask=layout.mask)
    if layout.lengths is None:
        # Inside a compiled block it is compiled with it; by itself it would hold the whole matrix of scores.
        inside = torch.compiler.is_compiling() or not q.is_cuda
        flex: Any = flex_attention if inside else _compiled(flex_attention)
        heads: Tensor = flex(q, k, v, block_mask=layout.blocks, enable_gqa=q.shape[1] != k.shape[1])
        return heads
    # All rows as one long sequence: autograd would add up one gradient of the batch's size for each slice of it.
    parts = zip(*(t.transpose(0, 1).flatten(1, 2).split(layout.lengths, 1) for t in (q, k, v)), strict=True)
    made = torch.cat([attention(*(t[None] for t in part), is_causal=True)[0] for part in parts], dim=1)
    return made.unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
