"""Compares published step times with those of `pipeline plan`: `python -m benchmarks.published`.

It trains nothing. The published figures are in runs.csv, their sources in sources.csv. It fits the constants of the
time model again to the runs marked for it; its table says why a run is more than 10% off. It writes
benchmarks/results/published.json and docs/img/published.svg.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, about, machine, refuse_arguments
from benchmarks.published.calibrate import calibrate
from benchmarks.published.chart import draw
from benchmarks.published.runs import FOLDER, Run, published_runs, sources

CHART = FOLDER.parents[1] / "docs" / "img" / "published.svg"


def main() -> None:
    refuse_arguments(__doc__)
    runs, known = list(published_runs()), sources()
    console = Console()
    console.print(_by_source(runs))
    console.print(_table(runs, {key: source.name for key, source in known.items()}))
    constants = calibrate([run for run in runs if run.calibrates])
    for name, values in constants.items():
        console.print(f"{name}: {values}")
    figures = [_figures(run) for run in runs]
    head = {
        **about("published", machine()),
        "notes": "no training: published figures beside `pipeline plan`",
        "constants": constants,
        "sources": {key: f"{source.name}: {source.place}" for key, source in known.items()},
    }
    lines = ",\n".join("    " + json.dumps(figure) for figure in figures)
    file = RESULTS / "published.json"
    file.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "runs": [\n{lines}\n  ]\n}}\n')
    draw(runs, {key: source.name for key, source in known.items()}, CHART)
    console.print(f"written to {file} and {CHART}")


def _figures(run: Run) -> dict[str, Any]:
    fastest, slowest = run.bounds_s
    return {
        "source": run.source, "model": run.model, "device": run.device.name, "gpus": run.network.ranks,
        "published": run.published, "step_s": _round(run.step_s), "fastest_s": _round(fastest),
        "slowest_s": _round(slowest), "expected_s": _round(run.expected_s) if run.expected_s else None,
        "speed": _round(run.speed) if run.speed else None, "calibrates": run.calibrates, "why": run.why,
    }  # fmt: skip


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _by_source(runs: list[Run]) -> Table:
    """Returns a line for each project, of its calibrating and of its held-back runs."""
    table = Table("source", "calibrates", "runs", "within the bounds", "within 10%", "speed / expected", box=None)
    for source, calibrates in dict.fromkeys((run.source, run.calibrates) for run in runs):
        found = [run for run in runs if (run.source, run.calibrates) == (source, calibrates)]
        speeds = [run.speed for run in found if run.speed is not None]
        near = sum(run.near for run in found)
        between = f"{min(speeds):.2f}-{max(speeds):.2f}" if speeds else ""
        inside = sum(run.inside for run in found)
        table.add_row(source, "yes" if calibrates else "", f"{len(found)}", f"{inside}", f"{near}", between)
    return table


def _table(runs: list[Run], names: dict[str, str]) -> Table:
    table = Table("", "model", "GPUs", "published", "step s", "bounds", "expected", "speed", "why", box=None)
    for run in runs:
        fastest, slowest = run.bounds_s
        expected = (f"{run.expected_s:.3g}", f"{run.speed:.2f}") if run.expected_s and run.speed else ("", "")
        gpus = f"{run.network.ranks} {run.device.name}"
        bounds = f"{fastest:.3g}-{slowest:.3g}"
        table.add_row(
            names[run.source], run.model, gpus, run.published, f"{run.step_s:.3g}", bounds, *expected, run.why
        )
    return table


if __name__ == "__main__":
    main()
