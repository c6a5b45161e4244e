"""Images: their identity, what is refused before one is started or built, and what resuming in another needs."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.files import sha256_file
from pipeline.image.record import digest, read_record, write_record
from pipeline.launch.container.image import check_image, image_identity
from pipeline.launch.site import SiteContainer
from pipeline.run.provenance import collect_provenance, current_image, refuse_other_image
from tests.test_bad_input import experiment, run_here

HERE = {"x86_64": b"02", "aarch64": b"04"}[platform.machine()]


def sif(path: Path, architecture: bytes = HERE, content: bytes = b"") -> Path:
    """A file with the header of a SIF."""
    header = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + architecture + b"\0"
    path.write_bytes(header + content)
    return path


def sandbox(path: Path) -> Path:
    (path / ".singularity.d").mkdir(parents=True)
    (path / "file").write_text("content")
    (path / "link").symlink_to("file")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_checksum_is_computed_once_and_again_only_when_the_file_is_another(tmp_path):
    image = sif(tmp_path / "image.sif", content=b"one")
    first, before = image_identity(image), image.stat()
    assert first.sha256 == sha256_file(image)
    assert first.variables() == {"PIPELINE_IMAGE": str(image), "PIPELINE_IMAGE_SHA256": first.sha256}

    # The same size, time and inode: only somebody who reads the file again can see that it changed.
    with image.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"two")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image_identity(image).sha256 == first.sha256

    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert image_identity(image).sha256 == sha256_file(image) != first.sha256
    sif(tmp_path / "other.sif", content=b"six").rename(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert image_identity(image).sha256 == sha256_file(image)


def test_an_identity_needs_no_writable_cache(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    image = sif(tmp_path / "image.sif")
    assert image_identity(image).sha256 == sha256_file(image)


def test_a_sandbox_is_what_its_record_says(tmp_path):
    image = sandbox(tmp_path / "image")
    with pytest.raises(PipelineError, match=r"has no record \(image\.json beside it\)"):
        image_identity(image)
    write_record(image, {"commit": "abc"})
    assert image_identity(image).sha256 == read_record(image)["sha256"] == digest(image)
    for change in (
        lambda: (image / "file").write_text("other"),
        lambda: (image / "file").chmod(0o755),
        lambda: (image / "more").touch(),
        lambda: ((image / "link").unlink(), (image / "link").symlink_to("more")),
    ):
        before = digest(image)
        change()
        assert digest(image) != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda image: None, "does not exist; build it with `pipeline image build`"),
        (lambda image: image.write_text("no image"), "is no SIF file, or a damaged one"),
        (lambda image: image.touch(), "is no SIF file, or a damaged one"),
        (lambda image: image.mkdir(), "is a folder, but no sandbox of Apptainer"),
        (lambda image: sif(image, b"11"), f"is built for s390x, and this machine is {platform.machine()}".split()[0]),
        (lambda image: sif(image, b"11"), "is built for s390x, and this machine is"),
    ],
)
def test_what_is_no_usable_image_is_one_clear_problem(tmp_path, make, message):
    make(tmp_path / "image.sif")
    [problem] = check_image(_config(tmp_path), SiteContainer(command=sys.executable))
    assert problem.startswith(f"container.image: {tmp_path}/image.sif ") and message in problem


def test_a_missing_apptainer_is_named_with_its_cure(tmp_path):
    sif(tmp_path / "image.sif")
    [problem] = check_image(_config(tmp_path), SiteContainer(command="apptainer-that-is-not-there"))
    assert problem.startswith("container.command: 'apptainer-that-is-not-there' is not there on ")
    assert "load its module" in problem


def _config(folder: Path):
    from pipeline.config.load import load_config

    return load_config(experiment(folder, **{"container.image": str(folder / "image.sif")}))


# ---- resuming ------------------------------------------------------------------------------


def _start_in(monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> dict:
    for name, value in (("PIPELINE_IMAGE", "/images/a.sif"), ("PIPELINE_IMAGE_SHA256", sha256)):
        monkeypatch.setenv(name, value) if sha256 else monkeypatch.delenv(name, raising=False)
    return collect_provenance()


def test_a_run_goes_on_in_its_image_and_outside_any_but_not_in_another(monkeypatch):
    starts = [_start_in(monkeypatch, "a" * 64)]
    refuse_other_image(starts, current_image())
    starts.append(_start_in(monkeypatch, None))
    assert starts[-1]["image"] is None
    refuse_other_image(starts, current_image())
    _start_in(monkeypatch, "b" * 64)
    with pytest.raises(UsageError, match=f"sha256 {'a' * 64}.*sha256 {'b' * 64}.*`--allow-image-change`"):
        refuse_other_image(starts, current_image())


@pytest.mark.slow
def test_train_refuses_another_image_before_it_touches_the_run(tmp_path, monkeypatch, capsys):
    config = experiment(tmp_path)
    assert run_here(monkeypatch, capsys, "prepare", config)[0] == 0
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    first = _start_in(monkeypatch, "a" * 64)
    from pipeline.run.folder import Run

    Run(run).add_provenance(first)
    _start_in(monkeypatch, "b" * 64)
    status, err = run_here(monkeypatch, capsys, "train", config)
    assert status == 2 and err.count("error:") == 1 and "--allow-image-change" in err
    assert sorted(p.name for p in run.iterdir()) == ["provenance.json"]

    assert run_here(monkeypatch, capsys, "train", config, "--allow-image-change")[0] == 0
    recorded = [start["image"]["sha256"] for start in Run(run).provenance()]
    assert recorded == ["a" * 64, "b" * 64]


@pytest.mark.parametrize(
    ("record", "lacks"),
    [({}, "base.name, base.bootstrap, base.digest, accelerator"), ({"base": "bookworm"}, "base.name")],
)
def test_a_record_that_tells_too_little_is_named(tmp_path, monkeypatch, capsys, record, lacks):
    image = sif(tmp_path / "img.sif")
    (tmp_path / "img.sif.json").write_text(json.dumps({"sha256": "x", **record}))
    status, err = run_here(monkeypatch, capsys, "image", "info", str(image))
    assert status == 1 and err.count("\n") == 1
    assert f"{tmp_path}/img.sif.json: the record of an image lacks {lacks}" in err


def test_info_names_an_image_that_is_not_there(tmp_path, monkeypatch, capsys):
    status, err = run_here(monkeypatch, capsys, "image", "info", str(tmp_path / "no.sif"))
    assert status == 2 and "does not exist; `pipeline image build` makes one" in err
