"""What a job must see inside its container: worked out from the paths in the config, never the whole home."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.errors import UsageError
from pipeline.image.record import IMAGE_HOME
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import Run

# Mounted from the host by Apptainer itself.
_ALWAYS_SEEN = (Path("/tmp"), Path("/var/tmp"))
_OF_THE_IMAGE = tuple(
    Path(p) for p in ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr", IMAGE_HOME)
)


@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is seen inside.

    Attributes:
        source: Absolute path on the host.
        target: Absolute path inside.
        writable: Whether the job may write there.
    """

    source: Path
    target: Path
    writable: bool = True

    def option(self) -> str:
        """As `--bind` takes it."""
        place = str(self.source) if self.source == self.target else f"{self.source}:{self.target}"
        return place if self.writable else f"{self.source}:{self.target}:ro"


@dataclass(frozen=True)
class _Need:
    """A path that something in the config makes necessary."""

    who: str
    path: Path
    writable: bool


def parse_bind(text: str, who: str) -> Bind:
    """Reads `HOST[:INSIDE[:ro]]`; HOST may begin with `~` and is otherwise relative to the working folder.

    Raises:
        UsageError: It is not of that form.
    """
    host, *rest = text.split(":")
    inside = rest[0] if rest else ""
    if not host or len(rest) > 2 or rest[1:] not in ([], ["ro"], ["rw"]) or (inside and not inside.startswith("/")):
        raise UsageError(f"{who}: given {text!r}, allowed: HOST[:INSIDE[:ro]], INSIDE being an absolute path")
    source = absolute(Path(host).expanduser())
    return Bind(source, Path(os.path.normpath(inside)) if inside else source, rest[1:] != ["ro"])


def binds(config: Config, site: SiteContainer, run: Run, code: Path | None, scratch: Path | None) -> list[Bind]:
    """All binds of a job, parents before what lies in them; folders that others show already are left out."""
    asked = _asked_for(config, site)
    needs = [need for need in _needs(config, run) if _refusal(need.path) is None]
    if scratch is not None:
        needs.append(_Need("scratch", absolute(scratch), True))
    found = list(asked)
    if _refusal(Path.cwd()) is None:
        found.append(Bind(Path.cwd(), Path.cwd()))
    for need in needs:
        # The name and what it stands for: a link inside a bound folder has to lead somewhere there too.
        for place in (need.path, Path(os.path.realpath(need.path))):
            if _refusal(place) is None and not _is_seen(place, found, need.writable):
                found.append(Bind(place, place, need.writable))
    if code is not None:
        found.append(Bind(absolute(code), absolute(code), writable=False))
    found.sort(key=lambda bind: (len(bind.target.parts), bind.target))
    return [b for i, b in enumerate(found) if b.target not in {other.target for other in found[:i]}]


def working_folder(found: list[Bind], run: Run) -> Path:
    """The folder a job works in: the one that it was submitted from, which relative paths of the config mean."""
    here = Path.cwd()
    if _is_seen(here, found, writable=False) or any(here in bind.target.parents for bind in found):
        return here
    return absolute(run.path)


def create_folders(config: Config, run: Run) -> None:
    """Makes the folders a job writes into, for Apptainer cannot bind what is not there.

    Raises:
        UsageError: One cannot be made.
    """
    for need in _needs(config, run):
        if not need.writable:
            continue
        try:
            need.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{need.who}: {need.path} cannot be made ({error.strerror})") from error


