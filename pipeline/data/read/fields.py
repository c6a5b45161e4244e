"""The fields of a record that a source asks for: its text, and those that its condition compares.

A dot in a name leads into a field. Where nothing is found there, the name as a whole is looked for, because flattened
tables have such names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.config.data_sections import SourceConfig
from pipeline.config.where import Comparison, Condition, Junction, Kind, Value, fields_of, is_true, kind_of, parse_where
from pipeline.data.read.documents import Flags

Columns = Mapping[str, Any]
"""Arrow arrays by the name of their field."""


class WrongKindError(Exception):
    """A field cannot be compared with the literals of the condition."""


class Filter:
    """The condition of a source: which of its records are kept."""

    def __init__(self, source: SourceConfig) -> None:
        self._condition = None if source.where is None else parse_where(source.where)
        self.fields: dict[str, Kind] = {} if self._condition is None else fields_of(self._condition)
        """The fields that it needs, and what each is compared with."""

    def __bool__(self) -> bool:
        return self._condition is not None

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Returns whether a record is kept.

        Raises:
            WrongKindError: A field holds something else than its literals.
        """
        if self._condition is None:
            return True
        values = {name: _comparable(find_field(record, name), name, kind) for name, kind in self.fields.items()}
        return is_true(self._condition, values) is True

    def kept(self, columns: Columns) -> Flags:
        """Returns which rows are kept; the columns have the types of `arrow_type`."""
        assert self._condition is not None
        return np.asarray(_evaluate(self._condition, columns).fill_null(False).to_numpy(zero_copy_only=False), np.bool_)


def find_field(record: Any, name: str) -> Any:
    """Returns the value of a field; None if it is missing or null."""
    inner = record
    for part in name.split("."):
        inner = inner.get(part) if isinstance(inner, dict) else None
    return inner if inner is not None else record.get(name)


def arrow_type(kind: Kind) -> Any:
    """Returns the Arrow type in which values of a kind are compared."""
    import pyarrow

    return {"text": pyarrow.string(), "a number": pyarrow.float64(), "true or false": pyarrow.bool_()}[kind]


def find_column(column: Callable[[str], Any], name: str, checked: Callable[[Any], Any] = lambda found: found) -> Any:
    """Returns the values of a field, null where they are missing; None if there is neither such a field nor a column.

    Args:
        column: Returns the column of a name, or None.
        name: Of the field.
        checked: Returns what was found, the field or the column, as it can be used.
    """
    import pyarrow.compute

    whole = column(name)
    first, *rest = name.split(".")
    inner = column(first) if rest else None
    for part in rest:
        if inner is None or not pyarrow.types.is_struct(inner.type) or inner.type.get_field_index(part) < 0:
            inner = None
            break
        inner = pyarrow.compute.struct_field(inner, [part])
    found = [checked(part) for part in (inner, whole) if part is not None]
    return pyarrow.compute.coalesce(*found) if len(found) == 2 else next(iter(found), None)


def json_schema(kinds: Mapping[str, Kind]) -> Any:
    """Returns the schema by which Arrow reads these fields of JSON; None if one of them would be inside another."""
    import pyarrow

    tree: dict[str, Any] = {}
    for name, kind in kinds.items():
        branch = tree
        *outer, last = name.split(".")
        for part in outer:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                return None
        if last in branch:
            return None
        branch[last] = arrow_type(kind)
        if outer:
            tree[name] = arrow_type(kind)
    return pyarrow.schema([(name, _struct(branch)) for name, branch in tree.items()])


def _struct(branch: Any) -> Any:
    import pyarrow

    if not isinstance(branch, dict):
        return branch
    return pyarrow.struct([(name, _struct(inner)) for name, inner in branch.items()])


def _comparable(value: Any, name: str, kind: Kind) -> Value | None:
    if value is None:
        return None
    if kind_of(value) != kind:
        raise WrongKindError(f"`where` compares {name!r} with {kind}, and here it is {value!r:.40}")
    try:
        return float(value) if kind == "a number" else value
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _evaluate(condition: Condition, columns: Columns) -> Any:
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(condition, Comparison):
        names = {"==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater"}
        literal = pyarrow.scalar(condition.value, columns[condition.field].type)
        return compute.call_function(names.get(condition.sign, "greater_equal"), [columns[condition.field], literal])
    if isinstance(condition, Junction):
        joined = _evaluate(condition.parts[0], columns)
        for part in condition.parts[1:]:
            join = compute.and_kleene if condition.word == "and" else compute.or_kleene
            joined = join(joined, _evaluate(part, columns))
        return joined
    return compute.invert(_evaluate(condition.part, columns))
