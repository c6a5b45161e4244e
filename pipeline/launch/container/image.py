"""Which image a job runs in: its checksum, computed once, and whether it can be used on this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.errors import PipelineError, UsageError
from pipeline.files import read_json, sha256_bytes, sha256_file, write_json
from pipeline.image.record import read_record
from pipeline.launch.container.binds import absolute
from pipeline.launch.site import SiteContainer
from pipeline.run.provenance import IMAGE_SHA256_VARIABLE, IMAGE_VARIABLE

# The header of a SIF file: a launch script's line, then the magic, a version and the architecture.
_SIF_MAGIC, _SIF_ARCHITECTURE = slice(32, 42), slice(45, 47)
_ARCHITECTURES = {
    b"01": "386", b"02": "amd64", b"03": "arm", b"04": "arm64", b"05": "ppc64", b"06": "ppc64le", b"07": "mips",
    b"08": "mipsle", b"09": "mips64", b"10": "mips64le", b"11": "s390x", b"12": "riscv64",
}  # fmt: skip
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}

# A plain user without squashfuse waits for the whole image to be unpacked.
_START_TIMEOUT_S = 180
# 127: there is no such command; that of a shell, so that the runtime's own failures (255) are told from it.
_PROBE = ("sh", "-c", "command -v pipeline >/dev/null || exit 127")
_NOT_OURS = "holds no command `pipeline`; build an image with `pipeline image build`"
_UNSQUASH = "set `container.unsquash: true` in the site file, or use a sandbox folder"
_CURES = (
    ("squashfuse", _UNSQUASH),
    ("/dev/fuse", _UNSQUASH),
    ("user namespace", "ask the administrators for user namespaces or a set-uid Apptainer"),
)


@dataclass(frozen=True)
class ImageIdentity:
    """What tells one image from another.

    Attributes:
        path: The image, absolute.
        sha256: Of the SIF file; of a sandbox the digest of its files, as its record gives it.
    """

    path: Path
    sha256: str

    def variables(self) -> dict[str, str]:
        """By which the process inside knows what it runs in, and provenance records it."""
        return {IMAGE_VARIABLE: str(self.path), IMAGE_SHA256_VARIABLE: self.sha256}


def image_path(config: Config) -> Path:
    """The image, as an absolute path.

    Raises:
        UsageError: The config names none.
    """
    if config.container.image is None:
        raise UsageError("container.image: is not set; build one with `pipeline image build` and name it there")
    return absolute(Path(config.container.image).expanduser())


def image_identity(path: Path) -> ImageIdentity:
    """The identity of an image; a SIF file is read once, and again only when size, time or inode change.

    Raises:
        PipelineError: It cannot be read, or is a sandbox without a record.
    """
    try:
        real = path.resolve(strict=True)
        if real.is_dir():
            return ImageIdentity(path, read_record(real)["sha256"])
        return ImageIdentity(path, _cached_sha256(real))
    except OSError as error:
        raise PipelineError(f"container.image: {path} cannot be read ({error.strerror})") from error


def _cached_sha256(real: Path) -> str:
    stat = real.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    cache = _cache_folder() / f"{sha256_bytes(os.fsencode(real))[:32]}.json"
    if cache.exists():
        known = read_json(cache)
        if known["stamp"] == stamp:
            return str(known["sha256"])
    digest = sha256_file(real)
    # A full or read-only home costs the next start a second; it is no reason to fail this one.
    with contextlib.suppress(OSError):
        write_json(cache, {"image": str(real), "stamp": stamp, "sha256": digest})
    return digest


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hpc-pipeline" / "images"


def check_image(config: Config, site: SiteContainer, *, brought: bool = False) -> list[str]:
    """What keeps the config's image from being used on this machine, each with its cure; starts it once.

    Args:
        config: Names the image.
        site: How Apptainer is run here.
        brought: The job itself brings the runtime (a module, say): where it is not here, the image is judged by its
            file alone.
    """
    try:
        image = image_path(config)
    except UsageError as error:
        return [str(error)]
    missing = runtime_problem(site)
    if missing and brought:
        problem = _file_problem(image)
    else:
        problem = missing or _file_problem(image) or _start_problem(image, site)
    return [problem] if problem else []


def runtime_problem(site: SiteContainer) -> str | None:
    """Says that the container runtime is not on this machine, with the cure; None where it is."""
    if shutil.which(site.command) is not None:
        return None
    return (
        f"container.command: {site.command!r} is not there on {socket.gethostname()}; install Apptainer, load its "
        "module (`modules` of the site file), or give the program's path"
    )


def _file_problem(image: Path) -> str | None:
    """What is wrong with an image as far as it can be told without starting it."""
    if not image.exists():
        return f"container.image: {image} does not exist; build it with `pipeline image build`, or correct the path"
    if not os.access(image, os.R_OK):
        return f"container.image: {image} may not be read by you; ask its owner for `chmod a+r`"
    if image.is_dir():
        if (image / ".singularity.d").is_dir():
            return None
        return f"container.image: {image} is a folder, but no sandbox of Apptainer; name a SIF file or a sandbox"
    with image.open("rb") as file:
        header = file.read(48)
    if header[_SIF_MAGIC] != b"SIF_MAGIC\0":
        return f"container.image: {image} is no SIF file, or a damaged one; build it anew with `pipeline image build`"
    built_for = _ARCHITECTURES.get(header[_SIF_ARCHITECTURE], "an unknown architecture")
    here = _MACHINES.get(platform.machine(), platform.machine())
    if built_for != here:
        return (
            f"container.image: {image} is built for {built_for}, and this machine is {here}; build it on a {here} one"
        )
    return None


def start_options(image: Path, site: SiteContainer) -> list[str]:
    """How an image is started here, by a job as by the look at it before: what the other is told could fail alone."""
    return [
        *("--no-eval", "--no-mount", "home,cwd"),
        *(["--pid"] if site.pid else []),
        *(["--unsquash"] if site.unsquash and image.is_file() else []),
    ]


def _start_problem(image: Path, site: SiteContainer) -> str | None:
    command = [site.command, "exec", *start_options(image, site), *site.options, str(image), *_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"container.image: {image} does not start within {_START_TIMEOUT_S} s; use a sandbox folder instead"
    if done.returncode == 0:
        return None
    if done.returncode == 127 or "executable file not found" in done.stderr:
        return f"container.image: {image} {_NOT_OURS}"
    said = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    reason = said[-1].removeprefix("FATAL:").strip() if said else f"exit status {done.returncode}"
    cure = next((cure for mark, cure in _CURES if mark in done.stderr), "see docs/container.md, common errors")
    if cure is _UNSQUASH and site.unsquash:
        cure = "use a sandbox folder: `container.unsquash` is set already"
    return f"container.image: {image} cannot be started by {site.command}: {reason}; {cure}"
