"""Reads YAML of any origin into plain values: bounded in size and depth, and without tags that make objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.config.messages.yaml_syntax import NotAllowed

# A config with ten thousand paths has a third of each; PyYAML takes 0.1 ms for a value.
MOST_BYTES = 1 << 20
_MOST_VALUES = 30_000
# Of the values after every alias has been replaced by what it names.
_MOST_CHARACTERS = 2 << 20
_MOST_DEPTH = 50
_LONGEST_KEY = 200
_LARGEST_INT, _LARGEST_FLOAT = 2**63 - 1, 1e30

_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "yes", "on")
# `010` is text: YAML 1.1 reads it as 8, YAML 1.2 as 10. So is `1:30`, which 1.1 reads as 90.
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
# `1e-3` is a number: with YAML 1.1 a learning rate without a dot would be text.
_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_FLOAT = re.compile(
    rf"{_FLOAT_WITHOUT_DOT.pattern}|[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Composer(yaml.SafeLoader):
    """Composes the nodes of a document; it stops where they are too many, too deep, or contain themselves."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = self._characters = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _problem(event, f"the value &{event.anchor} contains itself")
            self._grow(*self._sizes[id(node)], event)
            return node
        values, characters = self._values, self._characters
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise _problem(event, f"values are nested more than {_MOST_DEPTH} deep")
        self._grow(1, len(getattr(event, "value", "")), event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if getattr(event, "anchor", None):
            self._sizes[id(node)] = self._values - values, self._characters - characters
        return node

    def _grow(self, values: int, characters: int, event: Any) -> None:
        self._values += values
        self._characters += characters
        if self._values > _MOST_VALUES or self._characters > _MOST_CHARACTERS:
            raise _problem(event, f"holds more than {_MOST_VALUES:,} values, or too much text behind aliases (*name)")


_Composer.yaml_implicit_resolvers = {}  # not those of YAML 1.1
for _tag, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(yes|no|true|false|on|off)$", re.IGNORECASE), list("yYnNtTfFoO")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    _Composer.add_implicit_resolver(_TAG + _tag, _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either this loader or one of YAML 1.1 would read as something else."""


_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT_WITHOUT_DOT, list("-+0123456789"))


def write_yaml(tree: Any) -> str:
    """Returns plain values as YAML that `read_yaml` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> Any:
    """Returns the values of a document: mappings with text as keys, lists, text, numbers, booleans and None.

    Raises:
        yaml.YAMLError: The text is no YAML, or holds something that is not allowed; with its place where it is known.
    """
    if len(text) > MOST_BYTES:
        raise NotAllowed(problem=f"the text has more than {MOST_BYTES:,} characters")
    try:
        composer = _Composer(text)
        node = composer.get_single_node()
    except (ValueError, OverflowError, RecursionError) as error:  # an escape like "\UFFFFFFFF"
        raise NotAllowed(problem="an escape names no character, or values are nested too deep") from error
    return None if node is None else _value(node)


def _value(node: yaml.Node) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(kind, node.value)
        except ValueError as error:
            raise _problem(node, str(error)) from error
    raise _problem(node, f"the tag {node.tag!r} is not allowed")


def _scalar(kind: str, text: str) -> Any:
    match kind:
        case "str":
            # JSON's way to write a character beyond U+FFFF is a pair of surrogates.
            return _joined(text) if _SURROGATE.search(text) else text
        case "null" if text in _NULLS:
            return None
        case "bool" if text.lower() in (*_TRUE, "false", "no", "off"):
            return text.lower() in _TRUE
        case "int" if _INT.match(text):
            return _within(_integer(text.replace("_", "")), _LARGEST_INT)
        case "float" if _FLOAT.match(text):
            return _within(_real(text.replace("_", "").lower()), _LARGEST_FLOAT)
    raise ValueError(f"a value with the tag {kind!r} is not allowed here")


def _joined(text: str) -> str:
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise ValueError("the text holds half of a surrogate pair") from error


def _integer(text: str) -> int:
    if len(text) > 80:
        raise ValueError("the number is out of range")
    base = {"0x": 16, "0b": 2}.get(text.lstrip("+-")[:2].lower(), 10)
    return int(text, base)


def _real(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _within(value: Any, largest: float) -> Any:
    if abs(value) > largest and abs(value) != float("inf"):
        raise ValueError("the number is out of range")
    return value


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _TAG + "merge":
            for part in _merged(value_node):
                merged = {**part, **merged}
            continue
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_TAG) not in (
            "str", "bool", "int", "float", "null",
        ):  # fmt: skip
            raise _problem(key_node, "a key must be a name")
        key = _key(key_node)
        if key in found:
            raise _problem(key_node, f"the key {key!r} is given twice")
        found[key] = _value(value_node)
    return {**merged, **found}


def _key(node: yaml.ScalarNode) -> str:
    if len(node.value) > _LONGEST_KEY:
        raise _problem(node, f"a key has more than {_LONGEST_KEY} characters")
    try:
        return str(_scalar("str", node.value))  # as it is written: `on` is a name here
    except ValueError as error:
        raise _problem(node, str(error)) from error


def _merged(node: yaml.Node) -> Iterator[dict[str, Any]]:
    for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(part, yaml.MappingNode):
            raise _problem(part, "only sections can be merged with <<")
        yield _mapping(part)


def _problem(place: Any, message: str) -> NotAllowed:
    return NotAllowed(problem=message, problem_mark=place.start_mark)
