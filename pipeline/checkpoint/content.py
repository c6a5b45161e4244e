"""What a manifest.json of any origin must hold before any of it is used: types, names, sizes and exact coverage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, Strict, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.config.messages.values import first_problem
from pipeline.run.records import Origin

_Int = Annotated[int, Strict(), Field(ge=0, le=1 << 53)]
_FileName = Annotated[str, Strict(), StringConstraints(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]
_Name = Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,499}$")]
_Hex = Annotated[str, Strict(), StringConstraints(pattern=r"^([0-9a-f]{2})*$", max_length=1 << 16)]
_Float = Annotated[float, Strict()]


class _File(TypedDict):
    bytes: _Int
    sha256: Annotated[str, Strict(), StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Parameter(TypedDict):
    shape: Annotated[list[_Int], Field(max_length=16)]
    dtype: Annotated[str, Strict(), StringConstraints(pattern=r"^[a-z0-9_]{1,20}$")]
    fragments: list[tuple[_FileName, _Int, _Int]]


class _Guard(TypedDict, total=False):
    losses: list[_Float]
    skipped: list[_Int]
    bad_in_a_row: _Int
    bad_steps: _Int


class _SourceTokens(TypedDict):
    batches: _Int
    tokens: dict[Annotated[str, Strict()], _Int]


class _State(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    optimizer_steps: NotRequired[_Int]
    tokens_seen: NotRequired[_Int]
    source_tokens: NotRequired[_SourceTokens]
    guard: NotRequired[_Guard]
    val_loss: NotRequired[_Float | None]
    dataset: NotRequired[Annotated[str, Strict()]]
    rng: NotRequired[_Hex]
    initialization: NotRequired[_Int]
    init: NotRequired[Origin | None]
    config: NotRequired[dict[str, Any]]
    tokenizer: NotRequired[Annotated[str, Strict()]]
    mlflow_run_id: NotRequired[Annotated[str, Strict()] | None]


class _Content(TypedDict):
    step: _Int
    world_size: Annotated[_Int, Field(ge=1)]
    zero_stage: Annotated[_Int, Field(le=3)]
    files: dict[_FileName, _File]
    parameters: dict[_Name, _Parameter]
    state: _State


_CONTENT = TypeAdapter(Annotated[_Content, Field(strict=False)])


def problem(tree: Any) -> str | None:
    """Returns what is wrong with the content of a manifest, without its digest and version; None if nothing."""
    try:
        _CONTENT.validate_python(tree)
    except ValidationError as error:
        return first_problem(error)
    if tree.keys() != _Content.__annotations__.keys():
        return "it holds other keys"
    for name, parameter in tree["parameters"].items():
        gap = coverage_problem(parameter["shape"], ((start, length) for _, start, length in parameter["fragments"]))
        if gap is not None:
            return f"parameters.{name}: {gap}"
        if any(file not in tree["files"] for file, _, _ in parameter["fragments"]):
            return f"parameters.{name}: names a file that is not in `files`"
    return None


def coverage_problem(shape: Iterable[int], fragments: Iterable[tuple[int, int]]) -> str | None:
    """Returns where fragments `(start, length)` do not cover a parameter exactly once; None if they do.

    A gap would leave uninitialised memory in the weights; an overlap hides a gap from whoever only counts elements.
    """
    numel, end = math.prod(shape), 0
    for start, length in sorted(fragments):
        if start != end:
            return f"its fragments {'overlap' if start < end else 'leave a gap'} at element {min(start, end)}"
        end += length
    return None if end == numel else f"its fragments hold {end} of {numel} elements"
