"""The base of every section of a config or a site file: its types, and the rules between its fields."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from pipeline.errors import Problem
from pipeline.text_format import hidden_character

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
# A folder is called so, with what a temporary file adds to its name; file systems allow 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]


class FreeText:
    """Marks a field whose text may hold line breaks and other control characters: it is content, never a name."""


ANY_TEXT = FreeText()

Location = tuple[int | str, ...]
_Rule = TypeVar("_Rule", bound=Callable[..., Iterator[Problem]])


def rule(method: _Rule) -> _Rule:
    """Marks a method of a section as a rule between its fields.

    The method yields one `Problem` per violation, with a path relative to its section. Pydantic's own `model_validator`
    would not run while any field of the section is wrong, and would stop at the first violation.
    """
    method.__dict__["is_rule"] = True
    return method


class Section(BaseModel):
    """A part of a config or a site file; it is frozen and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @rule
    def _names_and_paths_hold_no_control_characters(self) -> Iterator[Problem]:
        # A line break in a path would become a line of a batch script.
        for name, info in type(self).model_fields.items():
            if ANY_TEXT in info.metadata:
                continue
            for path, text in _texts(self.__dict__.get(name), name):
                hidden = hidden_character(text)
                if hidden is not None:
                    yield wrong_value(path, text, f"text without control characters, which {hidden} is")


S = TypeVar("S", bound=Section)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields every text in a value with its dotted path; keys are text too, and sections look after themselves."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}.{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _texts(item, f"{path}.{key}")


def broken_rules(
    section: S, prefix: str = "", rules: Iterable[Callable[[S], Iterator[Problem]]] = ()
) -> Iterator[Problem]:
    """Yields every violation of a rule in a section and in the sections inside it.

    Args:
        section: A valid section, or what `usable_part` returns: a rule that reads an unusable field is skipped.
        prefix: Put before each path, for example `data.`.
        rules: Further rules of this section.
    """
    for method in (*_rules_of(type(section)), *rules):
        with contextlib.suppress(AttributeError):
            yield from (Problem(prefix + found.path, found.message) for found in method(section))
    for name in type(section).model_fields:
        value = section.__dict__.get(name)
        if isinstance(value, Section):
            yield from broken_rules(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from broken_rules(item, f"{prefix}{name}.{index}.")


def _rules_of(model: type[Section]) -> list[Callable[..., Iterator[Problem]]]:
    methods = [method for base in model.__mro__ for method in vars(base).values()]
    return [method for method in methods if isinstance(method, FunctionType) and "is_rule" in method.__dict__]


class _UnusableError(Exception):
    """A value is wrong, or holds a wrong part without which the rest means nothing."""


def usable_part(model: type[S], tree: dict[str, Any], flawed: Sequence[Location]) -> S:
    """Returns a section without its unusable fields; reading one of those raises AttributeError.

    Args:
        model: The class of the section.
        tree: The section as it was given.
        flawed: Where pydantic found values that are wrong or missing, relative to the section.
    """
    section = model.model_construct()
    below = _by_key(flawed)
    for name, info in model.model_fields.items():
        inside = below.get(name, [])
        if name in tree or inside:
            try:
                section.__dict__[name] = _usable_value(section_of(info), tree.get(name), inside)
            except _UnusableError:
                section.__dict__.pop(name, None)
    return section


def _usable_value(model: type[Section] | None, value: Any, flawed: list[Location]) -> Any:
    if () in flawed:
        raise _UnusableError
    below = _by_key(flawed)
    if isinstance(value, dict):
        if model is not None:
            return usable_part(model, value, flawed)
        return {key: item for key, item in value.items() if key not in below}
    if isinstance(value, list):
        return [_usable_value(model, item, below.get(index, [])) for index, item in enumerate(value)]
    if flawed:
        raise _UnusableError
    return value


def _by_key(locations: Sequence[Location]) -> dict[int | str, list[Location]]:
    found: dict[int | str, list[Location]] = {}
    for location in locations:
        if location:
            found.setdefault(location[0], []).append(location[1:])
    return found


def section_of(info: FieldInfo) -> type[Section] | None:
    """Returns the class of the section, or of the list of sections, that a field holds; None for a plain value."""
    for part in (info.annotation, *get_args(info.annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def descriptions(section: type[Section]) -> dict[str, str]:
    """Returns what each field means: the text below it in the source, none where the program has no source with it.

    Pydantic can read it while it makes a class (`use_attribute_docstrings`), which took two fifths of the time that
    importing the sections takes every command.
    """
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            texts.update(_texts_below_fields(base))
    return texts | {name: info.description for name, info in section.model_fields.items() if info.description}


def _texts_below_fields(section: type[Section]) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(section)
    except OSError:
        return
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in itertools.pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                yield name, inspect.cleandoc(text)


def wrong_value(path: str, value: Any, allowed: str) -> Problem:
    """Returns the problem of a given value, of which at most 60 characters are shown."""
    return Problem(path, f"given {cut(json.dumps(value, ensure_ascii=False, default=str))}, allowed: {allowed}")


def cut(text: str, most: int = 60) -> str:
    """Returns at most the given number of characters of a text."""
    return text if len(text) <= most else text[: most - 3] + "..."
