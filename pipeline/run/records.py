"""The JSON files of a run folder of any origin, checked before a value of them is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.config.messages.values import first_problem
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.text_format import printable

T = TypeVar("T")
_Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Image(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    path: str | None
    sha256: str | None


# `from` cannot be written as a field: it is a keyword.
Ancestor = TypedDict("Ancestor", {"from": str, "digest": str, "step": NotRequired[_Count], "what": NotRequired[str]})
"""What a run started from: a folder, the digest of its content and, of a checkpoint, its step and what was taken."""


class Origin(Ancestor):
    """What is recorded about what a run started from, in its provenance and its checkpoints."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    mlflow_run_id: NotRequired[str | None]
    """The MLflow run of a checkpoint, if it is in the same store."""
    differences: NotRequired[list[str]]
    """Where the config differs from that of the checkpoint."""
    ancestors: NotRequired[list[Ancestor]]
    """What that run started from, and so on; the oldest last."""


def lineage(origin: Origin | None) -> list[Ancestor]:
    """Returns what a run started from, what that started from, and so on; the nearest first."""
    if origin is None:
        return []
    nearest = {key: value for key, value in origin.items() if key in ("from", "digest", "step", "what")}
    return [cast(Ancestor, nearest), *origin.get("ancestors", [])]


def ancestry(origin: Origin | None) -> list[str]:
    """Returns the lineage, a line each."""
    return [_line(ancestor) for ancestor in lineage(origin)]


def _line(ancestor: Ancestor) -> str:
    taken = f"{ancestor.get('what', 'weights')} of step {ancestor['step']}, " if "step" in ancestor else ""
    return printable(f"{ancestor['from']} ({taken}digest {ancestor['digest'][:12]})")


class _Start(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    image: NotRequired[_Image | None]
    git: NotRequired[dict[str, Any] | None]
    init: NotRequired[Origin | None]


class _Provenance(TypedDict):
    starts: list[_Start]


class SourceEvaluation(TypedDict):
    """One source in evaluation.json."""

    loss: float
    bits_per_byte: float
    tokens: _Count


class Evaluation(TypedDict):
    """The content of evaluation.json."""

    step: _Count
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: _Count
    sources: NotRequired[dict[str, SourceEvaluation]]


PROVENANCE: TypeAdapter[Any] = TypeAdapter(_Provenance)
EVALUATION: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)


def read_checked(path: Path, inside: Path, form: TypeAdapter[T]) -> T:
    """Reads a JSON file of a run folder.

    Args:
        path: The file.
        inside: The run folder; no link may lead out of it.
        form: What the file must hold.

    Raises:
        PipelineError: It cannot be read, or holds something else; the message names it.
    """
    try:
        return form.validate_python(read_json(path, inside))
    except ValidationError as error:
        raise PipelineError(f"{path}: is damaged ({first_problem(error)}); restore it from a backup") from error
