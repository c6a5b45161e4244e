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
from tests.faults.episode import LAYOUTS, Episode, Fault, Layout, arguments
from tests.faults.strikes import STRIKES, Deck

TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3}
DISK_MB = 8

_APART = "FAULTS_IN_A_NAMESPACE"


@dataclass
class Outcome:
    """What the whole harness found; without `problems`, training survived everything."""

    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    episodes: int = 0
    bitwise_episodes: int = 0
    worst_difference: float = 0.0


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
