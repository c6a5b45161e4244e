"""The condition of a source, `where`: fields compared with literals, joined by `and`, `or` and `not`.

Python's parser reads the text, and nothing but comparisons is taken from its tree. Values that are missing make a
comparison neither true nor false, as in SQL: a record is kept where the whole condition is true.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "a number", "true or false"]
Value = str | float | bool

MOST_CHARACTERS = 1000
_MOST_LEVELS = 20

OPERATORS: dict[str, Callable[[Value, Value], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_TURNED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_FORM = "comparisons of a field with a text, a number, True or False, joined by and, or, not"


@dataclass(frozen=True)
class Comparison:
    """One field against one literal."""

    field: str
    """Its name; a dot leads into a field."""
    sign: str
    """One of `OPERATORS`."""
    value: Value
    """Numbers are float64."""

    def __str__(self) -> str:
        return f"{self.field} {self.sign} {self.value!r}"


@dataclass(frozen=True)
class Junction:
    """Conditions joined by one word."""

    word: Literal["and", "or"]
    parts: tuple[Condition, ...]

    def __str__(self) -> str:
        return f" {self.word} ".join(f"({part})" for part in self.parts)


@dataclass(frozen=True)
class Negation:
    """The opposite of a condition."""

    part: Condition

    def __str__(self) -> str:
        return f"not ({self.part})"


Condition = Comparison | Junction | Negation


def parse_where(text: str) -> Condition:
    """Returns the condition that a text describes; `str` of it is the same for every way to write it.

    Raises:
        ValueError: It is no such text, is too long or too deep, or compares one field with two kinds of literals.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's advice about backslashes is for Python
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is not made of {_FORM} ({getattr(error, 'msg', None) or error})") from error
    condition = _condition(tree, 1)
    fields_of(condition)
    return condition


def fields_of(condition: Condition) -> dict[str, Kind]:
    """Returns the fields of a condition and what they are compared with.

    Raises:
        ValueError: One field is compared with two kinds of literals.
    """
    found: dict[str, Kind] = {}
    for comparison in _comparisons(condition):
        kind = kind_of(comparison.value)
        assert kind is not None
        if found.setdefault(comparison.field, kind) != kind:
            raise ValueError(f"{comparison.field} is compared with {found[comparison.field]} and with {kind}")
    return found


def kind_of(value: object) -> Kind | None:
    """Returns the kind of a value, by which it can be compared; None if it cannot be."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "text" if isinstance(value, str) else None


def is_true(condition: Condition, values: Mapping[str, Value | None]) -> bool | None:
    """Returns whether a condition is true of a record; None where that depends on a missing value.

    Args:
        condition: The condition.
        values: The value of each of its fields, of the right kind; None for a missing one.
    """
    if isinstance(condition, Comparison):
        value = values[condition.field]
        return None if value is None else OPERATORS[condition.sign](value, condition.value)
    if isinstance(condition, Negation):
        found = is_true(condition.part, values)
        return None if found is None else not found
    decides = condition.word == "or"
    parts = [is_true(part, values) for part in condition.parts]
    if decides in parts:
        return decides
    return None if None in parts else not decides


def _comparisons(condition: Condition) -> list[Comparison]:
    if isinstance(condition, Comparison):
        return [condition]
    parts = (condition.part,) if isinstance(condition, Negation) else condition.parts
    return [comparison for part in parts for comparison in _comparisons(part)]


def _condition(node: ast.expr, level: int) -> Condition:
    if level > _MOST_LEVELS:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
    if isinstance(node, ast.BoolOp):
        parts = tuple(_condition(value, level + 1) for value in node.values)
        return Junction("and" if isinstance(node.op, ast.And) else "or", parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return Negation(_condition(node.operand, level + 1))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return _joined("and", [_comparison(a, sign, b) for a, sign, b in zip(sides, node.ops, sides[1:], strict=False)])
    raise ValueError(f"{_shown(node)} is none of the {_FORM}")


def _joined(word: Literal["and", "or"], parts: list[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else Junction(word, tuple(parts))


def _comparison(left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Condition:
    if isinstance(sign, (ast.In, ast.NotIn)) and isinstance(right, (ast.Tuple, ast.List)) and right.elts:
        one_of = _joined("or", [_comparison(left, ast.Eq(), value) for value in right.elts])
        return one_of if isinstance(sign, ast.In) else Negation(one_of)
    name = _SIGNS.get(type(sign))
    fields, literals = (_field(left), _field(right)), (_literal(left), _literal(right))
    if name is None or (fields[0] is None) == (fields[1] is None) or literals == (None, None):
        raise ValueError(f"{_shown(left)} and {_shown(right)}: compare one field with one literal, by {_signs()}")
    if fields[0] is None:
        name, fields, literals = _TURNED[name], fields[::-1], literals[::-1]
    assert fields[0] is not None and literals[1] is not None
    if isinstance(literals[1], bool) and name not in ("==", "!="):
        raise ValueError(f"{fields[0]} {name} {literals[1]}: True and False have no order")
    return Comparison(fields[0], name, literals[1])


def _field(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        outer = _field(node.value)
        return None if outer is None else f"{outer}.{node.attr}"
    return None


def _literal(node: ast.expr) -> Value | None:
    minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and minus else node
    value = constant.value if isinstance(constant, ast.Constant) else None
    if isinstance(value, bool):
        return None if minus else value
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{_shown(node)} has half of a surrogate pair, which no text has")
        return None if minus else value
    return _number(-value if minus else value) if isinstance(value, (int, float)) else None


def _number(value: int | float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a number in it is beyond those of float64")
    return number


def _signs() -> str:
    return ", ".join([*OPERATORS, "in (...)", "not in (...)"])


def _shown(node: ast.expr) -> str:
    try:
        text = ast.unparse(node)
    except RecursionError:
        return "a part that is nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."
