"""`--decay-at`: a stable run of constant learning rate, and a run that decays from each of some of its checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pins import pin, unpin
from pipeline.config.load import dump_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import UsageError, listing
from pipeline.run.folder import Run, run_for, step_name
from pipeline.run.related import Branch

# Longer than any stable run: the branch renews its pin when it starts, and removes it after its first save.
_PIN_DAYS = 365.0


@dataclass(frozen=True)
class Decay:
    """A run that decays the learning rate from a checkpoint of a stable run."""

    step: int
    """The step of the checkpoint."""
    stable: Run
    config: Config

    @property
    def run(self) -> Run:
        """The run that decays."""
        return run_for(self.config)

    @property
    def branch(self) -> Branch:
        """What the stable run records of it."""
        return Branch(self.step, self.run)

    @property
    def is_due(self) -> bool:
        """Whether it can begin now: its checkpoint is published, or it has one of its own."""
        return self.stable.checkpoints / step_name(self.step) in published(self.stable.checkpoints) or self.has_begun

    @property
    def has_begun(self) -> bool:
        """Whether it has a checkpoint of its own, and needs that of the stable run no more."""
        return bool(published(self.run.checkpoints))

    def is_lost(self) -> bool:
        """Whether the stable run has trained past the step without keeping the checkpoint."""
        newest = max((step_of(path) or 0 for path in published(self.stable.checkpoints)), default=0)
        return newest >= self.step and not self.is_due


def split(config: Config, steps: Sequence[int]) -> tuple[Config, list[Decay]]:
    """Returns the stable run of a config with `schedule: wsd`, and its decays.

    The decays take `decay_iters` and `decay` from the config; the stable run trains to its `train.max_iters`.

    Raises:
        UsageError: Everything that does not fit.
    """
    _refuse(config, steps)
    stable = _changed(config, "optimizer.schedule=constant", "optimizer.decay_iters=null")
    run, decays = run_for(config), []
    for step in sorted(steps):
        last = step + (config.optimizer.decay_iters or 0)
        name = f"{config.name}-decay-{step}"
        origin = [f"init.from={json.dumps(str(run.path))}", f"init.step={step}", "init.what=all"]
        branch = _changed(config, f"name={name}", f"train.max_iters={last}", *origin)
        decays.append(Decay(step, run, branch))
    lost = [decay.step for decay in decays if decay.is_lost()]
    if lost:
        kept = sorted(step_of(path) or 0 for path in published(run.checkpoints))
        raise UsageError(
            f"--decay-at {', '.join(map(str, lost))}: {run.path} has trained past it and keeps no checkpoint of it; "
            f"there are: {', '.join(map(str, kept))}"
        )
    return stable, decays


def _changed(config: Config, *overrides: str) -> Config:
    return parse_config(dump_config(config), overrides, source=f"the config of {config.name}")


def _refuse(config: Config, steps: Sequence[int]) -> None:
    optimizer, train = config.optimizer, config.train
    problems = []
    if optimizer.schedule != "wsd":
        problems.append(
            f"optimizer.schedule: given {optimizer.schedule}, needed: wsd, whose decay_iters and decay are those of "
            "every decay"
        )
    if config.checkpoint.if_busy == "skip":
        problems.append("checkpoint.if_busy: given skip, which may leave out a checkpoint that a decay needs; set wait")
    every = train.checkpoint_interval
    for step in sorted(set(steps)):
        if steps.count(step) > 1:
            problems.append(f"{step}: is there twice")
        if step > train.max_iters:
            problems.append(f"{step}: is beyond train.max_iters = {train.max_iters}, where the stable run ends")
        elif step % every and step != train.max_iters:
            problems.append(
                f"{step}: no checkpoint is saved there; allowed: multiples of checkpoint_interval = {every}"
            )
        if step < optimizer.warmup_iters:
            problems.append(f"{step}: is within the warm-up, which ends at warmup_iters = {optimizer.warmup_iters}")
    if problems:
        raise UsageError(listing(f"--decay-at: does not fit the config of {config.name}:", problems))


@contextlib.contextmanager
def unpinned_on_failure(decays: Sequence[Decay]) -> Iterator[None]:
    """Removes the pins of decays whose folders a failed submission has removed again."""
    try:
        yield
    except BaseException:
        for decay in decays:
            if not decay.run.path.exists():
                unpin(decay.stable.checkpoints, decay.run.path)
        raise


def protect(decay: Decay) -> None:
    """Keeps the checkpoint, which may not be there yet, from being deleted until the branch has saved its own."""
    if not decay.has_begun:
        pin(decay.stable.checkpoints / step_name(decay.step), decay.run.path, _PIN_DAYS)
