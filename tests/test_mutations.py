"""5,000 mutations of what others can give: no traceback, none over ten seconds or a gibibyte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutated import make
from tests.mutations import KINDS, ROOT

COUNTS = {
    "config": 1300, "site": 1000, "dataset": 700, "checkpoint": 800, "tokenizer": 500, "run": 300, "token_files": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mutated")
    make(folder)
    yield folder


def mutations(kind: str, seed: int, count: int, made: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MUTATED": str(made), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutations", kind, str(seed), str(count)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_counts_are_those_that_are_promised() -> None:
    assert COUNTS.keys() == KINDS.keys() and sum(COUNTS.values()) == 5000


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_every_mutation_ends_in_success_or_one_message(kind: str, made: Path) -> None:
    done = mutations(kind, 1, COUNTS[kind], made)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_traceback_would_be_noticed(made: Path, tmp_path: Path) -> None:
    probe = (
        "import sys; from tests import mutations as m\n"
        "first = []\nm.KINDS['config'] = lambda rng, folder: 1 / 0 if first else first.append(1)\n"
        "sys.exit(len(m.failures('config', 1, 3)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False)
    assert done.returncode == 3
