"""Lets the storage of a command fail at a random call, starts it again without the failure, and judges both.

    .venv/bin/python -m tests.faults.storage --cases 150 --seed 1 [--of train] [--folder FOLDER]

After a failed start nothing half-written is visible, and it has ended with a documented status and one message. The
next start ends as if nothing had happened: with the same bytes of a dataset, the same losses and weights of a run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_FAILED, EXIT_OK
from tests.faults.injected import Plan, drawn, injected
from tests.faults.subjects import SUBJECTS, Subject
from tests.processes import Ranks

LONGEST_S = 90.0


class Bench:
    """Strikes subjects whose undisturbed results it has made and counted once.

    Args:
        folder: Holds everything.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[Any, dict[str, int]]] = {}
        self._cases = 0

    def strike(self, subject: Subject, rng: random.Random) -> tuple[Plan, list[str]]:
        """Returns what failed and what was wrong afterwards."""
        if subject.name not in self._known:
            self._known[subject.name] = self._undisturbed(subject)
        expected, calls = self._known[subject.name]
        self._cases += 1
        case = self._folder / f"{subject.name}_{self._cases:03d}"
        subject.begin(case)
        plan = drawn(rng, subject.under(case), calls)
        with injected(plan, self._folder / "tally") as (environ, tally):
            ranks = self._start(subject, case, environ)
        problems = [*_ending(ranks), *subject.half_written(case)]
        again = self._start(subject, case, {})
        if set(again.codes.values()) != {EXIT_OK}:
            problems.append(f"the next start ended with {again.codes}\n{again.words()}")
        elif subject.result(case) != expected:
            problems.append("the next start has another result")
        if not problems:
            shutil.rmtree(case)
        first = f"{case.name}: {plan} ({tally.first()}), status {ranks.codes}"
        return plan, [f"{first}: {problem}" for problem in problems]

    def _undisturbed(self, subject: Subject) -> tuple[Any, dict[str, int]]:
        case = self._folder / subject.name
        subject.begin(case)
        with injected(subject.under(case), self._folder / "tally") as (environ, tally):
            ranks = self._start(subject, case, environ)
        assert set(ranks.codes.values()) == {EXIT_OK}, ranks.words()
        return subject.result(case), tally.calls()

    def _start(self, subject: Subject, case: Path, environ: dict[str, str]) -> Ranks:
        number = len(list(case.parent.glob(f"{case.name}.*.log")))
        ranks = subject.start(case, case.with_name(f"{case.name}.{number}.log"), environ)
        ranks.launched(lambda: False, LONGEST_S)
        ranks.end()
        return ranks


def _ending(ranks: Ranks) -> Iterator[str]:
    """Yields what is wrong with how a struck start ended."""
    words, codes = ranks.words(), set(ranks.codes.values())
    if EXIT_FAILED in codes:
        codes -= {-signal.SIGKILL}  # by the launcher, before the ranks had met
    if not codes <= {EXIT_OK, EXIT_FAILED}:
        yield f"it ended with {ranks.codes}\n{words}"
    if "Traceback" in words:
        yield f"a traceback\n{words}"
    if EXIT_OK not in codes and words.count("pipeline: error: ") != sum(code > 0 for code in ranks.codes.values()):
        yield f"{words.count('pipeline: error: ')} messages of {len(ranks.codes)} ranks\n{words}"


def run(names: Sequence[str], count: int, seed: int, folder: Path, report: Callable[[str], None]) -> list[str]:
    """Strikes the subjects of these names in turn; returns what was wrong."""
    rng, bench, found = random.Random(seed), Bench(folder), []
    for number in range(count):
        subject = SUBJECTS[names[number % len(names)]]
        began = time.monotonic()
        plan, problems = bench.strike(subject, rng)
        found += problems
        outcome = "\n".join(problems) if problems else "survived"
        report(f"{number + 1}. {subject.name}: {plan}: {outcome} ({time.monotonic() - began:.1f} s)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--of", choices=SUBJECTS, action="append")
    parser.add_argument("--folder", type=Path, help="Where everything is left to look at; a temporary one otherwise.")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="storage-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = run(options.of or list(SUBJECTS), options.cases, options.seed, folder, lambda line: print(line, flush=True))
    print(f"{options.cases} cases, {len(found)} problems")
    if not found and options.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
