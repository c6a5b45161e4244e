"""Counts of a model's parameters and floating-point operations, for MFU and for plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Shape(Protocol):
    """What the counts depend on; the section `model` of a config has it."""

    vocab_size: int
    """Number of token embeddings."""
    context_length: int
    """Longest sequence, in tokens."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    d_ff: int
    """Inner width of the feed-forward."""
    tie_embeddings: bool
    """Whether the head uses the embedding's weight."""
    qkv_bias: bool
    """Whether queries, keys and values have biases."""
    qk_norm: bool
    """Whether queries and keys are normalized per head."""

    @property
    def d_q(self) -> int:
        """Width of the queries of all heads together."""
        ...

    @property
    def d_kv(self) -> int:
        """Width of the keys of all heads together."""
        ...

    @property
    def head_size(self) -> int:
        """Size of a head."""
        ...


class Count(NamedTuple):
    """Parameters of one size."""

    number: int
    """How many there are."""
    elements: int
    """Elements of each."""


def block_matrices(model: Shape) -> Iterator[Count]:
    """Yields the matrices of one block."""
    yield Count(2, model.d_model * model.d_q)
    yield Count(2, model.d_model * model.d_kv)
    yield Count(3, model.d_model * model.d_ff)


def block_vectors(model: Shape) -> Iterator[Count]:
    """Yields the gains and biases of one block."""
    yield Count(2, model.d_model)
    if model.qkv_bias:
        yield Count(1, model.d_q)
        yield Count(2, model.d_kv)
    if model.qk_norm:
        yield Count(2, model.head_size)


def parameter_counts(model: Shape) -> Iterator[Count]:
    """Yields all parameters of the model, by size."""
    yield Count(1 if model.tie_embeddings else 2, model.vocab_size * model.d_model)
    for number, elements in (*block_matrices(model), *block_vectors(model)):
        yield Count(number * model.num_layers, elements)
    yield Count(1, model.d_model)


def elements(counts: Iterator[Count]) -> int:
    """Returns the elements of all of them together."""
    return sum(count.number * count.elements for count in counts)


def num_parameters(model: Shape) -> int:
    """Returns the number of parameters of `TransformerLM`, the embedding and an untied head included."""
    return elements(parameter_counts(model))


def flops_per_token(model: Shape) -> int:
    """Returns the floating-point operations of forward and backward per trained token.

    Six per weight that multiplies an activation (the embedding is a look-up and does not count, the head does) plus
    12 x layers x width of the queries x context for the attention scores and their use (Chowdhery et al. 2022,
    appendix B; the causal half is not subtracted, as is usual for MFU). Recomputation does not count.
    """
    multiplied = model.num_layers * elements(block_matrices(model)) + model.vocab_size * model.d_model
    return 6 * multiplied + 12 * model.num_layers * model.d_q * model.context_length
