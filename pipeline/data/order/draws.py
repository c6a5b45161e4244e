"""Maps sample `n` of a run to its tokens, by pure functions: a resumed run needs no state but its step.

Sample `n` is row `n % batch_size` of global batch `n // batch_size`. A stream of `T` tokens holds
`W = (T - 1) // context_length` windows that do not overlap (a window needs one more token, for the last
target). An epoch draws every window of a stream once, in the order of a keyed permutation that is computed,
never stored. The `(T - 1) % context_length` tokens that fill no window are skipped in that epoch: less than
one window per stream. Each epoch shifts the first window by a keyed random part of them, so that the
unseen tokens differ from epoch to epoch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.order.mixture import mixture, mixture_counts
from pipeline.data.order.permutation import Int64s, UInt64s, derive_key, mix64, permute

_PERMUTE, _SHIFT, _START, _SOURCE, _PHASE = 0, 1, 3, 4, 5


@dataclass(frozen=True)
class Phase:
    """Weights that hold from one sample on."""

    start: int
    """First sample."""
    weights: tuple[float, ...]
    """Share of each stream; 0 for one that is absent."""


@dataclass(frozen=True)
class Order:
    """The order of one run."""

    kind: Literal["shuffle", "random"]
    """`shuffle`: without replacement, epoch by epoch; `random`: at any offset, with replacement."""
    tokens: tuple[int, ...]
    """Number of tokens of each stream."""
    weights: tuple[float, ...] | None
    """Share of each stream; None if there is only one stream."""
    context_length: int
    """Tokens per window."""
    seed: int
    """Seed of the run."""
    later: tuple[Phase, ...] = ()
    """Phases after the first, whose weights are `weights`. Each continues the epoch of a stream where it was."""
    packed: tuple[int, ...] | None = None
    """Windows of each stream where documents are packed: a window then begins at its number, not at a token."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Number of windows per epoch of each stream."""
        if self.packed is not None:
            return self.packed
        return tuple((t - 1) // self.context_length for t in self.tokens)

    def draw(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Returns the stream of each sample and the offset at which its window begins.

        Args:
            samples: Sample numbers, counted from the start of the run.
        """
        if self.kind == "random":
            return self._draw_random(samples)
        sources, draws = self._assign(samples)
        starts = np.empty_like(samples)
        for source in np.unique(sources):
            here = sources == source
            starts[here] = self._shuffled(int(source), draws[here])
        return sources, starts

    def epochs(self, samples: Int64s) -> Int64s:
        """Returns how many epochs of its stream precede each sample; 0 for `random`."""
        if self.kind == "random":
            return np.zeros_like(samples)
        sources, draws = self._assign(samples)
        return draws // np.asarray(self.windows, np.int64)[sources]

    def counts(self, samples: int) -> npt.NDArray[np.float64]:
        """Returns how many of the first `samples` samples each stream has; the expected number for `random`."""
        if self.weights is None:
            return np.array([samples], np.float64)
        total = np.zeros(len(self.tokens))
        for phase, end in zip(self._phases, [p.start for p in self._phases[1:]] + [samples], strict=True):
            total += self._phase_counts(phase, max(0, min(end, samples) - phase.start))
        return total

    @functools.cached_property
    def _phases(self) -> tuple[Phase, ...]:
        return (Phase(0, self.weights), *self.later) if self.weights is not None else ()

    @functools.cached_property
    def _draws_before(self) -> list[Int64s]:
        """Draws of each stream before each phase."""
        before = [np.zeros(len(self.tokens), np.int64)]
        for phase, following in zip(self._phases, self._phases[1:], strict=False):
            before.append(before[-1] + self._phase_counts(phase, following.start - phase.start).astype(np.int64))
        return before

    def _phase_counts(self, phase: Phase, samples: int) -> npt.NDArray[np.float64]:
        if self.kind == "random":
            return samples * np.asarray(phase.weights) / np.sum(phase.weights)
        return mixture_counts(samples, phase.weights, self._key(phase)).astype(np.float64)

    def _key(self, phase: Phase) -> int:
        return derive_key(self.seed, _PHASE, phase.start) if phase.start else derive_key(self.seed)

    def _assign(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Returns the stream of each sample and the number of earlier samples of that stream."""
        if self.weights is None:
            return np.zeros_like(samples), samples
        sources, draws = np.empty_like(samples), np.empty_like(samples)
        for number, here in self._by_phase(samples):
            phase = self._phases[number]
            sources[here], local = mixture(samples[here] - phase.start, phase.weights, self._key(phase))
            draws[here] = self._draws_before[number][sources[here]] + local
        return sources, draws

    def _by_phase(self, samples: Int64s) -> list[tuple[int, npt.NDArray[np.bool_]]]:
        """Returns the numbers of the phases that the samples are in, and which samples."""
        number_of = np.searchsorted([phase.start for phase in self._phases], samples, side="right") - 1
        return [(int(number), number_of == number) for number in np.unique(number_of)]

    def _shuffled(self, source: int, draws: Int64s) -> Int64s:
        windows = self.windows[source]
        spare = (self.tokens[source] - 1) % self.context_length
        epochs = draws // windows
        starts = np.empty_like(draws)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            window = permute(
                draws[here] - epoch * windows, windows, derive_key(self.seed, _PERMUTE, source, int(epoch))
            )
            if self.packed is not None:
                starts[here] = window
                continue
            shift = derive_key(self.seed, _SHIFT, source, int(epoch)) % (spare + 1)
            starts[here] = window * self.context_length + shift
        return starts

    def _draw_random(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        sources = np.zeros_like(samples)
        for number, here in self._by_phase(samples) if self.weights is not None else ():
            weights = np.asarray(self._phases[number].weights)
            bounds = np.cumsum(weights) / np.sum(weights)
            fractions = (self._words(samples[here], _SOURCE) >> np.uint64(11)) * 2.0**-53
            # Rounding may leave the last bound below 1.
            last = int(np.flatnonzero(weights)[-1])
            sources[here] = np.minimum(np.searchsorted(bounds, fractions, side="right"), last)
        # The bias of the remainder is below tokens / 2**64.
        places = np.asarray(self.tokens, np.uint64)[sources] - np.uint64(self.context_length)
        return sources, (self._words(samples, _START) % places).astype(np.int64)

    def _words(self, samples: Int64s, purpose: int) -> UInt64s:
        return mix64(mix64(samples.astype(np.uint64)) + np.uint64(derive_key(self.seed, purpose)))


def sample_numbers(index: int, start: int, stop: int, batch_size: int) -> Int64s:
    """Returns the sample numbers of rows `[start, stop)` of global batch `index`."""
    return index * batch_size + np.arange(start, stop, dtype=np.int64)
