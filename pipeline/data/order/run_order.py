"""The order of a run, from its config and the manifest of its dataset; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.data_sections import DataConfig
from pipeline.data.manifest import DatasetManifest, Shard
from pipeline.data.order.draws import Order, Phase
from pipeline.data.order.packing import Packing, load_packing
from pipeline.errors import DataError


class RunOrder(NamedTuple):
    """The order of a run and what it is an order of."""

    order: Order
    streams: tuple[str, ...]
    """Name of each stream of the order."""
    packing: Packing | None
    """The packed windows; None where a window is a stretch of a stream."""


def run_order(
    path: Path, manifest: DatasetManifest, data: DataConfig, *, seed: int, context_length: int, batch_size: int
) -> RunOrder:
    """Returns the order of a run's training batches.

    Args:
        path: The dataset folder.
        manifest: The dataset's manifest.
        data: Mixing, phases and packing.
        seed: Seed of the run.
        context_length: Tokens per window.
        batch_size: Samples per global batch.

    Raises:
        DataError: A stream that is read holds less than a window, the dataset and the config name other sources, or the
            documents are not packed yet.
    """
    split = manifest.splits["train"]
    schedule, streams = data.schedule(), source_tokens(split.shards)
    packing = load_packing(path, manifest, context_length + 1) if data.packing == "best_fit" else None
    windows = packing.windows if packing else {}
    if not schedule:
        streams, windows = ({f"the {split.name} split": sum(found.values())} for found in (streams, windows))
        phases = []
    else:
        _refuse_other_sources(path, streams, data)
        phases = [
            Phase(p.from_step * batch_size, tuple(p.weights.get(name, 0.0) for name in streams)) for p in schedule
        ]
    for number, (name, tokens) in enumerate(streams.items()):
        if packing is None and (not phases or any(phase.weights[number] for phase in phases)):
            refuse_short(tokens, context_length, f"{path}: {name}")
    weights = phases[0].weights if phases else None
    packed = tuple(windows[name] for name in streams) if packing else None
    tokens_of = tuple(streams.values())
    order = Order(data.order, tokens_of, weights, context_length, seed, tuple(phases[1:]), packed)
    return RunOrder(order, tuple(streams), packing)


def source_tokens(shards: Sequence[Shard]) -> dict[str, int]:
    """Returns the tokens of each source, in the order of the shards."""
    found: dict[str, int] = {}
    for shard in shards:
        found[shard.source] = found.get(shard.source, 0) + shard.tokens
    return found


def unmeasurable(shards: Sequence[Shard]) -> str | None:
    """Returns what is wrong with the first source of a validation split that gives no loss; None if each gives one."""
    text_bytes: dict[str, int] = {}
    for shard in shards:
        text_bytes[shard.source] = text_bytes.get(shard.source, 0) + shard.text_bytes
    for name, tokens in source_tokens(shards).items():
        if tokens < 2 or not text_bytes[name]:
            found = f"tokens: {tokens:,}, bytes of text: {text_bytes[name]:,}"
            return f"source {name} cannot be validated ({found}): a loss needs two tokens, and bits per byte need text"
    return None


def refuse_unfit_validation(path: Path, shards: Sequence[Shard], context_length: int) -> None:
    """Raises DataError unless the split fills a window and each of its sources gives a loss."""
    refuse_short(sum(shard.tokens for shard in shards), context_length, f"{path}: the validation split")
    problem = unmeasurable(shards)
    if problem is not None:
        raise DataError(f"{path}: {problem}; give it more text for validation, or none")


def refuse_short(tokens: int, context_length: int, what: str) -> None:
    """Raises DataError unless so many tokens hold a window."""
    if tokens < context_length + 1:
        raise DataError(
            f"{what}: {tokens} tokens are too few for one window of context_length + 1 = {context_length + 1}; "
            "use a shorter model.context_length or more text"
        )


def _refuse_other_sources(path: Path, streams: dict[str, int], data: DataConfig) -> None:
    """Refuses weights of other sources than the dataset has; those of an adopted dataset need no `data.sources`."""
    known = [source.name for source in data.sources]
    for name in streams:
        if known and name not in known:
            raise DataError(
                f"{path}: holds the source {name!r}, but data.sources only names {', '.join(known)}; "
                "name every source that the dataset has"
            )
    given = "data.phases names" if data.phases else "data.mixing: weighted gives a weight to"
    for name in (name for phase in data.schedule() for name in phase.weights):
        if name not in streams:
            raise DataError(
                f"{path}: {given} the source {name!r}, which has no document to train on; "
                f"give weights to {', '.join(streams)} only, in data.phases"
            )
