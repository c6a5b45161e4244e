"""The JSON files of a run folder of any origin, checked before a value of them is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.text_format import printable

T = TypeVar("T")
_Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Image(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    path: str | None
    sha256: str | None


class _Start(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    image: NotRequired[_Image | None]
    git: NotRequired[dict[str, Any] | None]


class _Provenance(TypedDict):
    starts: list[_Start]


class Evaluation(TypedDict):
    """The content of evaluation.json."""

    step: _Count
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: _Count


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


def first_problem(error: ValidationError) -> str:
    """Returns the place and the words of the first thing that pydantic found wrong."""
    found = error.errors(include_url=False, include_input=False)[0]
    return printable(": ".join(filter(None, [".".join(map(str, found["loc"]))[:200], found["msg"]])))
