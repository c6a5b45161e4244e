"""Errors that a user can act on; the command line prints them as one message, without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 85

STORAGE_FAILS = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM,
})  # fmt: skip
"""What a system says that does not answer now; the file may be whole, and nobody has made a mistake."""


class PipelineError(Exception):
    """The work failed for a reason the message names, together with its place and its cure."""

    exit_code = EXIT_FAILED


class UsageError(PipelineError):
    """The command line or the configuration is wrong; nothing has been started."""

    exit_code = EXIT_USAGE


class PackageMissing(UsageError):
    """A package that the command needs is not installed here, as on a login node without the extra `train`.

    Args:
        package: Its name.
        extra: The extra of this project that brings it.
    """

    def __init__(self, package: str, extra: str = "train") -> None:
        super().__init__(
            f"{package} is not installed here, and this command needs it: install the extra `{extra}` in the checkout "
            f"(pip install '.[{extra}]'), or run the command in the image (apptainer run IMAGE.sif COMMAND ...)"
        )


class DataError(PipelineError):
    """Text, token shards or a tokenizer are missing, damaged or not what the config expects."""


class CheckpointError(PipelineError):
    """A checkpoint cannot be written, or none that can be trusted is there to be read."""


class StopRequested(PipelineError):
    """Training stopped on request with everything saved; the launcher requeues on this status."""

    exit_code = EXIT_STOPPED


class NothingToDo(PipelineError):
    """What the command would do is done already; nothing was recorded."""

    exit_code = EXIT_OK


def listing(title: str, items: Iterable[object], cure: str = "") -> str:
    """Returns a message of several lines: the title, one indented line per item, and what to change."""
    return "\n".join([title, *(f"  {item}" for item in items), *([cure] if cure else [])])


def refuse(problems: Sequence[PipelineError]) -> None:
    """Ends a command that has done all it could, if some of what it was given was wrong.

    Raises:
        PipelineError: There are problems; a UsageError if all of them are the user's.
    """
    if problems:
        kind = UsageError if all(isinstance(problem, UsageError) for problem in problems) else PipelineError
        raise kind("\n  ".join(map(str, problems)))


def in_words(error: BaseException) -> str:
    """Returns an error as a sentence: the place and the reason of an OSError, without its number."""
    if not isinstance(error, OSError):
        return str(error)
    place = f"{str(error.filename)[:200]}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config or a site file."""

    path: str
    """Dotted path of the value, for example `train.batch_size`; empty for the whole file."""
    message: str
    """What was given, what is allowed and, where it can be guessed, what was meant."""

    def __str__(self) -> str:
        return f"{self.path or '(file)'}: {self.message}"


class ConfigError(UsageError):
    """Everything that is wrong with a config or a site file, reported at once."""

    def __init__(self, source: str, problems: list[Problem], kind: str = "config") -> None:
        self.source = source
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(listing(f"{source}: {count} in the {kind}", problems))
