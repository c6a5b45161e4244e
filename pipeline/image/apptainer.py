"""The commands of Apptainer that build and inspect images."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError, UsageError, listing

COMMAND = "apptainer"

# The default, gzip, takes four times as long for a file that is no smaller.
_SQUASH = "-comp zstd -Xcompression-level 1"
_TAIL_LINES = 15
_STEPS = (
    ("Running post scriptlet", "installing packages"),
    ("Running testscript", "testing the image: importing every module, training three steps"),
    ("Creating SIF file", "packing the image"),
    ("Creating sandbox directory", "moving the sandbox into place"),
)
# Messages of the tools that do not name what is missing, and its cure.
_CURES = (
    ("noexec or nodev", "debootstrap needs root, or an entry for you in /etc/subuid and /etc/subgid; with neither, use "
     "a base from a registry or an archive"),
    ("HTTP response to HTTPS client", "for a registry without TLS: export APPTAINER_NOHTTPS=1"),
    ("Requesting capability set", "export APPTAINER_DROP_CAPS with the capabilities that root lacks on this machine"),
    ("o space left on device", "make room, or export APPTAINER_TMPDIR=DIR on a larger disk"),
)  # fmt: skip


# How Apptainer ends when no registry answers; what one that answers refuses has other words.
_NOT_REACHED = re.compile(
    r"^FATAL: +(.*(?:dial tcp|no such host|proxyconnect|connection refused|timeout|unreachable).*)$", re.M
)


class RegistryNotReached(PipelineError):
    """No registry answered."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """One line: what Apptainer said of it."""


def apptainer_version() -> str:
    """Returns the version of the installed Apptainer.

    Raises:
        UsageError: Apptainer is not installed.
    """
    if shutil.which(COMMAND) is None:
        raise UsageError(f"{COMMAND} is not installed here; install it or load its module (docs/container.md)")
    return subprocess.run(
        [COMMAND, "--version"], capture_output=True, text=True, errors="replace", check=True
    ).stdout.split()[-1]


def build(
    definition: Path,
    target: Path,
    arguments: Mapping[str, str],
    bind: str,
    log: Path,
    *,
    sandbox: bool,
    show: Callable[[str], None],
) -> None:
    """Builds an image; writes Apptainer's output to the log and reports each stage.

    Args:
        definition: The definition file.
        target: The image.
        arguments: Build arguments.
        bind: The folder of the host that `%post` sees, as `APPTAINER_BIND` takes it.
        log: Overwritten.
        sandbox: Build a folder instead of a SIF file.
        show: Called with each stage.

    Raises:
        RegistryNotReached: The base is in a registry, and none answered.
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
            _follow(process.stdout, out, show)
        except BaseException:
            process.send_signal(signal.SIGINT)  # the only signal on which it removes its own folder
            process.wait()
            raise
    if process.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace")
        cures = [cure for mark, cure in _CURES if mark in said]
        tail = said.splitlines()[-_TAIL_LINES:]
        message = listing(f"apptainer could not build the image; the end of {log}:", [*tail, *cures])
        unreached = _NOT_REACHED.search(said)
        if unreached is not None:
            raise RegistryNotReached(message, f"the registry was not reached ({unreached[1]})")
        raise PipelineError(message)


def _follow(said: IO[bytes], log: IO[bytes], show: Callable[[str], None]) -> None:
    for line in said:
        log.write(line)
        log.flush()
        for mark, step in _STEPS:
            if line.startswith(b"INFO:") and mark.encode() in line:
                show(step)


def run_inside(image: Path, *command: str) -> str:
    """Returns what a command in the image prints; of the host it sees only /tmp.

    Raises:
        PipelineError: The command cannot be started or fails.
    """
    argv = [COMMAND, "exec", "--no-mount", "home,cwd", "--pwd", "/", str(image), *command]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise PipelineError(f"{image}: cannot be started, or is not an image of this project: {done.stderr.strip()}")
    return done.stdout


def labels(image: Path) -> dict[str, str]:
    """Returns the labels of an image.

    Raises:
        PipelineError: The image cannot be read.
    """
    apptainer_version()
    done = subprocess.run([COMMAND, "inspect", "--json", str(image)], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise PipelineError(f"{image}: {COMMAND} cannot inspect it: {done.stderr.strip()}")
    found: dict[str, str] = json.loads(done.stdout)["data"]["attributes"]["labels"]
    return found
