"""Counts what an engine sends: elements and bytes of the collectives, by dtype."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

GATHERS = ("all_gather_into_tensor",)
REDUCES = ("all_reduce", "reduce_scatter_tensor")


@contextlib.contextmanager
def counted() -> Iterator[Counter[tuple[str, torch.dtype]]]:
    """Counts the elements of the collectives by name and dtype, the whole result of each; single numbers are left out.

    To be entered before the engine is made: DeepSpeed notes the function that gathers when it starts.
    """
    sent: Counter[tuple[str, torch.dtype]] = Counter()
    originals = {name: getattr(dist, name) for name in (*GATHERS, *REDUCES)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            largest = max(tensors, key=lambda t: t.numel())
            if largest.numel() > 1:
                sent[name, largest.dtype] += largest.numel()
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def by_dtype(sent: Counter[tuple[str, torch.dtype]], names: tuple[str, ...]) -> dict[torch.dtype, int]:
    """Returns the elements that these collectives sent, by dtype."""
    found: Counter[torch.dtype] = Counter()
    for (name, dtype), elements in sent.items():
        if name in names:
            found[dtype] += elements
    return dict(found)
