"""Training in the image: the same curve as on the host, clean stops, no leftover processes, provenance."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import published
from pipeline.files import sha256_file
from pipeline.launch.container.command import container_environment
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import step_name
from tests.container.support import ROOT, Jobs

# The first test that needs the image builds it.
pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


def test_a_run_that_moves_between_image_and_host_has_the_same_curve(jobs: Jobs):
    def here(name: str, steps: int) -> None:
        done = jobs.on_host(name, "train", f"train.max_iters={steps}")
        assert done.returncode == 0, done.stderr

    def inside(name: str, steps: int) -> None:
        done = jobs.inside(name, "train", f"train.max_iters={steps}")
        assert done.returncode == 0, done.stderr

    def out() -> None:
        inside("out", 4)
        here("out", 8)

    def into() -> None:
        here("in", 4)
        inside("in", 8)

    # Each start keeps one core busy; the runs share only the data.
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(out), pool.submit(into), pool.submit(here, "whole", 8)]:
            done.result()
    assert sorted(jobs.losses("whole")) == list(range(1, 9))
    assert jobs.losses("out") == jobs.losses("whole")
    assert jobs.losses("in") == jobs.losses("whole")
    images = [start["image"] for start in jobs.run("out").provenance()]
    assert images == [{"path": str(jobs.image), "sha256": sha256_file(jobs.image), "code": "image"}, None]
    assert [start["image"] is None for start in jobs.run("in").provenance()] == [True, False]


@pytest.fixture(scope="module")
def trainers(jobs: Jobs) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Training runs in the image that have taken their first step, by name; they start together to save time."""
    started = {name: _training(jobs, name) for name in ("SIGUSR2", "SIGTERM", "SIGKILL")}
    try:
        for name, process in started.items():
            _wait(lambda n=name, p=process: p.poll() is not None or _has_begun(jobs, n), 120)
            assert process.poll() is None, _errors(jobs, name).read_text()
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_the_process_of_the_container_saves_once_and_ends_with_85(
    jobs: Jobs, trainers: dict[str, subprocess.Popen[bytes]], number: signal.Signals
):
    name, process = number.name, trainers[number.name]
    process.send_signal(number)
    process.wait(120)
    err = _errors(jobs, name).read_text()
    assert process.returncode == 85, err
    assert f"stopped on request ({number.name})" in err
    [saved] = jobs.events(name, "checkpointed")
    assert [c.name for c in published(jobs.run(name).checkpoints)] == [step_name(saved["step"])]
    [preempted] = jobs.events(name, "preempted")
    assert preempted["step"] == saved["step"] == max(jobs.losses(name))


def test_kill_leaves_no_process_behind(jobs: Jobs, trainers: dict[str, subprocess.Popen[bytes]]):
    process = trainers["SIGKILL"]
    inside = _processes_of(jobs.run("SIGKILL").path)
    assert len(inside) >= 2, "expected the trainer and the helper that uploads to MLflow"
    process.kill()
    process.wait(60)
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside), 10)


def test_another_image_is_refused_until_it_is_allowed_and_both_are_recorded(jobs: Jobs, tmp_path: Path):
    assert jobs.inside("moved", "train", "train.max_iters=1").returncode == 0
    other = tmp_path / "other.sif"
    shutil.copy(jobs.image, other)
    with other.open("ab") as file:  # the runtime ignores bytes behind the last part
        file.write(b"another image")
    moved = Jobs(jobs.folder, other, jobs.text)
    refused = moved.inside("moved", "train", "train.max_iters=2")
    assert refused.returncode == 2
    assert sha256_file(jobs.image) in refused.stderr and sha256_file(other) in refused.stderr
    assert "--allow-image-change" in refused.stderr and "Traceback" not in refused.stderr
    assert max(jobs.losses("moved")) == 1

    allowed = moved.inside("moved", "train", "train.max_iters=2", "--allow-image-change")
    assert allowed.returncode == 0, allowed.stderr
    recorded = [start["image"]["sha256"] for start in jobs.run("moved").provenance()]
    assert recorded == [sha256_file(jobs.image), sha256_file(other)]


def test_a_job_runs_the_snapshot_unless_the_config_asks_for_the_code_of_the_image(jobs: Jobs, tmp_path: Path):
    code = jobs.run("snapshot").code
    shutil.copytree(ROOT / "pipeline", code / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    where = ("python3", "-c", "import pipeline; print(pipeline.__file__)")

    def file(*overrides: str) -> str:
        argv = jobs.argv("snapshot", *where, code=code, overrides=overrides)
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    assert file() == f"{code}/pipeline/__init__.py"
    assert file("container.code=image").startswith("/opt/hpc-pipeline/venv/")
    assert jobs.inside("snapshot", "train", "train.max_iters=1", code=code).returncode == 0
    [start] = jobs.run("snapshot").provenance()
    assert start["image"]["code"] == "snapshot"


def _training(jobs: Jobs, name: str) -> subprocess.Popen[bytes]:
    """Starts a long training run in the image."""
    argv = jobs.argv(name, *jobs.command(name, "train", "train.max_iters=100000"))
    environment = container_environment(SiteContainer(), os.environ)
    with _errors(jobs, name).open("w") as err:
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=err)


def _errors(jobs: Jobs, name: str) -> Path:
    return jobs.folder / f"{name}.err"


def _has_begun(jobs: Jobs, name: str) -> bool:
    return jobs.run(name).metrics_file.exists() and bool(jobs.losses(name))


def _processes_of(run: Path) -> list[int]:
    """Returns the processes whose command line names a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if f"name={run.name}\0" in words or str(run) in words or f"runs/{run.name}\0" in words:
            found.append(int(folder.name))
    return found


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {seconds:g} s"
        time.sleep(0.05)
