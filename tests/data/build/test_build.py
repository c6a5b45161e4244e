"""However a build is divided or stopped, its bytes are the same."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import dump_config
from pipeline.data import manifest
from pipeline.data.build import build, make_tokenizer, resume
from pipeline.data.build.build import BuildProgress, prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import DataError, UsageError
from tests.data.every_kind import TEXTS, TOKENIZER, config_of_every_kind
from tests.data.helpers import SPEECHES, config, dataset_digest, jsonl, split_texts, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the sources and the uninterrupted build `out`, and its digests."""
    tmp_path = tmp_path_factory.mktemp("whole")
    prepare(config_of_every_kind(tmp_path, "out"))
    return tmp_path, dataset_digest(tmp_path / "out")


def test_the_same_sources_give_the_same_bytes(whole: tuple[Path, dict[str, str]]) -> None:
    folder, digests = whole
    assert len([d for d in digests if d.endswith("slice.json")]) > 20
    prepare(config_of_every_kind(folder, "again-out"))
    assert dataset_digest(folder / "again-out") == digests


def test_a_finished_build_is_left_alone(whole: tuple[Path, dict[str, str]]) -> None:
    folder, digests = whole
    before = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*.bin")}
    assert prepare(config_of_every_kind(folder, "out")) == DatasetManifest.load(folder / "out")
    assert {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*.bin")} == before
    assert dataset_digest(folder / "out") == digests


def _stamps(folder: Path) -> dict[Path, int]:
    """Returns the modification times of all files and folders."""
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def test_a_finished_dataset_may_lie_on_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made)
    before = _stamps(tmp_path / "out")
    prepare(made)
    assert _stamps(tmp_path / "out") == before

    def read_only(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for module in (resume, manifest, make_tokenizer):
        for name in ("write_bytes", "write_text", "write_json"):
            monkeypatch.setattr(module, name, read_only, raising=False)
    (tmp_path / "in" / "lines.jsonl").touch()
    assert prepare(made) == DatasetManifest.load(tmp_path / "out")


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_any_number_of_parts_in_any_order_gives_the_same_bytes(parts: int, whole: tuple[Path, dict[str, str]]) -> None:
    folder, digests = whole
    order = random.Random(parts).sample(range(1, parts + 1), parts)
    results = [prepare(config_of_every_kind(folder, f"parts{parts}"), slice_spec=(part, parts)) for part in order]
    # Parts beyond the number of tasks have nothing to do, so the manifest may appear before the last part.
    assert results[-1] is not None
    assert dataset_digest(folder / f"parts{parts}") == digests


def test_a_part_that_is_not_the_last_writes_no_manifest(whole: tuple[Path, dict[str, str]]) -> None:
    folder, _ = whole
    assert prepare(config_of_every_kind(folder, "first"), slice_spec=(1, 2)) is None
    assert not (folder / "first" / "manifest.json").exists()
    with pytest.raises(DataError, match="not finished"):
        DatasetManifest.load(folder / "first")


@pytest.mark.parametrize("cores", [1, 7])
def test_any_number_of_threads_gives_the_same_bytes(
    cores: int, whole: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digests = whole
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: set(range(cores)))
    prepare(config_of_every_kind(folder, f"cores{cores}"))
    assert dataset_digest(folder / f"cores{cores}") == digests


def test_the_size_of_slices_does_not_change_the_documents(whole: tuple[Path, dict[str, str]]) -> None:
    folder, _ = whole
    prepare(config_of_every_kind(folder, "large", slice_size_mb=64.0))
    for split in ("train", "validation"):
        assert split_texts(folder / "large", split) == split_texts(folder / "out", split)


def test_a_failure_anywhere_leaves_work_that_the_next_build_resumes(
    whole: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digests = whole
    done: list[int] = []
    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            calls = itertools.count(1)
            publish = build.SliceWriter.publish

            def failing(
                self: Any, pieces: Any, last: bool, calls: Any = calls, stop: int = 3, publish: Any = publish
            ) -> Any:
                if next(calls) > stop:
                    raise DataError("stopped here")
                return publish(self, pieces, last)

            patch.setattr(build.SliceWriter, "publish", failing)
            try:
                prepare(config_of_every_kind(folder, "stopped"))
                break
            except DataError as error:
                assert "stopped here" in str(error)
        done.append(len(list((folder / "stopped" / "slices").glob("[0-9]*"))))
        assert not (folder / "stopped" / "manifest.json").exists()
        assert number < 50
    assert len(done) > 5
    assert done == sorted(done)
    assert dataset_digest(folder / "stopped") == digests


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_gives_the_same_bytes(whole: tuple[Path, dict[str, str]]) -> None:
    folder, digests = whole
    out = folder / "killed"
    file = write(folder / "killed.yaml", dump_config(config_of_every_kind(folder, "killed")).encode())
    command = [sys.executable, "-m", "pipeline", "prepare", str(file)]
    slices = len([name for name in digests if name.endswith("slice.json")])
    rng = random.Random(0)
    # One moment per twentieth of the work, by progress and not by the clock: the machine may be loaded.
    moments = [int(slices * (twentieth + rng.random()) / 20) for twentieth in range(20)]
    left_behind = []
    for moment in moments:
        part = rng.choice([[], [], ["--slice", "1/2"], ["--slice", "2/2"]])
        # A kill between the manifest and the end of the process is too late as well.
        while not _killed(command + part, out, moment, rng.uniform(0, 0.03)) or (out / "manifest.json").exists():
            assert _published(out) >= moment or part, "it ended long before"
            part = []
            if (out / "manifest.json").exists():  # just too late: remove some of the work
                (out / "manifest.json").unlink()
                for lost in sorted((out / "slices").iterdir())[moment // 2 :]:
                    shutil.rmtree(lost)
        left_behind.append(len(list(out.rglob(".*.tmp"))))
        # Visible files are whole, and the folder is not taken for a dataset.
        visible = {n: d for n, d in dataset_digest(out).items() if ".tmp" not in n}
        assert visible.items() <= digests.items()
        with pytest.raises(DataError, match="not finished"):
            DatasetManifest.load(out)
    assert sum(count > 0 for count in left_behind) > 5  # killed while writing
    subprocess.run(command, check=True, capture_output=True)
    assert dataset_digest(out) == digests


def _killed(command: list[str], out: Path, moment: int, later: float) -> bool:
    """Kills a build `later` seconds after `moment` slices are published; returns whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and (_published(out) < moment or not (out / "plan.json").exists()):
        time.sleep(0.001)
    time.sleep(later)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def _published(out: Path) -> int:
    return len(list((out / "slices").glob("[0-9]*")))


def test_a_part_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--slice 3/2: "):
        prepare(config_of_every_kind(tmp_path, "out"), slice_spec=(3, 2))


def test_two_processes_that_do_the_same_slice_agree(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    file = write(tmp_path / "c.yaml", dump_config(made).encode())
    command = [sys.executable, "-m", "pipeline", "prepare", str(file)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err.decode()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    prepare(config_of_every_kind(tmp_path, "alone"))
    assert dataset_digest(tmp_path / "out") == dataset_digest(tmp_path / "alone")


@pytest.mark.parametrize("moment", ["plan.json", "tokenizer.json", "000003-00000", "manifest.json"])
def test_a_process_that_is_overtaken_at_any_moment_agrees(
    moment: str, whole: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digests = whole
    made = config_of_every_kind(folder, f"overtaken-{moment}")
    overtaken = []

    def publish(self: Path, target: Path, rename: Any) -> Path:
        if Path(target).name == moment and not overtaken:
            overtaken.append(moment)
            prepare(made)  # another process finishes the build and removes temporary files
            assert not self.exists()
        return rename(self, target)

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, functools.partialmethod(publish, rename=getattr(Path, name)))
    prepare(made)
    assert overtaken
    assert dataset_digest(Path(made.data.path)) == digests


def test_the_split_depends_on_the_document_alone(tmp_path: Path) -> None:
    first = config_of_every_kind(tmp_path, "out")
    prepare(first)
    validation = set(split_texts(tmp_path / "out", "validation"))
    assert 5 < len(validation) < 60
    entry = {"name": "all", "paths": [str(write(tmp_path / "other.jsonl", jsonl(["new", *TEXTS[::-1]])))]}
    prepare(config(tmp_path / "other", [entry], tokenizer=TOKENIZER, validation_fraction=0.1))
    # The first config assigns the archive's documents to training, whatever their hash.
    assert (
        validation <= set(split_texts(tmp_path / "other", "validation")) <= validation | set(TEXTS[150:230]) | {"new"}
    )


def test_the_progress_of_a_build_ends_at_the_size_of_its_sources(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(SPEECHES))
    seen: list[BuildProgress] = []
    prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(text)]}], slice_size_mb=0.001), progress=seen.append)
    slices = [p for p in seen if p.phase == "slices"]
    assert seen[0].phase == "tokenizer" and seen[-1].phase == "done"
    assert {p.total for p in slices} == {text.stat().st_size}
    assert max(p.done for p in slices) >= text.stat().st_size
