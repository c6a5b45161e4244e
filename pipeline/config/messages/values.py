"""What a value should have been, in place of pydantic's words for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.text_format import printable

_FORMS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$": "up to 200 letters, digits, `.`, `_` and `-`, the first a letter or digit",
    r"^[0-9a-f]{64}$": "64 hexadecimal digits",
}
_SECTION = "lines of `key: value`, indented below it"
_NUMBER = re.compile(r"[-+]?[0-9_.]+([eE][-+]?[0-9]+)?")
_BRANCHES = ("str", "bool", "int", "float")
_OTHER = "another value; docs/config.md and docs/sites.md describe each key"

_Words = Callable[[Any, Mapping[str, Any]], str]


def _list(given: Any, limits: Mapping[str, Any]) -> str:
    return f'a list, for example ["{given[:40]}"]' if isinstance(given, str) else "a list, for example [first, second]"


def _whole(given: Any, limits: Mapping[str, Any]) -> str:
    return "a whole number" + _unquoted(given)


def _number(given: Any, limits: Mapping[str, Any]) -> str:
    return "a number" + _unquoted(given)


def _unquoted(given: Any) -> str:
    return " without quotes" if isinstance(given, str) and _NUMBER.fullmatch(given) else ""


def _choice(given: Any, limits: Mapping[str, Any]) -> str:
    return str(limits["expected"]).replace("'", "")


def _entries(bound: str, key: str) -> _Words:
    return lambda given, limits: f"{bound} {limits[key]} {'entry' if limits[key] == 1 else 'entries'}"


def _characters(bound: str, key: str) -> _Words:
    return lambda given, limits: f"{bound} {limits[key]} character{'' if limits[key] == 1 else 's'}"


def _limit(words: str, key: str) -> _Words:
    return lambda given, limits: words.format(f"{limits[key]:,.6f}".rstrip("0").rstrip("."))


def _fixed(words: str) -> _Words:
    return lambda given, limits: words


WORDS: dict[str, _Words] = {
    "bool_parsing": _fixed("true or false"),
    "bool_type": _fixed("true or false"),
    "dict_type": _fixed(_SECTION),
    "extra_forbidden": _fixed("nothing: the key is unknown"),
    "finite_number": _fixed("a finite number"),
    "float_parsing": _number,
    "float_type": _number,
    "greater_than": _limit("more than {}", "gt"),
    "greater_than_equal": _limit("{} or more", "ge"),
    "int_from_float": _whole,
    "int_parsing": _whole,
    "int_parsing_size": _whole,
    "int_type": _whole,
    "less_than": _limit("less than {}", "lt"),
    "less_than_equal": _limit("{} or less", "le"),
    "list_type": _list,
    "literal_error": _choice,
    "missing": _fixed("a value: it is missing"),
    "model_attributes_type": _fixed(_SECTION),
    "model_type": _fixed(_SECTION),
    "string_pattern_mismatch": lambda given, limits: _FORMS.get(limits["pattern"], "text of another form"),
    "string_too_long": _characters("at most", "max_length"),
    "string_too_short": _characters("at least", "min_length"),
    "string_type": lambda given, limits: "text" + (" in quotes" if isinstance(given, int | float) else ""),
    "too_long": _entries("at most", "max_length"),
    "too_short": _entries("at least", "min_length"),
    "tuple_type": _list,
}


def allowed(error: ErrorDetails) -> str:
    """Returns what could stand in place of a value that pydantic refuses."""
    words = WORDS.get(error["type"], _fixed(_OTHER))
    return words(error["input"], error.get("ctx", {}))


@dataclass(frozen=True)
class Refused:
    """One value that pydantic refuses."""

    place: tuple[int | str, ...]
    given: Any
    allowed: str
    kind: str
    """Pydantic's name of the error."""


def refused(errors: Sequence[ErrorDetails]) -> Iterator[Refused]:
    """Yields each refused value once.

    Pydantic reports a value of several types once for each of them, at a place below it that is called `str` or `bool`,
    and the name of an entry at a place below that is called `[key]`.
    """
    of_several_types: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for error in errors:
        if error["loc"] and error["loc"][-1] in _BRANCHES:
            of_several_types.setdefault(error["loc"][:-1], []).append(error)
    for error in errors:
        place, words = error["loc"], allowed(error)
        group = of_several_types.get(place[:-1], []) if place else []
        if len(group) > 1 and error in group:
            if error is not group[0]:
                continue
            place, words = place[:-1], " or ".join(map(allowed, group))
        elif place[-1:] == ("[key]",):
            place = place[:-2]
        yield Refused(place, error["input"], words, error["type"])


def first_problem(error: ValidationError) -> str:
    """Returns the place of the first thing that is wrong with a file that a program wrote, and what it should be."""
    first = next(refused(error.errors(include_url=False)))
    place = ".".join(map(str, first.place))[:200]
    if first.kind == "missing":
        return printable(f"{place} is missing")
    return printable(f"{place or 'the whole'} should be {first.allowed}")
