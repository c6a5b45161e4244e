"""One run of the fault harness: started, struck and restarted until it is finished."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EXIT_FAILED
from tests import experiment, processes
from tests.faults.injected import Tally, injected
from tests.faults.strikes import DAMAGES, FROM_THE_START, Deck, Moment, Strike, kill_agent, kill_all, name_of, plan_of

LONGEST_S = 30.0
AT_START = 0.25

Layout = tuple[int, int]
LAYOUTS: tuple[Layout, ...] = tuple((world, stage) for world in (1, 2, 4) for stage in (0, 1, 2, 3))


@dataclass
class Fault:
    """One fault and its consequences."""

    kind: str
    layout: Layout
    """World size and ZeRO stage of the ranks that it struck."""
    at_step: int
    """Last step in the metrics at that moment."""
    to_end_s: float
    """From the fault until the last rank had ended."""
    lost_steps: int = 0
    """Steps in the metrics that the next start repeated."""
    to_step_s: float = 0.0
    """From the fork of the next start to its first step."""


class Episode:
    """One run from its first step to its last, struck in between."""

    def __init__(
        self, folder: Path, disk: Path, name: str, deck: Deck, rng: random.Random, precision: str, fixed: Layout | None
    ) -> None:
        self._config = experiment.write_experiment(folder, disk, name)
        self._folder, self._name, self._deck, self._rng, self._fixed = folder, name, deck, rng, fixed
        self._precision = precision
        self._others: list[processes.Ranks] = []
        self.run = disk / name
        self.faults: list[Fault] = []
        self.problems: list[str] = []

    def go(self, most: int) -> None:
        """Starts and strikes the run until it is finished, with at most this many faults."""
        before: Fault | None = None
        for attempt in range(1000):
            layout = self._fixed or self._rng.choice(LAYOUTS)
            strike = self._deck.draw() if len(self.faults) < most else None
            before, code = self._start(attempt, layout, strike, before)
            if strike is not None and before is None:
                self._deck.put_back(strike)
            elif strike is not None and before is not None and before.kind != name_of(strike):
                self._deck.put_under(strike)
            if code == 0 or self.problems:
                return

    def _start(
        self, attempt: int, layout: Layout, strike: Strike | None, before: Fault | None
    ) -> tuple[Fault | None, int]:
        good = newest_good(self.run)
        reached = experiment.last_step(self.run)
        resumes = len(experiment.events(self.run, "resumed"))
        self._check_promises(before, good, reached)
        began = time.monotonic()
        log = self._folder / "logs" / f"{self._name}_{attempt:03d}.log"
        ranks, tally = self._launch(layout, strike, log)
        try:
            if tally is not None and strike is not None:
                fault = self._in_trouble(ranks, strike, layout, tally)
            elif strike is kill_all and self._rng.random() < AT_START:
                time.sleep(self._rng.uniform(0, 1))
                fault = self._land(ranks, strike, layout)
            else:
                first = self._wait_for_first_step(ranks, began, good, resumes)
                if before is not None and first is not None:
                    before.to_step_s, before.lost_steps = first, max(0, reached - good)
                fault = self._strike(ranks, strike, layout) if strike is not None and not self.problems else None
                if strike is None and not ranks.within(ranks.poll, 120):
                    self._problem(ranks, "an undisturbed start did not end in 120 s")
            if fault is not None:
                self.faults.append(fault)
            elif not self.problems and set(ranks.codes.values()) != {0}:
                self._problem(ranks, f"an undisturbed start ended with {ranks.codes}")
        finally:
            ranks.end()
            for other in self._others:
                other.end()
            self._others.clear()
        return fault, 0 if set(ranks.codes.values()) == {0} else 1

    def _launch(self, layout: Layout, strike: Strike | None, log: Path) -> tuple[processes.Ranks, Tally | None]:
        """Starts the ranks; returns with them what has failed, for a strike that begins with the start."""
        command = arguments(self._config, layout, self._precision)
        if strike is kill_agent:
            return processes.start_with_agent(command, layout[0], log), None
        if strike not in FROM_THE_START:
            return processes.start(command, layout[0], log), None
        plan = plan_of(strike, self.run, self._folder / "tokens", self._rng)
        with injected(plan, log.with_suffix(".tally")) as (environ, tally):
            return processes.start(command, layout[0], log, environ), tally

    def _in_trouble(self, ranks: processes.Ranks, strike: Strike, layout: Layout, tally: Tally) -> Fault | None:
        """Waits until the ranks have ended or come far enough, then strikes; None if the run has finished."""
        began, at_step = time.monotonic(), experiment.last_step(self.run)
        target = at_step + self._rng.randint(1, 25)
        if not ranks.launched(lambda: experiment.last_step(self.run) >= target, 2 * LONGEST_S):
            self._problem(ranks, f"neither an end nor step {target} after {tally.first()} failed")
        if "Traceback" in ranks.words():
            self._problem(ranks, f"a traceback after {tally.first()} failed")
        if ranks.poll() and EXIT_FAILED in ranks.codes.values() and tally.struck():
            return Fault(name_of(strike), layout, at_step, time.monotonic() - began)
        fault = self._land(ranks, strike, layout)
        if fault is not None and not tally.struck():
            fault.kind = name_of(kill_all)
        return fault

    def _check_promises(self, before: Fault | None, good: int, reached: int) -> None:
        """Checks that a checkpoint reported as durable is there, and that a stop on request lost no step."""
        # A start that was killed before its first step has not quarantined what an earlier fault damaged.
        unseen = itertools.takewhile(lambda fault: not fault.to_step_s, reversed(self.faults))
        if before is None or any(fault.kind in DAMAGES for fault in unseen):
            return
        journal = experiment.lines(self.run / "events.jsonl")
        begun = max((i for i, e in enumerate(journal) if e["event"] in ("started", "resumed")), default=0)
        durable = max((e["step"] for e in journal[begun:] if e["event"] == "checkpointed"), default=0)
        if good < durable:
            self.problems.append(f"{self._name}: step {durable} was reported durable, and only step {good} is whole")
        if before.kind == "SIGUSR2" and good != reached:
            self.problems.append(f"{self._name}: stopped on request at step {reached}, but only step {good} is whole")

    def _wait_for_first_step(self, ranks: processes.Ranks, began: float, good: int, resumes: int) -> float | None:
        """Returns the seconds to the first step; None if the run had nothing left to do."""

        def stepping() -> bool:
            steps = experiment.last_step(self.run)
            started = len(experiment.events(self.run, "resumed")) > resumes or good == 0
            return started and steps > good

        if not ranks.within(lambda: stepping() or ranks.poll(), LONGEST_S):
            self._problem(ranks, f"no step within {LONGEST_S:g} s of a start")
            return None
        resumed = experiment.events(self.run, "resumed")[resumes:]
        if good and resumed and resumed[-1]["step"] != good:
            self._problem(ranks, f"resumed from step {resumed[-1]['step']}, though step {good} was whole")
        return time.monotonic() - began if stepping() else None

    def _strike(self, ranks: processes.Ranks, strike: Strike, layout: Layout) -> Fault | None:
        """Waits for the moment, strikes and waits for the end; None if the run ended first."""
        target = experiment.last_step(self.run) + self._rng.randint(1, 25)
        delay = self._rng.uniform(0, 0.2)
        if not ranks.within(lambda: experiment.last_step(self.run) >= target or ranks.poll(), 60):
            self._problem(ranks, f"no step for a long time while waiting for step {target}")
            return None
        time.sleep(delay)
        return self._land(ranks, strike, layout)

    def _land(self, ranks: processes.Ranks, strike: Strike, layout: Layout) -> Fault | None:
        if ranks.poll():
            return None
        at_step = experiment.last_step(self.run)
        began = time.monotonic()
        blow = strike(Moment(ranks, self.run, self._rng, lambda: self._start_another(layout, ranks.log)))
        if not ranks.within(ranks.poll, LONGEST_S):
            self._problem(ranks, f"ranks still ran {LONGEST_S:g} s after {blow.kind}")
        if set(ranks.codes.values()) == {0}:
            return None  # the run finished before the blow fell
        finished = newest_good(self.run) == experiment.STEPS
        if blow.problem or not blow.allowed(ranks.codes, finished):
            self._problem(ranks, blow.problem or f"after {blow.kind} the ranks ended with {ranks.codes}")
        ended = max(ranks.ended_at.values(), default=time.monotonic())
        blow.afterwards()
        return Fault(blow.kind, layout, at_step, ended - began)

    def _start_another(self, layout: Layout, log: Path) -> None:
        command = [*arguments(self._config, layout, self._precision), "--take-over"]
        self._others.append(processes.start(command, layout[0], log.with_suffix(".other.log")))

    def _problem(self, ranks: processes.Ranks, what: str) -> None:
        self.problems.append(f"{self._name}: {what}\n{ranks.words()}")


def arguments(config: Path, layout: Layout, precision: str) -> list[str]:
    """Returns the arguments of the command that trains at this layout."""
    world, stage = layout
    settings = {"train.zero_stage": stage, **experiment.in_precision(precision, world, stage)}
    return ["train", str(config), *(f"{key}={value}" for key, value in settings.items())]


def newest_good(run: Path) -> int:
    """Returns the step of the newest whole checkpoint; 0 if there is none."""
    from pipeline.checkpoint.layout import published
    from pipeline.checkpoint.read import verify
    from pipeline.errors import CheckpointError

    for folder in published(run / "checkpoints"):
        try:
            return verify(folder).step
        except CheckpointError:
            continue
    return 0