@contextlib.contextmanager
def folders_for_a_while(config: Config, run: Run) -> Iterator[None]:
    """The same for a look that is to leave nothing behind: what was made and is still empty goes again.

    Raises:
        UsageError: One cannot be made.
    """
    writable = [need.path for need in _needs(config, run) if need.writable]
    fresh = {place for path in writable for place in (path, *path.parents) if not place.exists()}
    try:
        create_folders(config, run)
        yield
    finally:
        for place in sorted(fresh, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # somebody has put something into it meanwhile
                place.rmdir()


def check_visible(config: Config, site: SiteContainer, run: Run) -> list[str]:
    """Paths of the config that a job in the container could not see or write to, each with its cure."""
    try:
        asked = _asked_for(config, site)
    except UsageError as error:
        return [str(error)]
    needs = list(_needs(config, run))
    problems = [
        f"{who}: {bind.source} does not exist" for who, bind in _named(config, site) if not bind.source.exists()
    ]
    for need in needs:
        if _is_seen(need.path, [bind for bind in asked if bind.writable or not need.writable], need.writable):
            continue
        refusal = _refusal(need.path) or _refusal(Path(os.path.realpath(need.path)))
        if refusal is not None:
            problems.append(f"{need.who}: {need.path} {refusal}")
        elif need.writable and not os.access(_nearest(need.path), os.W_OK):
            problems.append(f"{need.who}: {need.path} cannot be written; choose another folder")
    if not problems and config.container.code == "snapshot":  # it is bound where the run is seen without a bind too
        refusal = _refusal(absolute(run.code))
        problems += [f"runs_dir: {absolute(run.code)} {refusal}"] if refusal is not None else []
    if not problems:
        problems += _links_that_lead_out(config, binds(config, site, run, None, None))
    return problems


def _needs(config: Config, run: Run) -> Iterator[_Need]:
    yield _Need("runs_dir", absolute(run.path), True)
    yield _Need("data.path", absolute(Path(config.data.path)), not _is_shared_dataset(Path(config.data.path)))
    uri = config.tracking.uri
    if uri.startswith("sqlite:///"):
        # SQLite keeps its journal beside the file, so the folder is what has to be seen.
        yield _Need("tracking.uri", absolute(Path(uri.removeprefix("sqlite:///"))).parent, True)
        if "://" not in config.tracking.artifact_location:  # an object store's address is no path
            yield _Need("tracking.artifact_location", absolute(Path(config.tracking.artifact_location)), True)
    if config.tokenizer.path is not None:
        yield _Need("tokenizer.path", absolute(Path(config.tokenizer.path)).parent, False)
    for number, source in enumerate(config.data.sources):
        for pattern in source.paths:
            folder = _fixed_part(pattern)
            if folder is not None:
                yield _Need(f"data.sources.{number}.paths", folder, False)


def _is_shared_dataset(folder: Path) -> bool:
    """Whether it is prepared already, in a folder that is somebody else's: it is only read then.

    One's own stays writable, for a slice that is done again writes the manifest anew.
    """
    return (folder / MANIFEST).is_file() and not os.access(folder, os.W_OK)


def _fixed_part(pattern: str) -> Path | None:
    """The deepest folder of a glob without a wildcard; None where it is gone, as text may be that is prepared."""
    path = absolute(Path(pattern))
    while glob.has_magic(str(path)):
        path = path.parent
    return path if path.is_dir() else path.parent if path.exists() else None


def _named(config: Config, site: SiteContainer) -> list[tuple[str, Bind]]:
    given = (("container.binds", config.container.binds), ("site container.binds", site.binds))
    return [(who, parse_bind(text, who)) for who, texts in given for text in texts]


def _asked_for(config: Config, site: SiteContainer) -> list[Bind]:
    return [bind for _, bind in _named(config, site)]


def _refusal(path: Path) -> str | None:
    """Why a folder is not bound; None if it is."""
    home = Path.home()
    if any(path in (place, *place.parents) for place in (home, Path(os.path.realpath(home)))):
        return "is or holds the home folder, which jobs do not see as a whole; move it to a folder of its own"
    if any(path in (own, *own.parents) or own in path.parents for own in _OF_THE_IMAGE):
        return "would hide a part of the image; choose another folder"
    if any(mark in str(path) for mark in ",:\\"):
        return "has a comma, colon or backslash in its name, which Apptainer cannot bind; rename it"
    return None


def _is_seen(path: Path, found: list[Bind], writable: bool) -> bool:
    if any(place in (path, *path.parents) for place in _ALWAYS_SEEN):
        return True
    return any(b.target in (path, *path.parents) and (b.writable or not writable) for b in found)


def _links_that_lead_out(config: Config, found: list[Bind]) -> list[str]:
    """Input files that are links to places no bind shows; one message a place."""
    problems: dict[Path, str] = {}
    for number, source in enumerate(config.data.sources):
        names = [name for pattern in source.paths for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207 - a path may be absolute
        for file in names:
            real = Path(os.path.realpath(file))
            if not _is_seen(real, found, writable=False):
                problems.setdefault(
                    real.parent,
                    f"data.sources.{number}.paths: {file} is a link to {real}, which a job in the container does not "
                    f"see; add {real.parent} to container.binds",
                )
    return list(problems.values())


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def absolute(path: Path) -> Path:
    """The path from the root with its links left in: inside it has to have the name that the config gives it."""
    return Path(os.path.abspath(path))  # noqa: PTH100
