"""YAML and dotted overrides -> a validated tree of sections, or everything that is wrong with it.

This module knows no key: `config/sections.py` and `launch/site.py` hold the vocabularies.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.messages.foreign_keys import answer
from pipeline.config.messages.values import Refused, refused
from pipeline.config.messages.yaml_syntax import syntax_problem
from pipeline.config.section_base import (
    S,
    Section,
    broken_rules,
    cut,
    descriptions,
    section_of,
    usable_part,
    wrong_value,
)
from pipeline.config.yaml_loader import MOST_BYTES, read_yaml, write_yaml
from pipeline.errors import ConfigError, Problem, UsageError
from pipeline.files import naming, read_bounded
from pipeline.text_format import located

# A file of another kind has a problem in every line.
_MOST_PROBLEMS = 50
_MOST_KEYS = 20
_KINDS = {list: "a list", int: "a number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Vocabulary(Generic[S]):
    """The keys and values that one kind of file may hold."""

    model: type[S]
    """The outermost section."""
    kind: str
    """What messages call the content."""
    example: str
    """A file to start from."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """What to write in place of keys of other programs."""

    def read(self, path: str | Path, inside: Path | None = None) -> str:
        """Returns the text of a file; `inside` is the folder that was received with it.

        Raises:
            UsageError: It cannot be read.
        """
        try:
            with naming(located(path), f"the {self.kind} file cannot be read", error=UsageError):
                return read_bounded(path, inside, MOST_BYTES).decode()
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start}"
            raise UsageError(f"{path}: the {self.kind} file is not UTF-8 text ({where})") from error

    def parse(
        self,
        text: str,
        source: str,
        overrides: Sequence[str] = (),
        rules: Sequence[Callable[[S], Iterator[Problem]]] = (),
    ) -> S:
        """Returns the validated tree.

        Args:
            text: The YAML text.
            source: Names the text in messages.
            overrides: `dotted.key=value` strings; values are parsed as YAML.
            rules: Rules that need more than the tree; like those of a section they skip unusable fields.

        Raises:
            ConfigError: Everything that is wrong with the text and the overrides: unusable fields at any depth, and
                violations of the rules between the fields that are usable.
        """
        given = self._parse_yaml(text, source)
        problems = [problem for override in overrides if (problem := _apply_override(given, override))]
        document = json.dumps(given)
        try:
            # Strict JSON mode rejects "3", 3.0 and true as integers, while lists still become tuples.
            tree = self.model.model_validate_json(document, strict=True)
        except ValidationError as invalid:
            errors = [error for error in invalid.errors() if not _only_counts_valid_items(error)]
            problems += self._in_words(errors[:_MOST_PROBLEMS])
            tree = usable_part(self.model, json.loads(document), [error["loc"] for error in errors])
        named = {problem.path for problem in problems}
        problems += [problem for problem in broken_rules(tree, rules=rules) if problem.path not in named]
        if problems:
            raise ConfigError(source, problems[:_MOST_PROBLEMS], self.kind)
        return tree

    def json_schema(self) -> dict[str, Any]:
        """Returns the JSON schema with which editors complete and check the YAML."""
        schema = self.model.model_json_schema()
        inner = {found for _, info in known_fields(self.model) if (found := section_of(info)) is not None}
        sections: list[type[Section]] = [self.model, *inner]
        for section in sections:
            properties = (schema if section is self.model else schema["$defs"][section.__name__])["properties"]
            for name, text in descriptions(section).items():
                properties[name] = dict(sorted({**properties[name], "description": text}.items()))
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def _parse_yaml(self, text: str, source: str) -> dict[str, Any]:
        try:
            tree = read_yaml(text)
        except yaml.YAMLError as error:
            message = "bad YAML, " + ": ".join(filter(None, syntax_problem(error, text)))
        else:
            if isinstance(tree, dict):
                return tree
            message = f"holds {_KINDS.get(type(tree), 'text')}, allowed: sections of `key: value`"
            if tree is None:
                message = f"the file is empty; start from a copy of {self.example}"
        raise ConfigError(source, [Problem("", message)], self.kind)

    def _in_words(self, errors: Sequence[ErrorDetails]) -> list[Problem]:
        found = [(wrong.kind, problem) for wrong in refused(errors) for problem in self._problems(wrong)]
        # A key that is missing because it has another program's name is one mistake.
        named = {problem.message.rpartition(" ")[2] for kind, problem in found if kind == "extra_forbidden"}
        return [problem for kind, problem in found if kind != "missing" or problem.path not in named]

    def _problems(self, wrong: Refused) -> Iterator[Problem]:
        path = cut(".".join(map(str, wrong.place)), 200)
        if wrong.kind == "extra_forbidden":
            yield from self._unknown_key(path, wrong.given)
        elif wrong.kind == "missing":
            meaning = self._meaning(_without_indices(path))
            yield Problem(path, f"is missing and has no default{f': {meaning}' if meaning else ''}")
        elif wrong.given is None:
            yield Problem(path, f"has no value, allowed: {wrong.allowed}")
        else:
            yield wrong_value(path, wrong.given, wrong.allowed)

    def _meaning(self, path: str) -> str:
        above, _, name = path.rpartition(".")
        info = dict(known_fields(self.model)).get(above)
        section = section_of(info) if info else self.model
        return descriptions(section).get(name, "").rstrip(".") if section else ""

    def _unknown_key(self, path: str, given: Any) -> Iterator[Problem]:
        told = answer(path, self.foreign)
        inner = (
            {f"{path}.{cut(key)}": answer(key, self.foreign) for key in list(given)[:_MOST_KEYS]}
            if isinstance(given, dict)
            else {}
        )
        if told is None and any(inner.values()):
            sections = ", ".join(name for name, info in self.model.model_fields.items() if section_of(info))
            yield Problem(path, f"unknown section; these are allowed: {sections}")
            yield from (Problem(place, f"unknown key; {words}") for place, words in inner.items() if words)
        else:
            yield Problem(path, f"unknown key; {told or self._nearest(path)}")

    def _nearest(self, path: str) -> str:
        section, _, key = path.rpartition(".")
        known = [name for name, _ in known_fields(self.model)]
        siblings = [p for p in known if p.rpartition(".")[0] == _without_indices(section)]
        for candidates in (siblings, known):
            leaves = {p.rpartition(".")[2]: p for p in reversed(candidates)}
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
            if near:
                found_section, _, leaf = leaves[near[0]].rpartition(".")
                where = f"in the section `{found_section}`" if found_section else "at the top level"
                return f"did you mean `{leaf}` {where}?"
        return f"allowed here: {', '.join(p.rpartition('.')[2] for p in siblings)}"


def _without_indices(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", path)


def _only_counts_valid_items(error: Any) -> bool:
    """Whether pydantic calls a list too short because its items, which have errors of their own, are not valid."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def known_fields(model: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields every section and field with its dotted path, without list indices."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        inner = section_of(info)
        if inner is not None:
            yield from known_fields(inner, f"{prefix}{name}.")


