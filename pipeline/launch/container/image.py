"""The image a job runs in: its checksum, computed once, and whether this machine can use it."""

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
from pipeline.errors import UsageError
from pipeline.files import naming, read_json, sha256_bytes, sha256_file, write_json
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

# For a plain user without squashfuse, Apptainer unpacks the whole image first.
_START_TIMEOUT_S = 180
# 127, the shell's status for a missing command, is distinct from the runtime's own failures (255).
_PROBE = ("sh", "-c", "command -v pipeline >/dev/null || exit 127")
_NOT_OURS = "has no command `pipeline`; build an image with `pipeline image build`"
_UNSQUASH = "set `container.unsquash: true` in the site file, or use a sandbox folder"
_CURES = (
    ("squashfuse", _UNSQUASH),
    ("/dev/fuse", _UNSQUASH),
    ("user namespace", "ask the administrators for user namespaces or a set-uid Apptainer"),
)


@dataclass(frozen=True)
class ImageIdentity:
    """What distinguishes one image from another."""

    path: Path
    """Absolute path of the image."""
    sha256: str
    """SHA-256 of a SIF file; of a sandbox, the digest of its files that its record holds."""

    def variables(self) -> dict[str, str]:
        """Returns the variables that tell the process inside, and its provenance, which image it runs in."""
        return {IMAGE_VARIABLE: str(self.path), IMAGE_SHA256_VARIABLE: self.sha256}


def image_path(config: Config) -> Path:
    """Returns the absolute path of the image.

    Raises:
        UsageError: The config names no image.
    """
    if config.container.image is None:
        raise UsageError("container.image: not set; build an image with `pipeline image build` and set its path")
    return absolute(Path(config.container.image).expanduser())


def image_identity(path: Path) -> ImageIdentity:
    """Returns the identity of an image; a SIF file is read again only when its size, time or inode changes.

    Raises:
        PipelineError: The image cannot be read, or is a sandbox without a record.
    """
    with naming("container.image", f"{path} cannot be read"):
        real = path.resolve(strict=True)
        return ImageIdentity(path, read_record(real)["sha256"] if real.is_dir() else _cached_sha256(real))


def _cached_sha256(real: Path) -> str:
    stat = real.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    cache = _cache_folder() / f"{sha256_bytes(os.fsencode(real))[:32]}.json"
    if cache.exists():
        known = read_json(cache)
        if known["stamp"] == stamp:
            return str(known["sha256"])
    digest = sha256_file(real)
    # With a full or read-only home the next start computes it again, which takes a second; that must not fail this one.
    with contextlib.suppress(OSError):
        write_json(cache, {"image": str(real), "stamp": stamp, "sha256": digest})
    return digest


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hpc-pipeline" / "images"


def check_image(config: Config, site: SiteContainer, *, from_job: bool = False) -> list[str]:
    """Returns what prevents the use of the config's image on this machine, with its cure; starts the image once.

    Args:
        config: Names the image.
        site: How Apptainer is run here.
        from_job: The job itself provides the runtime, for example by a module: where the runtime is missing here, only
            the image file is checked.
    """
    try:
        image = image_path(config)
    except UsageError as error:
        return [str(error)]
    missing = runtime_problem(site)
    if missing and from_job:
        problem = _file_problem(image)
    else:
        problem = missing or _file_problem(image) or _start_problem(image, site)
    return [problem] if problem else []


def runtime_problem(site: SiteContainer) -> str | None:
    """Returns a message, with the cure, if the container runtime is missing on this machine; None otherwise."""
    if shutil.which(site.command) is not None:
        return None
    return (
        f"container.command: {site.command!r} is not there on {socket.gethostname()}; install Apptainer, load its "
        "module (`modules` in the site file), or give the path of the program"
    )


def _file_problem(image: Path) -> str | None:
    """Returns what is wrong with an image, as far as its file shows; None if nothing is."""
    if not image.exists():
        return f"container.image: {image} does not exist; build it with `pipeline image build` or correct the path"
    if not os.access(image, os.R_OK):
        return f"container.image: {image} is not readable for you; ask its owner for `chmod a+r`"
    if image.is_dir():
        if (image / ".singularity.d").is_dir():
            return None
        return f"container.image: {image} is a folder, but not an Apptainer sandbox; name a SIF file or a sandbox"
    with image.open("rb") as file:
        header = file.read(48)
    if header[_SIF_MAGIC] != b"SIF_MAGIC\0":
        return f"container.image: {image} is not a SIF file, or is damaged; build it again with `pipeline image build`"
    built_for = _ARCHITECTURES.get(header[_SIF_ARCHITECTURE], "an unknown architecture")
    here = _MACHINES.get(platform.machine(), platform.machine())
    if built_for != here:
        return f"container.image: {image} is built for {built_for}, this machine is {here}; build it on {here}"
    return None


def start_options(image: Path, site: SiteContainer) -> list[str]:
    """Returns the options that start an image here; the check uses those of the job, so that both fail or neither."""
    return [
        *("--no-eval", "--no-mount", "home,cwd"),
        *(["--pid"] if site.pid else []),
        *(["--unsquash"] if site.unsquash and image.is_file() else []),
    ]


def _start_problem(image: Path, site: SiteContainer) -> str | None:
    command = [site.command, "exec", *start_options(image, site), *site.options, str(image), *_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"container.image: {image} does not start within {_START_TIMEOUT_S} s; use a sandbox folder instead"
    if done.returncode == 0:
        return None
    if done.returncode == 127 or "executable file not found" in done.stderr:
        return f"container.image: {image} {_NOT_OURS}"
    said = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    reason = said[-1].removeprefix("FATAL:").strip() if said else f"exit status {done.returncode}"
    cure = next((cure for mark, cure in _CURES if mark in done.stderr), "see Common errors in docs/container.md")
    if cure is _UNSQUASH and site.unsquash:
        cure = "use a sandbox folder: `container.unsquash` is already set"
    return f"container.image: {image} cannot be started by {site.command}: {reason}; {cure}"
