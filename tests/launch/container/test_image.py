"""The image of a job: its identity, and images that are refused before one is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.errors import PipelineError, UsageError
from pipeline.files import sha256_file
from pipeline.image.record import digest, read_record, write_record
from pipeline.launch.container.image import check_image, image_identity, image_path
from pipeline.launch.site import SiteContainer
from tests.launch.container.support import OTHER_ARCHITECTURE, config, sandbox, sif


def test_the_checksum_is_computed_once_and_again_only_when_the_file_changes(tmp_path: Path):
    image = sif(tmp_path / "image.sif", content=b"one")
    first, before = image_identity(image), image.stat()
    assert first.sha256 == sha256_file(image)
    assert first.variables() == {"PIPELINE_IMAGE": str(image), "PIPELINE_IMAGE_SHA256": first.sha256}

    # With the same size, time and inode, only reading the file again can show that it changed.
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


def test_an_identity_needs_no_writable_cache(tmp_path: Path, cache: Path):
    cache.write_text("a file where the folder should be")
    image = sif(tmp_path / "image.sif")
    assert image_identity(image).sha256 == sha256_file(image)


def test_the_identity_of_a_sandbox_is_the_digest_in_its_record(tmp_path: Path):
    image = sandbox(tmp_path / "image")
    with pytest.raises(PipelineError, match=r"image: .*image\.json"):
        image_identity(image)
    write_record(image, {"commit": "abc"})
    assert image_identity(image).sha256 == read_record(image)["sha256"] == digest(image)


def test_an_image_that_cannot_be_read_names_the_config_key(tmp_path: Path):
    with pytest.raises(PipelineError, match=f"container.image: {tmp_path}/no.sif .*No such file"):
        image_identity(tmp_path / "no.sif")


def test_a_config_without_an_image_is_told_to_build_one(work: Path):
    with pytest.raises(UsageError, match=r"container\.image: .*pipeline image build"):
        image_path(config("container.image=null"))
    assert "container.image" in check_image(config("container.image=null"), SiteContainer())[0]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda image: None, "does not exist"),
        (lambda image: image.write_text("no image"), "damaged"),
        (lambda image: image.touch(), "damaged"),
        (lambda image: image.mkdir(), "sandbox"),
        (lambda image: sif(image, OTHER_ARCHITECTURE), "s390x"),
        (lambda image: sif(image, b"99"), "unknown architecture"),
    ],
)
def test_a_file_that_is_no_usable_image_is_one_clear_problem(work: Path, make, word: str):
    (work / "image.sif").unlink()
    make(work / "image.sif")
    [problem] = check_image(config(), SiteContainer(command=sys.executable))
    assert problem.startswith(f"container.image: {work}/image.sif ") and word in problem


def test_a_missing_apptainer_is_named_with_its_cure(work: Path):
    [problem] = check_image(config(), SiteContainer(command="no-apptainer"))
    assert problem.startswith("container.command: 'no-apptainer' ") and "load its module" in problem
    assert check_image(config(), SiteContainer(command="no-apptainer"), from_job=True) == []
    [problem] = check_image(config("container.image=no.sif"), SiteContainer(command="no-apptainer"), from_job=True)
    assert "does not exist" in problem


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("exit 0", None),
        ("exit 127", "no command `pipeline`"),
        ("echo 'FATAL:   executable file not found in $PATH' >&2; exit 255", "no command `pipeline`"),
        ("echo 'FATAL:   cannot set up a user namespace' >&2; exit 255", "set-uid Apptainer"),
        ("exit 3", "exit status 3"),
    ],
)
def test_an_image_that_does_not_start_is_named_with_the_reason_and_the_cure(work: Path, script: str, word: str | None):
    runtime = work / "apptainer"
    runtime.write_text(f"#!/bin/sh\n{script}\n")
    runtime.chmod(0o755)
    found = check_image(config(), SiteContainer(command=str(runtime)))
    assert len(found) == (word is not None)
    assert all(problem.startswith(f"container.image: {work}/image.sif ") and str(word) in problem for problem in found)


def test_a_sandbox_is_never_unpacked(work: Path):
    runtime = work / "apptainer"
    runtime.write_text(f'#!/bin/sh\necho "$*" >>{work}/calls\n')
    runtime.chmod(0o755)
    sandbox(work / "box")
    for image in ("image.sif", "box"):
        loaded = load_config("config.yaml", [f"container.image={image}"])
        assert check_image(loaded, SiteContainer(command=str(runtime), unsquash=True, pid=False)) == []
    packed, folder = (work / "calls").read_text().splitlines()
    assert packed.startswith("exec --no-eval --no-mount home,cwd --unsquash ") and "--unsquash" not in folder
    assert "--pid" not in packed + folder
