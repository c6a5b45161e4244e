"""YAML and dotted overrides -> a validated tree of sections, or everything that is wrong with it.

This module knows no key: `config/sections.py` and `launch/site.py` hold the vocabularies.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.section_base import S, Section, broken_rules, cut, section_of, usable_part, wrong_value
from pipeline.config.yaml_loader import MOST_BYTES, read_yaml, write_yaml
from pipeline.errors import ConfigError, Problem, UsageError
from pipeline.files import naming, read_bounded
from pipeline.text_format import located

# A file of another kind has a problem in every line.
_MOST_PROBLEMS = 50
_MOST_KEYS = 20


@dataclass(frozen=True)
class Vocabulary(Generic[S]):
    """The keys and values that one kind of file may hold."""

    model: type[S]
    """The outermost section."""
    kind: str
    """What messages call the content."""
    example: str
    """A file to start from."""

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
            problems += map(self._problem, errors[:_MOST_PROBLEMS])
            tree = usable_part(self.model, json.loads(document), [error["loc"] for error in errors])
        named = {problem.path for problem in problems}
        problems += [problem for problem in broken_rules(tree, rules=rules) if problem.path not in named]
        if problems:
            raise ConfigError(source, problems[:_MOST_PROBLEMS], self.kind)
        return tree

    def json_schema(self) -> dict[str, Any]:
        """Returns the JSON schema with which editors complete and check the YAML."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **self.model.model_json_schema()}

    def _parse_yaml(self, text: str, source: str) -> dict[str, Any]:
        try:
            tree = read_yaml(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            message = f"bad YAML, {where}{_reason(error)}"
        else:
            if isinstance(tree, dict):
                return tree
            message = f"holds a {type(tree).__name__}, allowed: sections of `key: value`"
            if tree is None:
                message = f"the file is empty; start from a copy of {self.example}"
        raise ConfigError(source, [Problem("", message)], self.kind)

    def _problem(self, error: Any) -> Problem:
        path = cut(".".join(str(part) for part in error["loc"]), 200)
        if error["type"] == "extra_forbidden":
            return Problem(path, self._unknown_key_message(path))
        if error["type"] == "missing":
            return Problem(path, "is missing and has no default")
        allowed = re.sub(r"^(Input|Value|String|Tuple|Dictionary) should (be |have |match )?", "", error["msg"])
        allowed = re.sub(r" after validation, not \d+$", "", allowed)
        return wrong_value(path, error["input"], allowed)

    def _unknown_key_message(self, path: str) -> str:
        section, _, key = path.rpartition(".")
        plain_section = re.sub(r"\.\d+(?=\.|$)", "", section)
        known = list(known_paths(self.model))
        siblings = [p for p in known if p.rpartition(".")[0] == plain_section]
        for candidates in (siblings, known):
            leaves = {p.rpartition(".")[2]: p for p in reversed(candidates)}
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
            if near:
                found_section, _, leaf = leaves[near[0]].rpartition(".")
                where = f"in the section `{found_section}`" if found_section else "at the top level"
                return f"unknown key; did you mean `{leaf}` {where}?"
        names = ", ".join(p.rpartition(".")[2] for p in siblings)
        return f"unknown key; allowed here: {names}"


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


def _only_counts_valid_items(error: Any) -> bool:
    """Whether pydantic calls a list too short because its items, which have errors of their own, are not valid."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def known_paths(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Yields the dotted paths of every section and field, without list indices."""
    for name, info in model.model_fields.items():
        yield prefix + name
        inner = section_of(info)
        if inner is not None:
            yield from known_paths(inner, f"{prefix}{name}.")


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
        return Problem(shown, f"the value {cut(repr(value))} is not valid YAML: {_reason(error)}")
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
