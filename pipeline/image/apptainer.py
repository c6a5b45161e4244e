"""Apptainer's own commands, as far as images are built and looked at with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError, UsageError

COMMAND = "apptainer"

# gzip, the default, takes four times the time for a file that is no smaller.
_SQUASH = "-comp zstd -Xcompression-level 1"
_TAIL_LINES = 15
_STEPS = (
    ("Running post scriptlet", "the packages are installed"),
    ("Running testscript", "the image is tested: every module is imported, three steps are trained"),
    ("Creating SIF file", "the image is packed"),
    ("Creating sandbox directory", "the sandbox is put in its place"),
)
# What the tools say when something is missing that they do not name.
_CURES = (
    ("noexec or nodev", "debootstrap needs root, or a line for you in /etc/subuid and /etc/subgid; without either take "
     "a base from a registry or an archive"),
    ("HTTP response to HTTPS client", "for a registry without TLS: export APPTAINER_NOHTTPS=1"),
    ("Requesting capability set", "export APPTAINER_DROP_CAPS with the capabilities that root lacks here"),
    ("o space left on device", "make room, or export APPTAINER_TMPDIR=DIR on a larger disk"),
)  # fmt: skip


def apptainer_version() -> str:
    """The version of the Apptainer that is installed.

    Raises:
        UsageError: None is.
    """
    if shutil.which(COMMAND) is None:
        raise UsageError(f"{COMMAND} is not there; install it or load its module (docs/container.md)")
    return subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def build(
    definition: Path,
    target: Path,
    arguments: Mapping[str, str],
    bind: str,
    log: Path,
    *,
    sandbox: bool,
    say: Callable[[str], None],
) -> None:
    """Builds an image; what Apptainer says goes to the log, and each of its stages is told.

    Args:
        definition: The definition file.
        target: The image.
        arguments: Build arguments.
        bind: What `%post` sees of the host, as `APPTAINER_BIND` takes it.
        log: Written anew.
        sandbox: A folder in place of a SIF file.
        say: Told what is being done.

    Raises:
        PipelineError: The build or the image's own test failed.
    """
    command = [COMMAND, "build", *(["--sandbox"] if sandbox else ["--mksquashfs-args", _SQUASH])]
    command += [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
    command += [str(target), str(definition)]
    environment = {**os.environ, "APPTAINER_BIND": bind}
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            _follow(process.stdout, out, say)
        except BaseException:
            process.send_signal(signal.SIGINT)  # on no other signal it clears its own folder away
            process.wait()
            raise
    if process.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace")
        cures = [cure for mark, cure in _CURES if mark in said]
        tail = said.splitlines()[-_TAIL_LINES:]
        raise PipelineError("\n  ".join([f"apptainer could not build the image; the end of {log}:", *tail, *cures]))


def _follow(said: IO[bytes], log: IO[bytes], say: Callable[[str], None]) -> None:
    for line in said:
        log.write(line)
        log.flush()
        for mark, step in _STEPS:
            if line.startswith(b"INFO:") and mark.encode() in line:
                say(step)


def read_inside(image: Path, file: Path) -> str:
    """A text file of an image.

    Raises:
        PipelineError: The image cannot be started, or has no such file.
    """
    return run_inside(image, "cat", str(file))


def run_inside(image: Path, *command: str) -> str:
    """What a command in the image prints; nothing of the host is seen there but /tmp.

    Raises:
        PipelineError: It cannot be started or fails.
    """
    argv = [COMMAND, "exec", "--no-mount", "home,cwd", "--pwd", "/", str(image), *command]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise PipelineError(f"{image}: cannot be started, or is no image of this project: {done.stderr.strip()}")
    return done.stdout


def labels(image: Path) -> dict[str, str]:
    """The labels of an image.

    Raises:
        PipelineError: It cannot be read.
    """
    apptainer_version()
    done = subprocess.run([COMMAND, "inspect", "--json", str(image)], capture_output=True, text=True)
    if done.returncode != 0:
        raise PipelineError(f"{image}: {COMMAND} cannot inspect it: {done.stderr.strip()}")
    found: dict[str, str] = json.loads(done.stdout)["data"]["attributes"]["labels"]
    return found
