"""The base of an image: reads and checks the argument files of `containers/`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import sha256_file

# The Python of Debian 12, which all bases of `containers/` are.
PYTHON = "3.11"

_BOOTSTRAPS = ("debootstrap", "docker", "docker-archive")
_ACCELERATORS = ("cpu", "cuda", "rocm")
# Apptainer also looks for debootstrap in these, which are not on a plain user's PATH.
_ADMIN_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_PINNED = re.compile(r".+@(sha256:[0-9a-f]{64})")
# A bare Debian of a registry, which debootstrap makes too.
_BARE_DEBIAN = re.compile(r"docker\.io/library/(debian:[a-z]+?)(?:-slim)?@.*")


@dataclass(frozen=True)
class Base:
    """One argument file."""

    name: str
    """Name of the file without `.args`; part of the names of images."""
    arguments: dict[str, str]
    """Build arguments of Apptainer.def."""
    digest: str | None
    """Digest that pins the base; None for debootstrap, where the list of packages is recorded instead."""

    @property
    def accelerator(self) -> str:
        """`cpu`, `cuda` or `rocm`."""
        return self.arguments["ACCELERATOR"]

    @property
    def python(self) -> str:
        """Version of the base's Python: that of Debian 12, unless the file says otherwise."""
        return self.arguments.get("PYTHON", PYTHON)

    @property
    def brings_torch(self) -> bool:
        """Whether the base has a PyTorch of its own, which the image keeps."""
        return "TORCH" in self.arguments


def read_base(name: str, root: Path) -> Base:
    """Reads and checks the argument file that `--base` names: one in `containers/` of the checkout, or another by path.

    Raises:
        UsageError: There is no such file, or it does not pin the base.
    """
    file = Path(name) if name.endswith(".args") else root / "containers" / f"{name}.args"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in (root / "containers").glob("*.args")))
        raise UsageError(f"--base {name}: there is no {file}; allowed: {known} or the path of an .args file")
    arguments = _parse(file)
    for key, allowed in (("BOOTSTRAP", _BOOTSTRAPS), ("ACCELERATOR", _ACCELERATORS)):
        if arguments.get(key) not in allowed:
            raise UsageError(f"{file}: {key}={arguments.get(key, '')}, allowed: {', '.join(allowed)}")
    if not re.fullmatch(r"3\.1[1-9]", arguments.get("PYTHON", PYTHON)):
        raise UsageError(f"{file}: PYTHON={arguments['PYTHON']}, allowed: 3.11 or newer, as `python3` of the base says")
    if arguments.get("TORCH", "base") != "base":
        raise UsageError(f"{file}: TORCH={arguments['TORCH']}, allowed: base, or no such line; a wheel is the default")
    if "FROM" not in arguments:
        raise UsageError(f"{file}: FROM is missing; set it to the name of the base")
    if arguments["BOOTSTRAP"] == "debootstrap":
        _require_debootstrap(file, arguments)
    return Base(file.stem, arguments, _digest(file, arguments))


def without_registry(base: Base) -> Base | None:
    """Returns the same base made by debootstrap, if it is a bare Debian; None for any other.

    Raises:
        UsageError: debootstrap is not installed here, or apt has no mirror.
    """
    bare = _BARE_DEBIAN.fullmatch(base.arguments["FROM"])
    if base.arguments["BOOTSTRAP"] != "docker" or bare is None:
        return None
    arguments = {**base.arguments, "BOOTSTRAP": "debootstrap", "FROM": bare[1], "SUITE": bare[1].partition(":")[2]}
    _require_debootstrap(Path(f"{base.name}.args"), arguments)
    return Base(base.name, arguments, None)


def _require_debootstrap(file: Path, arguments: dict[str, str]) -> None:
    """Fills in the mirror, unless the file names one.

    Raises:
        UsageError: debootstrap is not installed here, or apt has no mirror.
    """
    if "MIRROR" not in arguments:
        arguments["MIRROR"] = _apt_mirror(file)
    if shutil.which("debootstrap", path=os.pathsep.join([os.environ["PATH"], *_ADMIN_FOLDERS])) is None:
        raise UsageError(f"{file}: debootstrap is not installed here; run `apt-get install debootstrap`")


def _parse(file: Path) -> dict[str, str]:
    arguments = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.strip().partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            raise UsageError(f"{file}, line {number}: {line.strip()!r}, allowed: NAME=VALUE")
        arguments[key] = value
    return arguments


def _digest(file: Path, arguments: dict[str, str]) -> str | None:
    base = arguments["FROM"]
    if arguments["BOOTSTRAP"] == "debootstrap":
        return None
    if arguments["BOOTSTRAP"] == "docker-archive":
        if not Path(base).is_file():
            raise UsageError(f"{file}: FROM={base}: this file does not exist")
        return f"sha256:{sha256_file(Path(base))}"
    pinned = _PINNED.fullmatch(base)
    if pinned is None:
        raise UsageError(
            f"{file}: FROM={base} is not pinned, so two builds could differ; write NAME@sha256:..., "
            f"which `skopeo inspect --format '{{{{.Digest}}}}' docker://{base}` prints"
        )
    return pinned[1]


def _apt_mirror(file: Path) -> str:
    """Returns the Debian mirror that apt uses on this machine."""
    system = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if system.get("ID") == "debian" and shutil.which("apt-get") is not None:
        form = ("--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
        done = subprocess.run(["apt-get", "indextargets", *form], capture_output=True, text=True, errors="replace")
        # Only the release itself: the archive of its security updates lacks the base packages.
        wanted = f" {system['VERSION_CODENAME']} main"
        mirrors = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(wanted)]
        if mirrors:
            return mirrors[0]
    raise UsageError(f"{file}: apt here has no Debian mirror; add a line MIRROR=ADDRESS to a copy of the file")
