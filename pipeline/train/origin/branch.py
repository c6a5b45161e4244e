"""A run that starts from another run's checkpoint, which it protects until it has a checkpoint of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.checkpoint.layout import OWNER_FILE, Manifest, step_of
from pipeline.checkpoint.pins import pin, unpin
from pipeline.checkpoint.read import CheckpointReader, verify
from pipeline.config.sections import Config
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import CheckpointError, UsageError, listing
from pipeline.huggingface.architectures import other_tensors, shapes
from pipeline.run.folder import run_for
from pipeline.run.records import Origin
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import INIT_VERSION
from pipeline.train.origin.model_folder import CHECK_TIMEOUT
from pipeline.train.origin.parent import Parent, choose
from pipeline.train.ranks import group

T = TypeVar("T")


@dataclass(frozen=True)
class Branch:
    """A checkpoint that a run starts from, checked and protected."""

    parent: Parent
    record: Origin
    """For the checkpoints and the provenance."""
    same_order: bool
    """Whether the order of the data is the parent's."""
    warning: str | None
    """Why the checkpoint could not be protected; None if it is, or need not be."""

    def fill(self, engine: Engine) -> dict[str, Any]:
        """Takes weights, or moments too; returns the state to begin with."""
        reader, state = CheckpointReader(self.parent.folder), self.parent.manifest.state
        if self.record["what"] == "weights":
            engine.take(reader)
            reader.close()
            return {"initialization": INIT_VERSION, "init": self.record}
        engine.load(reader)
        reader.close()
        # The batches that the parent's guard skips are numbers in its order.
        kept = {"tokens_seen", "initialization", "rng", *(["guard", "source_tokens"] if self.same_order else [])}
        found = {"step": self.parent.manifest.step, "init": self.record, **{k: state[k] for k in kept & state.keys()}}
        if not self.same_order:
            tokens = state.get("source_tokens", {}).get("tokens", {})
            found["source_tokens"] = {"batches": self.parent.manifest.step, "tokens": tokens}
        return found

    def lines(self) -> list[str]:
        """Returns what the user is told at the start."""
        step, what = self.parent.manifest.step, self.record["what"]
        told = [f"branching from {self.parent.folder} (digest {self.parent.digest[:12]}), taking {what} of step {step}"]
        if self.record["differences"]:
            told.append(listing("what differs from the parent:", self.record["differences"]))
        if what == "all" and not self.same_order:
            told.append(f"the order of the data is this config's own: step {step + 1} trains on its batch {step}")
        return told if self.warning is None else [*told, self.warning]


@contextlib.contextmanager
def found_branch(config: Config, dataset: DatasetManifest, world: World) -> Iterator[Branch]:
    """Yields the checkpoint that `init` names: checked by all ranks together, and protected from its run's retention.

    Raises:
        UsageError: It is missing, damaged or does not fit the config; nothing of the search is left.
    """
    run = run_for(config)
    before = run.origin()
    parent = Parent.open(Path(_by_first(lambda: str(choose(config.init, before)), world)))
    parent.refuse(config, dataset, before)
    _refuse_other_parameters(parent, config)
    try:
        warning = _by_first(lambda: _protect(parent, run.path), world)
        _verify(parent, world)
        record, same_order = parent.record(config, dataset), parent.has_order_of(config, dataset)
        yield Branch(parent, record, same_order, warning)
    except BaseException:
        if world.is_first and not run.config_file.exists():
            unpin(parent.folder.parent, run.path)
        raise


def _by_first(work: Callable[[], T], world: World) -> T:
    """Returns on all ranks what rank 0 computes, a value of JSON; all ranks raise its UsageError."""
    found, problem = None, None
    if world.is_first:
        try:
            found = work()
        except UsageError as error:
            problem = str(error)
    found, problem = group.broadcast((found, problem), world)
    if problem is not None:
        raise UsageError(problem)
    return found  # type: ignore[return-value]


def _refuse_other_parameters(parent: Parent, config: Config) -> None:
    found = {name: entry["shape"] for name, entry in parent.manifest.parameters.items()}
    problems = other_tensors(dict(shapes(config.model)), found, "the config")
    if problems:
        raise UsageError(listing(f"{parent.folder}: holds other parameters than its config says:", problems))


def _protect(parent: Parent, holder: Path) -> str | None:
    """Pins the checkpoint; returns what to say where that is impossible and it may vanish.

    Raises:
        UsageError: It has just been deleted.
    """
    folder = parent.folder
    if step_of(folder) is None or not (folder.parent / OWNER_FILE).exists():
        return None  # no run deletes here
    try:
        pin(folder, holder)
    except OSError as error:
        config = parent.manifest.state["config"].get("checkpoint")
        every = config.get("keep_every") if isinstance(config, dict) else None
        if isinstance(every, int) and every > 0 and parent.manifest.step % every == 0:
            return None  # kept forever
        return (
            f"{folder.parent}: cannot be written ({error.strerror or error}), so that nothing protects the checkpoint: "
            "if its run trains on and deletes it before this one has saved, a killed start cannot be repeated; to be "
            "safe, start from a copy"
        )
    try:
        there = Manifest.load_named(folder)[1] == parent.digest
    except CheckpointError:
        there = False
    if not there:
        unpin(folder.parent, holder)
        raise UsageError(f"{folder}: its run has just deleted it; start again, or name another checkpoint")
    return None


def _verify(parent: Parent, world: World) -> None:
    problem = None
    try:
        verify(parent.folder, mine=lambda index: index % world.size == world.rank)
    except CheckpointError as error:
        problem = str(error)
    for other in group.gather(problem, world, CHECK_TIMEOUT):
        if other is not None:
            raise UsageError(f"init.from: {other}; name another checkpoint")
