"""Packs whole documents into windows, best-fit-decreasing (Ding et al. 2024, "Fewer Truncations ...", section 3).

Imports numpy alone: the processes that pack a large dataset start with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class Packed(NamedTuple):
    """The windows of one block of documents."""

    begins: Int64s
    """First token of each piece, window after window."""
    lengths: Int64s
    """Tokens of each piece."""
    counts: Int64s
    """Pieces of each window."""


def pack(begins: Int64s, ends: Int64s, capacity: int) -> Packed:
    """Packs documents into windows of at most `capacity` tokens.

    A document that is longer is cut into pieces that overlap by one token, so that every token but its first is
    predicted once. Longest first, each piece goes into the window with the least room that holds it.

    Args:
        begins: First token of each document.
        ends: The one after its last.
        capacity: One more than the context length.
    """
    begins, lengths = _cut(begins, ends, capacity)
    order = np.argsort(-lengths, kind="stable")
    window_of = np.empty(len(order), np.int64)
    # Bit r of `rooms` is set if some window has room for r tokens.
    open_windows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = made = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = open_windows[room].pop()
            if not open_windows[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, made
            made += 1
        window_of[piece] = window
        if room > length:
            if not open_windows[room - length]:
                rooms |= 1 << (room - length)
            open_windows[room - length].append(window)
    by_window = order[np.argsort(window_of[order], kind="stable")]
    return Packed(begins[by_window], lengths[by_window], np.bincount(window_of, minlength=made))


def _cut(begins: Int64s, ends: Int64s, capacity: int) -> tuple[Int64s, Int64s]:
    """Returns the first token and the length of each piece, document after document."""
    step = capacity - 1
    pieces = np.maximum(1, -(-(ends - begins - 1) // step))
    document = np.repeat(np.arange(len(begins)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = begins[document] + number * step
    return first, np.minimum(ends[document] - first, capacity)
