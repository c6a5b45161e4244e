"""`pipeline image info` prints the record of an image and fails if the image is not the recorded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.image.build import commit_of
from pipeline.image.record import read_record, write_record
from pipeline.image.wheels import lock_digest, locks_of
from tests.cli.test_main import ROOT
from tests.launch.container.support import sif
from tests.test_bad_input import run_here

RECORD: dict[str, Any] = {
    "base": {"name": "debian:bookworm", "bootstrap": "docker", "digest": "sha256:0"}, "accelerator": "cpu",
    "architecture": "x86_64", "version": "1", "commit": "abc", "lock_sha256": "def", "date": "today",
    "apptainer": "1.4",
    "python_packages": ["torch==2.13.0"], "system_packages": ["libc6=2.36", "g++=12"],
}  # fmt: skip


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image whose labels and record agree."""
    image = sif(tmp_path / "img.sif")
    write_record(image, RECORD)
    labels = {"org.opencontainers.image.revision": "abc", "pipeline.lock.sha256": "def"}
    monkeypatch.setattr("pipeline.image.info.labels", lambda image: labels)
    return image


def info(image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from pipeline.cli.main import main

    monkeypatch.setattr("sys.argv", ["pipeline", "image", "info", str(image)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_the_record_is_printed_and_how_it_differs_from_the_checkout(image, monkeypatch, capsys):
    status, out, err = info(image, monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert read_record(image)["sha256"] in out and "1 of Python" in out
    differing = [line.rpartition(" ")[2] for line in out.splitlines() if "differs" in line]
    assert differing == [commit_of(ROOT), lock_digest(locks_of("cpu", ROOT / "containers", "x86_64"))]


def test_a_changed_image_and_the_record_of_another_are_named(image, monkeypatch, capsys):
    with image.open("ab") as file:
        file.write(b"\0")
    record = json.loads((image.parent / "img.sif.json").read_text())
    (image.parent / "img.sif.json").write_text(json.dumps({**record, "commit": "of another"}))
    status, _, err = info(image, monkeypatch, capsys)
    assert status == 1 and err.startswith(f"pipeline: error: {image}: ")
    assert "sha256" in err and "org.opencontainers.image.revision is abc" in err and "pipeline.lock" not in err


@pytest.mark.parametrize(("record", "lacks"), [({}, "base.name"), ({"base": "bookworm"}, "base.name")])
def test_a_record_that_holds_too_little_is_named(tmp_path, monkeypatch, capsys, record, lacks):
    image = sif(tmp_path / "img.sif")
    (tmp_path / "img.sif.json").write_text(json.dumps({"sha256": "x", **record}))
    status, err = run_here(monkeypatch, capsys, "image", "info", str(image))
    assert status == 1 and err.count("\n") == 1
    assert f"{tmp_path}/img.sif.json: " in err and f"lacks {lacks}" in err


def test_an_image_that_does_not_exist_is_a_usage_error(tmp_path, monkeypatch, capsys):
    status, err = run_here(monkeypatch, capsys, "image", "info", str(tmp_path / "no.sif"))
    assert status == 2 and f"{tmp_path}/no.sif: does not exist" in err
