"""A report of a run folder from others publishes nothing that a link in it names, and reads nothing without end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.run.folder import Run
from pipeline.tracking.report.report import write_report
from pipeline.tracking.upload import describe
from tests.tracking.support import begin, make_run

SECRET = "BEGIN OPENSSH PRIVATE KEY"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made, config = make_run(tmp_path, "none")
    tracker = begin(made, config)
    tracker.log(5, {"train/loss": 3.0})
    tracker.close("FINISHED")
    made.samples.mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text(SECRET)
    return made


def published(run: Run, out: Path) -> str:
    """What the report and the artifacts for MLflow hold, or why there is none."""
    try:
        page = write_report([run], out).read_text()
    except PipelineError as error:
        page = str(error)
    return page + "".join(file.read_text(errors="replace") for file, _ in describe.files(run))


def test_a_link_to_a_private_file_is_not_published(run: Run, tmp_path: Path) -> None:
    key = tmp_path / "private" / "key.txt"
    (run.samples / "step_00000005.txt").symlink_to(key)
    assert SECRET not in published(run, tmp_path / "page.html")
    run.samples.joinpath("step_00000005.txt").unlink()
    run.samples.rmdir()
    run.samples.symlink_to(key.parent)
    assert SECRET not in published(run, tmp_path / "page.html")
    for file in (run.provenance_file, run.evaluation_file, run.tokenizer_file, run.environment_file, run.config_file):
        content = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.symlink_to(key)
        assert SECRET not in published(run, tmp_path / "page.html"), file
        file.unlink()
        if content is not None:
            file.write_bytes(content)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "config.yaml", "provenance.json", "evaluation.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_fifo_or_device_is_one_error_that_names_it(run: Run, tmp_path: Path, name: str, kind: str) -> None:
    file = run.path / name
    file.unlink(missing_ok=True)
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    with pytest.raises(PipelineError, match=f"^{file}: "):
        write_report([run], tmp_path / "page.html")


def test_lines_that_are_no_metrics_and_events_of_other_types_disturb_nothing(run: Run, tmp_path: Path) -> None:
    odd = [{"step": "x"}, {"step": 1, "time": None}, {"step": -1, "time": 1}, {"step": 6, "time": 1e300}, {},
           {"step": 7, "time": 1.0, "train/loss": "x"}, {"step": 10**400, "time": 1.0}]  # fmt: skip
    with run.metrics_file.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in odd)
        out.write("[" * 5000 + "\n" + '{"step": 8, "time": 1.0, "a": "\\ud800"}\n')
    with run.events_file.open("a") as out:
        for line in ({"event": "rollback", "time": "x", "skipped": 3}, {"event": "checkpointed", "step": "x"},
                     {"event": "attempt", "began": float("inf"), "time": 1e300}, {"event": ["x"]}):  # fmt: skip
            out.write(json.dumps(line) + "\n")
    assert "rollback" in write_report([run], tmp_path / "page.html").read_text()
