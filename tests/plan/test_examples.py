"""What an example says of its size and speed is what `plan` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.devices import GIB
from pipeline.text_format import figure
from tests.cli.test_main import ROOT
from tests.data.helpers import command

EXAMPLES = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file.stem != "demo")
COLUMNS = ("nodes", "GPUs", "GiB per GPU", "tokens/s", "days", "GPU-hours")


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """The comment of an example: the figures of a plan by which one chooses the number of nodes."""
    cells = [COLUMNS]
    for row in rows:
        hours = [24 * days * row["ranks"] for days in row["days"]]
        between = ["-".join(map(figure, pair)) for pair in (row["tokens_per_s"], row["days"], hours)]
        cells.append((str(row["nodes"]), str(row["ranks"]), figure(row["memory"]["peak"] / GIB), *between))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["#     " + "  ".join(map(str.rjust, line, widths)) for line in cells]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_figures_of_an_example_are_those_of_the_plan(file: Path, capsys: pytest.CaptureFixture[str]):
    told = re.search(r"#     pipeline (plan \S+ --nodes \S+ --device h100)\n((?:#     .*\n)+)", file.read_text())
    assert told is not None and f"configs/{file.name}" in told[1]
    assert command(*told[1].split(), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["fits"] and row["batch_size"] == 512 for row in rows)
    assert told[2].splitlines() == lines_of(rows)
