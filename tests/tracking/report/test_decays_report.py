"""The report of a stable run and its decays: one chart, and the loss after so many tokens with its power law."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.run.events import Finished, Started
from pipeline.run.folder import Run
from pipeline.run.related import Branch, SweepRun, add_branches, write_sweep
from pipeline.tracking.report.power_law import fit
from pipeline.tracking.report.report import write_report
from pipeline.tracking.report.sweep import write_sweep_report
from tests.tracking.report.test_report import without_script
from tests.tracking.support import begin, make_run

STEPS = (20, 40, 80, 160)


def trained(folder: Path, name: str, first: int, last: int, loss: float, size: int = 1) -> Run:
    """A run of these steps, of which the last has this validation loss."""
    run, config = make_run(folder, "none", f"name={name}")
    tracker = begin(run, config, first)
    tracker.event(Started(step=first))
    for step in range(first + 1, last + 1):
        speed = {"train/tokens_per_s": 1000.0, "train/flops_per_s": 6e6 * size}
        tracker.log(step, {"train/loss": loss + 1 / step, "train/tokens_seen": 1000 * step, **speed})
    tracker.log(last, {"val/loss": loss})
    tracker.event(Finished(step=last))
    tracker.close("FINISHED")
    return run


def family(folder: Path, name: str, size: int = 1) -> Run:
    """A stable run and its decays, whose losses are `2 / size + (100 / steps) ** 0.5`."""
    stable = trained(folder, name, 0, STEPS[-1], 9.0)
    for step in STEPS:
        loss = 2 / size + (100 / step) ** 0.5
        add_branches(stable, [Branch(step, trained(folder, f"{name}-decay-{step}", step - 10, step, loss, size))])
    return stable


def test_the_curves_of_a_stable_run_and_its_decays_are_one_chart_and_one_table(tmp_path: Path):
    own = without_script(write_report([family(tmp_path, "try")]).read_text())
    table = own.split("Decays by final validation loss")[1].split("</table>")[0]
    assert re.findall(r"<td>try-decay-(\d+)</td>", table) == ["160", "80", "40", "20"]
    chart = own.split("<h2>Decays</h2>")[1].split("</section>")[0]
    assert all(f'"name":"try{name}"' in chart for name in ("", *(f"-decay-{step}" for step in STEPS)))
    assert "try: 2.000 + (1e+05 / D)^0.50, 4 points" in own
    assert '"x":[20000,40000,80000,160000]' in re.sub(r"(\d)\.0\b", r"\1", own), "tokens"
    assert '"x":[120000000,240000000,480000000,960000000]' in re.sub(r"(\d)\.0\b", r"\1", own), "FLOPs"


def test_a_run_without_decays_has_no_such_section(tmp_path: Path):
    assert "Decays" not in without_script(write_report([trained(tmp_path, "try", 0, 20, 3.0)]).read_text())


def test_a_sweep_of_stable_runs_has_a_line_for_each_and_all_runs_in_its_table(tmp_path: Path):
    home = Run(tmp_path / "runs/try-sweep-0")
    home.path.mkdir(parents=True)
    runs = [SweepRun(family(tmp_path, f"try-{size}", size), {"model.num_layers": str(size)}) for size in (1, 2)]
    write_sweep(home, runs)
    own = without_script(write_sweep_report(home.path).read_text())
    rows = own.split("<tbody>")[1].split("</tbody>")[0].split("</tr>")
    assert len(rows) == 1 + 2 * (1 + len(STEPS))
    assert re.findall("<td>(.*?)</td>", rows[0])[:4] == ["try-2-decay-160", "2", "160", f"{1 + 0.625**0.5:.4f}"]
    assert "try-1: 2.000 +" in own and "try-2: 1.000 +" in own


def test_the_power_law_is_found_again():
    tokens = np.geomspace(1e6, 3e7, 6)
    law = fit(tokens, 1.7 + (4e5 / tokens) ** 0.34)
    assert law is not None
    assert law.limit == pytest.approx(1.7, abs=0.01) and law.exponent == pytest.approx(0.34, abs=0.005)
    assert law.at(1e6) == pytest.approx(1.7 + 0.4**0.34, abs=1e-4) and law.residual < 1e-4


@pytest.mark.parametrize(
    "losses", [[3.0, 2.5, 2.3], [2.0, 2.1, 2.2, 2.3], [3.0, 3.0, 3.0, 3.0], [2.53, 2.43, 2.27, 2.05]]
)
def test_no_law_is_drawn_through_too_few_points_or_a_loss_that_falls_in_another_way(losses: list[float]):
    assert fit([1e6 * 2**n for n in range(len(losses))], losses) is None
