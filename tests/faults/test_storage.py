"""Storage fails at a random call: nothing half-written is visible, and the next start ends as if nothing had been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import processes
from tests.faults.injected import CALLS, Plan, injected
from tests.faults.storage import Bench
from tests.faults.subjects import SUBJECTS

# `python -m tests.faults.storage` draws any number.
CASES = {"prepare": 3, "adopt": 3, "train": 3, "two_ranks": 2, "resume": 3, "read_tokens": 1, "submit": 4, "sync": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("storage"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_storage_that_fails_costs_nothing_but_the_start(bench: Bench, name: str) -> None:
    rng = random.Random(11)
    for _ in range(CASES[name]):
        _, problems = bench.strike(SUBJECTS[name], rng)
        assert not problems, "\n".join(problems)


def several_calls(folder: str) -> None:
    """Makes calls through Python, which is not what is struck, but the C library below it."""
    path = Path(folder) / "file"
    for number in range(3):
        try:
            path.with_name(str(number)).write_text("text")
        except OSError as error:
            print(f"{number}: {error.strerror}", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize(("stays", "failed"), [(False, ["1"]), (True, ["1", "2"])])
def test_the_layer_fails_the_call_that_was_named_and_counts_the_rest(
    tmp_path: Path, stays: bool, failed: list[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    plan = Plan(folder, "no inodes", "create", 2, stays)
    with injected(plan, tmp_path / "tally") as (environ, tally):
        ranks = processes.fork(several_calls, (str(folder),), 1, tmp_path / "log", environ)
        assert ranks.wait(60) and ranks.codes == {0: 0}, ranks.words()
    assert ranks.words().splitlines() == [f"{number}: No space left on device" for number in failed]
    assert (tally.struck(), tally.first()) == (len(failed), str(folder / "1"))
    assert (tally.calls()["create"], tally.calls()["write"]) == (3, 3 - len(failed))
    assert tally.calls().keys() == set(CALLS)
