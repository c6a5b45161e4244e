"""Strikes real multi-process training at random moments until it has survived a number of faults; judges the curves.

    .venv/bin/python -m tests.faults.harness --faults 50 --seed 1 [--precision bf16] --out faults.json

A run of 100 steps is one episode: it is struck and restarted until it is finished, then its loss curve is compared with
the uninterrupted one. Every other episode keeps its layout (world size and ZeRO stage), and its curve must equal that
layout's bit for bit; the rest draw a layout for each start, and their curves must be within 1e-5 of one rank's, in bf16
within 4e-3.
Seconds that the ranks spend queueing for a processor do not count as a hang: the machine may be busy.
The harness moves itself into its own mount namespace (`unshare`), so that the small disks vanish with it.
Exit status: 0 if all faults were survived, 1 if not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from pipeline.files import write_text
from pipeline.run.provenance import collect_provenance
from tests import experiment, processes
from tests.faults.disk import small_disk
from tests.faults.strikes import DAMAGES, STRIKES, Deck, Strike, kill_all

TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3}
LONGEST_S = 30.0
DISK_MB = 8
AT_START = 0.25

_APART = "FAULTS_IN_A_NAMESPACE"

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


@dataclass
class Outcome:
    """What the whole harness found; without `problems`, training survived everything."""

    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    episodes: int = 0
    bitwise_episodes: int = 0
    worst_difference: float = 0.0


class Episode:
    """One run from its first step to its last, struck in between."""

    def __init__(
        self, folder: Path, disk: Path, name: str, deck: Deck, rng: random.Random, precision: str, fixed: Layout | None
    ) -> None:
        self._config = experiment.write_experiment(folder, disk, name)
        self._folder, self._name, self._deck, self._rng, self._fixed = folder, name, deck, rng, fixed
        self._precision = precision
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
        ranks = processes.start(arguments(self._config, layout, self._precision), layout[0], log)
        try:
            fault = None
            at_start = strike is kill_all and self._rng.random() < AT_START
            if at_start:
                time.sleep(self._rng.uniform(0, 1))
            else:
                first = self._wait_for_first_step(ranks, began, good, resumes)
                if before is not None and first is not None:
                    before.to_step_s, before.lost_steps = first, max(0, reached - good)
            if strike is not None and at_start:
                fault = self._land(ranks, strike, layout)
            elif strike is not None and not self.problems:
                fault = self._strike(ranks, strike, layout)
            elif not ranks.within(ranks.poll, 120):
                self._problem(ranks, "an undisturbed start did not end in 120 s")
            if fault is not None:
                self.faults.append(fault)
            elif not self.problems and set(ranks.codes.values()) != {0}:
                self._problem(ranks, f"an undisturbed start ended with {ranks.codes}")
        finally:
            ranks.end()
        return fault, 0 if set(ranks.codes.values()) == {0} else 1

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
        blow = strike(ranks, self.run, self._rng)
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


def judge(run: Path, reference: Path, tolerance: float) -> tuple[list[str], float]:
    """Returns what is wrong with a finished run's metrics, and their largest relative difference from the reference."""
    problems, worst = [], 0.0
    for name, read in (("training", experiment.curve), ("validation", experiment.validations)):
        found, expected = read(run), read(reference)
        if [step for step, _ in found] != [step for step, _ in expected]:
            problems.append(f"{run.name}: the {name} metrics hold the steps {[step for step, _ in found]}")
            continue
        for (step, ours), (_, theirs) in zip(found, expected, strict=True):
            difference = abs(ours - theirs) / abs(theirs)
            worst = max(worst, difference)
            if difference > tolerance:
                problems.append(f"{run.name}: {name} loss of step {step} is {ours!r} and not {theirs!r}")
                break
    return problems, worst