def dump(tree: BaseModel) -> str:
    """Returns the tree as YAML that reads back equal."""
    return write_yaml(json.loads(tree.model_dump_json()))


def _apply_override(tree: dict[str, Any], override: str) -> Problem | None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    shown = cut(dotted, 200)
    if not equals or not all(keys) or len(keys) > _MOST_KEYS:
        allowed = "allowed: dotted.key=value, for example train.max_iters=100"
        return Problem(cut(override, 200), f"is not an override, {allowed}")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key)
        if not isinstance(node, (dict, list)):
            return Problem(shown, f"{cut('.'.join(keys[: depth + 1]), 200)} is not a section that can be overridden")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        return Problem(shown, f"the value {cut(repr(value))} is not valid YAML: {syntax_problem(error, value)[1]}")
    if isinstance(node, list):
        index = _index(node, keys[-1])
        if index is None:
            return Problem(shown, f"has {len(node)} entries, allowed: an index from 0 to {len(node) - 1}")
        node[index] = parsed
    else:
        node[keys[-1]] = parsed
    return None


def _child(node: Any, key: str) -> Any:
    if isinstance(node, list):
        index = _index(node, key)
        return None if index is None else node[index]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(items: list[Any], key: str) -> int | None:
    # `²` is a digit to Python, but no number.
    found = int(key) if re.fullmatch(r"[0-9]{1,9}", key) else len(items)
    return found if found < len(items) else None
