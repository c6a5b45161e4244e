"""Builds by an Apptainer that prints what a test tells it: the stages that are reported, and how a failure ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.image.apptainer import RegistryNotReached, apptainer_version, build, labels, run_inside

STAGES = ["Starting build...", "Running post scriptlet", "Running testscript", "Creating SIF file..."]
REPORTED = [
    "installing packages",
    "testing the image: importing every module, training three steps",
    "packing the image",
]


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a build by an Apptainer that prints given lines; returns the stages that are reported."""

    def run(*said: str, status: int = 0) -> list[str]:
        (tmp_path / "said").write_text("".join(f"{line}\n" for line in said))
        program = tmp_path / "bin" / "apptainer"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$APPTAINER_BIND $*"; cat {tmp_path}/said; exit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        told: list[str] = []
        arguments = {"BOOTSTRAP": "docker", "FROM": "debian@sha256:0"}
        build(Path("a.def"), Path("a.sif"), arguments, "/w:/mnt:ro", tmp_path / "log", sandbox=False, show=told.append)
        return told

    return run


def test_the_stages_of_a_build_are_reported_and_its_output_is_kept(tmp_path: Path, apptainer: Callable[..., list[str]]):
    assert apptainer(*(f"INFO:    {stage}" for stage in STAGES)) == REPORTED
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert first == (
        "/w:/mnt:ro build --mksquashfs-args -comp zstd -Xcompression-level 1 --build-arg BOOTSTRAP=docker "
        "--build-arg FROM=debian@sha256:0 a.sif a.def"
    )
    assert rest == [f"INFO:    {stage}" for stage in STAGES]


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("E: Cannot install into target '/x' mounted with noexec or nodev", "from a registry"),
        ("FATAL: http: server gave HTTP response to HTTPS client", "export APPTAINER_NOHTTPS=1"),
        ("Write failed because No space left on device", "export APPTAINER_TMPDIR=DIR"),
        ("FATAL: Requesting capability set 0x3 while 0x1", "export APPTAINER_DROP_CAPS"),
    ],
)
def test_a_failed_build_ends_with_the_last_lines_of_its_output_and_the_cure(
    tmp_path: Path, apptainer: Callable[..., list[str]], said: str, cure: str
):
    with pytest.raises(PipelineError) as failed:
        apptainer(*(f"line {n}" for n in range(40)), said, status=255)
    title, *tail = str(failed.value).splitlines()
    assert f"{tmp_path}/log" in title
    assert tail[0].strip() == "line 26" and tail[14].strip() == said and cure in tail[15]


@pytest.mark.parametrize(
    ("said", "unreached"),
    [
        ('FATAL:   conveyor failed to get: Get "https://index.docker.io/v2/": dial tcp: no such host', True),
        ("FATAL:   conveyor failed to get: pinging container registry r: proxyconnect tcp: timeout", True),
        ("FATAL:   conveyor failed to get: reading manifest in docker.io/library/debian: unauthorized", False),
        ("FATAL:   while running engine: exit status 1", False),
    ],
)
def test_a_registry_that_did_not_answer_is_told_from_one_that_refused(
    apptainer: Callable[..., list[str]], said: str, unreached: bool
):
    with pytest.raises(PipelineError) as failed:
        apptainer("INFO:    Starting build...", said, status=255)
    assert isinstance(failed.value, RegistryNotReached) == unreached


def test_a_sandbox_needs_no_options_of_a_sif(tmp_path: Path, apptainer: Callable[..., list[str]]):
    apptainer()
    reported: list[str] = []
    build(Path("a.def"), Path("box"), {}, "/w:/mnt", tmp_path / "log", sandbox=True, show=reported.append)
    assert (tmp_path / "log").read_text().splitlines()[0] == "/w:/mnt build --sandbox box a.def"


def test_a_missing_apptainer_is_a_usage_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/not/there")
    with pytest.raises(UsageError, match=r"apptainer .*docs/container\.md"):
        apptainer_version()


def test_an_image_that_cannot_be_started_or_inspected_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "apptainer"
    program.write_text(
        "#!/bin/sh\n[ $1 = --version ] && { echo apptainer version 1.4.5; exit; }\necho why >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert apptainer_version() == "1.4.5"
    with pytest.raises(PipelineError, match=r"a\.sif: .*: why"):
        run_inside(Path("a.sif"), "true")
    with pytest.raises(PipelineError, match=r"a\.sif: .*: why"):
        labels(Path("a.sif"))
