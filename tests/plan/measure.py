"""Measures what an engine holds and sends at each ZeRO stage. Each runs in fresh processes: engines leave tensors.

Live tensors are counted by walking Python's objects, peaks by the profiler's record of every allocation in between.
The record alone drifts, upwards: gloo frees its buffers in a thread that is not recorded, so the least of several
equal steps counts.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pipeline.config.load import load_config
from pipeline.model import on_cpu
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine

STEPS = 4  # equal ones, after a first that creates the moments
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def peak_of(action: Callable[[], Any]) -> tuple[int, Any]:
    """The peak of bytes that an action allocates on top of those before, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = action()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage counted once; those frozen are left out."""
    gc.collect()
    storages: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.is_leaf and tensor.grad is not None:
            add(tensor.grad)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for candidate in gc.get_objects():
            if isinstance(candidate, torch.Tensor) and candidate.layout == torch.strided:
                add(candidate)
    return sum(storages.values())


def measure(world: World, config_file: str, overrides: list[str]) -> dict[str, int]:
    """Peak bytes of a step on this rank, and the bytes of each kind of collective in it."""
    config, device = load_config(config_file, overrides, world_size=world.size), torch.device("cpu")
    on_cpu.ROUND_PRODUCTS = True  # as the plan counts it, on any processor
    gc.collect()
    gc.freeze()  # what exists already is not walked each time
    model, train = config.model, config.train
    engine = Engine(config, world, device)
    engine.draw(0)
    torch.manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (train.micro_batch_size, model.context_length))

    def micro_batch() -> torch.Tensor:
        loss, entropy = engine.loss(ids, ids)
        engine.backward(loss)
        return entropy

    steps = []
    for _ in range(1 + STEPS):
        peaks, losses = [], []
        with _counted() as sent:
            engine.set_learning_rate(1e-3)
            engine.zero_grad()
            for _ in range(train.batch_size // (train.micro_batch_size * world.size)):
                held = live_bytes()
                peak, loss = peak_of(micro_batch)
                losses.append(loss)
                peaks.append(held + peak)
            engine.reduce_and_clip(1.0, losses, stop=False)
            held = live_bytes()
            peaks.append(held + peak_of(engine.step)[0])
        steps.append(max(peaks))
    return {"peak": min(steps[1:]), **sent}


@contextlib.contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Counts the bytes of the collectives, the whole result of each."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[name] += max(a.nbytes for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
