"""The folders a job sees in its container: derived from the paths in the config, never the whole home."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.init_section import InitConfig
from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.errors import UsageError
from pipeline.files import is_regular, naming, nearest_existing
from pipeline.image.record import IMAGE_HOME
from pipeline.launch.site import SiteContainer
from pipeline.run.evaluations import data_cache
from pipeline.run.folder import CHECKPOINT_MANIFEST, Run

# Apptainer itself mounts these from the host.
_ALWAYS_VISIBLE = (Path("/tmp"), Path("/var/tmp"))
_IMAGE_FOLDERS = tuple(
    Path(p) for p in ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr", IMAGE_HOME)
)


@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is visible inside the container."""

    source: Path
    """Absolute path on the host."""
    target: Path
    """Absolute path inside."""
    writable: bool = True
    """Whether the job may write there."""

    def option(self) -> str:
        """Returns the argument of `--bind`."""
        place = str(self.source) if self.source == self.target else f"{self.source}:{self.target}"
        return place if self.writable else f"{self.source}:{self.target}:ro"


@dataclass(frozen=True)
class _Need:
    """A path that the config makes a job use."""

    key: str
    """The config key that names it."""
    path: Path
    writable: bool


def parse_bind(text: str, key: str) -> Bind:
    """Parses `HOST[:INSIDE[:ro]]`; HOST may begin with `~` and is otherwise relative to the working folder.

    Raises:
        UsageError: The text has another form.
    """
    host, *rest = text.split(":")
    inside = rest[0] if rest else ""
    if not host or len(rest) > 2 or rest[1:] not in ([], ["ro"], ["rw"]) or (inside and not inside.startswith("/")):
        raise UsageError(f"{key}: given {text!r}, allowed: HOST[:INSIDE[:ro]], where INSIDE is an absolute path")
    source = absolute(Path(host).expanduser())
    return Bind(source, Path(os.path.normpath(inside)) if inside else source, rest[1:] != ["ro"])


def binds(config: Config, site: SiteContainer, run: Run, code: Path | None, scratch: Path | None) -> list[Bind]:
    """Returns all binds of a job, parent folders first, without those that another bind makes visible."""
    needs = [need for need in _needs(config, run) if _refusal(need.path) is None]
    if scratch is not None:
        needs.append(_Need("scratch", absolute(scratch), True))
    found = [bind for _, bind in _configured(config, site)]
    if _refusal(Path.cwd()) is None:
        found.append(Bind(Path.cwd(), Path.cwd()))
    for need in needs:
        # Both the link and its target: a link inside a bound folder must not dangle there.
        for place in (need.path, Path(os.path.realpath(need.path))):
            if _refusal(place) is None and not _is_visible(place, found, need.writable):
                found.append(Bind(place, place, need.writable))
    if code is not None:
        found.append(Bind(absolute(code), absolute(code), writable=False))
    found.sort(key=lambda bind: (len(bind.target.parts), bind.target))
    return [b for i, b in enumerate(found) if b.target not in {other.target for other in found[:i]}]


def working_folder(found: list[Bind], run: Run) -> Path:
    """Returns the folder a job works in: the one it was submitted from, to which paths in the config are relative."""
    here = Path.cwd()
    if _is_visible(here, found, writable=False) or any(here in bind.target.parents for bind in found):
        return here
    return absolute(run.path)


