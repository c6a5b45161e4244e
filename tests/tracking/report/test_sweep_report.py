"""The report of a sweep: one table, one plot, whatever became of single runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.files import write_json
from pipeline.run.events import Failed, GaveUp, Started, append
from pipeline.run.folder import Run
from pipeline.run.related import SweepRun, found_runs, runs_here, write_sweep
from pipeline.tracking.report.sweep import write_sweep_report
from tests.tracking.report.test_report import without_script
from tests.tracking.support import begin, log_steps, make_run

RATES = ("1e-4", "3e-3", "1e-1")


def trained(folder: Path, rate: str, steps: int) -> Run:
    """A run of so many steps; its validation loss is 6 / steps."""
    run, config = make_run(folder, "none", f"name=try-{rate}", f"optimizer.learning_rate={rate}")
    tracker = begin(run, config)
    tracker.event(Started(step=0))
    log_steps(tracker, 1, steps)
    tracker.close("FINISHED")
    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of which one run failed before its first step, and one has no folder any more."""
    runs = {rate: trained(tmp_path, rate, steps) for rate, steps in zip(RATES, (10, 30, 20), strict=True)}
    failed, _ = make_run(tmp_path, "none", "name=try-broken", "optimizer.learning_rate=5e-2")
    append(failed.events_file, GaveUp(job="7", stage="train", reason="failed 3 times without progress: no <memory>"))
    gone = Run(failed.path.with_name("try-gone"))
    runs |= {"5e-2": failed, "6e-2": gone}
    home = Run(tmp_path / "runs/try-sweep-0")
    home.path.mkdir()
    write_sweep(home, [SweepRun(run, {"optimizer.learning_rate": rate}) for rate, run in runs.items()])
    return home.path


def rows(page: Path) -> list[list[str]]:
    """The cells of the first table."""
    body = without_script(page.read_text()).split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall("<td>(.*?)</td>", row) for row in body.split("</tr>") if row]


def test_runs_are_sorted_by_their_final_validation_loss_and_a_failed_one_hides_none(sweep: Path):
    page = write_sweep_report(sweep)
    assert page == sweep / "report.html"
    found = rows(page)
    assert [(row[0], row[1], row[2], row[3]) for row in found[:3]] == [
        ("try-3e-3", "3e-3", "0.2000", "30"),
        ("try-1e-1", "1e-1", "0.3000", "20"),
        ("try-1e-4", "1e-4", "0.6000", "10"),
    ]
    assert [row[-1] for row in found[3:]] == [
        "failed: failed 3 times without progress: no &lt;memory&gt;", "its folder is gone",
    ]  # fmt: skip
    assert '"type":"log"' in without_script(page.read_text()), "rates from 1e-4 to 1e-1"


def test_a_damaged_run_is_a_line_of_the_table(sweep: Path):
    shutil.rmtree(sweep.parent / "try-1e-4")
    (sweep.parent / "try-1e-4/metrics.jsonl").mkdir(parents=True)
    states = {row[0]: row[-1] for row in rows(write_sweep_report(sweep))}
    assert states["try-1e-4"].startswith("damaged: ") and len(states) == 5


def test_a_sweep_without_metrics_is_refused(tmp_path: Path):
    run, _ = make_run(tmp_path, "none")
    append(run.events_file, Failed(error="no memory"))
    home = Run(tmp_path / "runs/try-sweep-0")
    home.path.mkdir()
    write_sweep(home, [SweepRun(run, {"train.seed": "1"})])
    with pytest.raises(UsageError, match="no run of this sweep has metrics"):
        write_sweep_report(home.path)


def test_a_sweeps_folder_stands_for_the_runs_that_are_there(sweep: Path):
    runs, problems = found_runs([str(sweep), str(sweep.parent / "try-1e-4"), "nothing"])
    assert [run.name for run in runs] == ["try-1e-4", "try-3e-3", "try-1e-1", "try-broken"]
    assert ["is not a run folder" in str(problem) for problem in problems] == [True]
    for run in runs:
        shutil.rmtree(run.path)
    with pytest.raises(UsageError, match="are gone"):
        found_runs([str(sweep)])
    with pytest.raises(UsageError, match=r"(?s)nothing .*is not a run folder.*neither .*is not a run folder"):
        found_runs(["nothing", "neither"])


def test_without_any_run_the_default_folder_says_how_to_begin_one(sweep: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(sweep.parent.parent)
    assert len(runs_here()) == 4
    monkeypatch.chdir(sweep)
    with pytest.raises(UsageError, match=r"there are no runs here yet \(in runs/\): `pipeline train CONFIG`"):
        runs_here()


@pytest.mark.parametrize("name", ["../other", "a/b", ""])
def test_a_name_that_leads_elsewhere_is_damage(sweep: Path, name: str):
    write_json(sweep / "sweep.json", {"runs": [{"name": name, "values": {}}]})
    with pytest.raises(PipelineError, match=r"sweep\.json: is damaged"):
        found_runs([str(sweep)])