class References:
    """Uninterrupted runs, one for each layout, made on first use."""

    def __init__(self, folder: Path, precision: str) -> None:
        self._folder, self._precision = folder, precision

    def of(self, layout: Layout) -> Path:
        """Returns the run folder of this layout."""
        name = f"reference_{layout[0]}_{layout[1]}"
        run = self._folder / "references" / name
        if not run.exists():
            config = experiment.write_experiment(self._folder, run.parent, name)
            log = self._folder / "logs" / f"{name}.log"
            processes.run(arguments(config, layout, self._precision), layout[0], log, timeout_s=200)
        return run


def strike_until(count: int, seed: int, precision: str, folder: Path, report: Callable[[Outcome], None]) -> Outcome:
    """Runs episodes until `count` faults, or until training does not survive one; reports after each episode."""
    rng = random.Random(seed)
    outcome, deck, references = Outcome(), Deck(rng), References(folder, precision)
    config = experiment.write_experiment(folder, folder, "data")
    processes.run(["prepare", str(config)], 1, folder / "logs" / "prepare.log")
    while len(outcome.faults) < count and not outcome.problems:
        fixed = rng.choice(LAYOUTS) if outcome.episodes % 2 == 0 else None
        with small_disk(folder / "disk", DISK_MB) as disk:
            episode = Episode(folder, disk, f"episode_{outcome.episodes:03d}", deck, rng, precision, fixed)
            episode.go(count - len(outcome.faults))
            outcome.faults += episode.faults
            outcome.problems += episode.problems
            if not episode.problems:
                tolerance = 0.0 if fixed is not None else TOLERANCE[precision]
                problems, worst = judge(episode.run, references.of(fixed or (1, 0)), tolerance)
                outcome.problems += problems
                outcome.worst_difference = max(outcome.worst_difference, worst)
            if outcome.problems:
                shutil.copytree(episode.run, folder / "kept" / episode.run.name, dirs_exist_ok=True)
        outcome.episodes += 1
        outcome.bitwise_episodes += fixed is not None
        print(f"{len(outcome.faults)} faults in {outcome.episodes} episodes", file=sys.stderr, flush=True)
        report(outcome)
    return outcome


def summary(outcome: Outcome, seed: int, seconds: float) -> dict[str, Any]:
    """The figures of a report."""
    kinds: dict[str, Any] = {}
    for kind in sorted(STRIKES):
        of_kind = [f for f in outcome.faults if f.kind == kind]
        if of_kind:
            kinds[kind] = {
                "faults": len(of_kind),
                "to_end_s": _spread([f.to_end_s for f in of_kind]),
                "lost_steps": _spread([f.lost_steps for f in of_kind]),
                "to_first_step_s": _spread([f.to_step_s for f in of_kind if f.to_step_s]),
            }
    return {
        "seed": seed,
        "faults": len(outcome.faults),
        "not_survived": len(outcome.problems),
        "episodes": outcome.episodes,
        "episodes_judged_bitwise": outcome.bitwise_episodes,
        "worst_relative_difference": outcome.worst_difference,
        "seconds": round(seconds, 1),
        "kinds": kinds,
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)} if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--folder", type=Path, help="Where runs and logs are left to look at; a temporary one otherwise."
    )
    options = parser.parse_args()
    if os.environ.get(_APART) is None:
        os.environ[_APART] = "1"
        # Root may mount in a new namespace; other users become root of one.
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.execvp(
            "unshare", ["unshare", *as_root, "--mount", sys.executable, "-m", "tests.faults.harness", *sys.argv[1:]]
        )
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    today = datetime.now(UTC).date().isoformat()
    about = {"date": today, "commit": collect_provenance()["git"], "machine": machine(), "precision": options.precision}

    def report(outcome: Outcome) -> None:
        figures = {**about, **summary(outcome, options.seed, time.monotonic() - began)}
        each = [asdict(fault) for fault in outcome.faults]
        write_text(options.out, json.dumps({**figures, "each": each, "problems": outcome.problems}, indent=1) + "\n")

    outcome = strike_until(options.faults, options.seed, options.precision, folder, report)
    print(json.dumps(summary(outcome, options.seed, time.monotonic() - began), indent=2))
    for problem in outcome.problems:
        print(problem, file=sys.stderr)
    if not outcome.problems and options.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