def create_folders(config: Config, run: Run) -> None:
    """Creates the folders a job writes to, since Apptainer cannot bind a folder that does not exist.

    Raises:
        UsageError: A folder cannot be created.
    """
    for need in _needs(config, run):
        if need.writable:
            with naming(need.key, f"{need.path} cannot be created", error=UsageError):
                need.path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def temporary_folders(config: Config, run: Run) -> Iterator[None]:
    """Creates the folders a job writes to, and removes those that are new and still empty at the end of the block.

    Raises:
        UsageError: A folder cannot be created.
    """
    writable = [need.path for need in _needs(config, run) if need.writable]
    fresh = {place for path in writable for place in (path, *path.parents) if not place.exists()}
    try:
        create_folders(config, run)
        yield
    finally:
        for place in sorted(fresh, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # another process has written to it
                place.rmdir()


def check_visible(config: Config, site: SiteContainer, run: Run) -> list[str]:
    """Returns one problem, with its cure, per path of the config that a job could not see or write to."""
    try:
        configured = _configured(config, site)
    except UsageError as error:
        return [str(error)]
    problems = [f"{key}: {bind.source} does not exist" for key, bind in configured if not bind.source.exists()]
    for need in _needs(config, run):
        if _is_visible(need.path, [bind for _, bind in configured], need.writable):
            continue
        refusal = _refusal(need.path) or _refusal(Path(os.path.realpath(need.path)))
        if refusal is not None:
            problems.append(f"{need.key}: {need.path} {refusal}")
        elif need.writable and not os.access(nearest_existing(need.path), os.W_OK):
            problems.append(f"{need.key}: {need.path} cannot be written; choose another folder")
    if not problems and config.container.code == "snapshot":  # bound even where the run folder needs no bind
        refusal = _refusal(absolute(run.code))
        problems += [f"runs_dir: {absolute(run.code)} {refusal}"] if refusal is not None else []
    if not problems:
        problems += _dangling_links(config, binds(config, site, run, None, None))
    return problems


def _needs(config: Config, run: Run) -> Iterator[_Need]:
    yield _Need("runs_dir", absolute(run.path), True)
    yield _Need("data.path", absolute(Path(config.data.path)), not _is_shared_dataset(Path(config.data.path)))
    uri = config.tracking.uri
    if uri.startswith("sqlite:///"):
        # SQLite keeps its journal beside the file, so the job needs the folder.
        yield _Need("tracking.uri", absolute(Path(uri.removeprefix("sqlite:///"))).parent, True)
        if "://" not in config.tracking.artifact_location:  # the address of an object store is no path
            yield _Need("tracking.artifact_location", absolute(Path(config.tracking.artifact_location)), True)
    origin = config.init.folder
    if origin is not None and os.access(origin, os.F_OK):  # once it has saved, a run needs it no more
        yield _origin_need(config.init, absolute(origin))
    if config.evaluate.tasks:
        yield _Need("evaluate.tasks (HF_HOME)", absolute(data_cache()), True)  # locks are files there
    if config.evaluate.include_path is not None:
        yield _Need("evaluate.include_path", absolute(Path(config.evaluate.include_path)), False)
    if config.tokenizer.path is not None:
        yield _Need("tokenizer.path", absolute(Path(config.tokenizer.path)).parent, False)
    if config.data.token_folder is not None:
        yield _Need("data.token_folder", absolute(Path(config.data.token_folder)), False)
    for number, source in enumerate(config.data.sources):
        for pattern in source.paths:
            folder = _fixed_part(pattern)
            if folder is not None:
                yield _Need(f"data.sources.{number}.paths", folder, False)


def _origin_need(init: InitConfig, folder: Path) -> _Need:
    """Returns what a job needs of a model folder, or of another run, in which it leaves a pin if it may."""
    if init.is_model_folder:
        return _Need("init.from", folder, False)
    place = folder.parent if is_regular(folder / CHECKPOINT_MANIFEST) else folder
    return _Need("init.from", place, os.access(place, os.W_OK))


def _is_shared_dataset(folder: Path) -> bool:
    """Tells whether this is a finished dataset in a folder of another user, which is bound for reading only.

    A user's own dataset stays writable: preparing a slice again rewrites its manifest.
    """
    return (folder / MANIFEST).is_file() and not os.access(folder, os.W_OK)


def _fixed_part(pattern: str) -> Path | None:
    """Returns the deepest folder of a glob without a wildcard; None if it is gone, as text may be after preparation."""
    path = absolute(Path(pattern))
    while glob.has_magic(str(path)):
        path = path.parent
    return path if path.is_dir() else path.parent if path.exists() else None


def _configured(config: Config, site: SiteContainer) -> list[tuple[str, Bind]]:
    """Returns the binds that the config and the site list, each with its key."""
    given = (("container.binds", config.container.binds), ("site container.binds", site.binds))
    return [(key, parse_bind(text, key)) for key, texts in given for text in texts]


def _refusal(path: Path) -> str | None:
    """Returns why a folder is not bound; None if it may be."""
    home = Path.home()
    if any(path in (place, *place.parents) for place in (home, Path(os.path.realpath(home)))):
        return "is or holds the home folder, which jobs do not see as a whole; move it to a folder of its own"
    if any(path in (own, *own.parents) or own in path.parents for own in _IMAGE_FOLDERS):
        return "would hide part of the image; choose another folder"
    if any(mark in str(path) for mark in ",:\\"):
        return "has a comma, colon or backslash in its name, which Apptainer cannot bind; rename it"
    return None


def _is_visible(path: Path, found: list[Bind], writable: bool) -> bool:
    if any(place in (path, *path.parents) for place in _ALWAYS_VISIBLE):
        return True
    return any(b.target in (path, *path.parents) and (b.writable or not writable) for b in found)


def _dangling_links(config: Config, found: list[Bind]) -> list[str]:
    """Returns one problem per folder outside every bind to which an input file is a link."""
    problems: dict[Path, str] = {}
    for number, source in enumerate(config.data.sources):
        names = [name for pattern in source.paths for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207 - a path may be absolute
        for file in names:
            real = Path(os.path.realpath(file))
            if not _is_visible(real, found, writable=False):
                problems.setdefault(
                    real.parent,
                    f"data.sources.{number}.paths: {file} is a link to {real}, which a job in the container does not "
                    f"see; add {real.parent} to container.binds",
                )
    return list(problems.values())


def absolute(path: Path) -> Path:
    """Returns the absolute path without resolving links: inside it must have the name that the config gives it."""
    return Path(os.path.abspath(path))  # noqa: PTH100
