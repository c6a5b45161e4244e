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

from pipeline.config.section_base import S, Section, broken_rules, section_of, usable_part, wrong_value
from pipeline.errors import ConfigError, Problem, UsageError
from pipeline.files import naming
from pipeline.text_format import located


class _Loader(yaml.SafeLoader):
    """The safe loader; it also reads YAML 1.2 floats (`1e-3` is a number) and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where 1e-3 is a string: a learning rate without a dot would be refused.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Vocabulary(Generic[S]):
    """The keys and values that one kind of file may hold."""

    model: type[S]
    """The outermost section."""
    kind: str
    """What messages call the content."""
    example: str
    """A file to start from."""

    def read(self, path: str | Path) -> str:
        """Returns the text of a file.

        Raises:
            UsageError: It cannot be read.
        """
        try:
            with naming(located(path), f"the {self.kind} file cannot be read", error=UsageError):
                return Path(path).read_text(encoding="utf-8")
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
        document = json.dumps(given, default=str)
        try:
            # Strict JSON mode rejects "3", 3.0 and true as integers, while lists still become tuples.
            tree = self.model.model_validate_json(document, strict=True)
        except ValidationError as invalid:
            errors = [error for error in invalid.errors() if not _only_counts_valid_items(error)]
            problems += map(self._problem, errors)
            tree = usable_part(self.model, json.loads(document), [error["loc"] for error in errors])
        named = {problem.path for problem in problems}
        problems += [problem for problem in broken_rules(tree, rules=rules) if problem.path not in named]
        if problems:
            raise ConfigError(source, problems, self.kind)
        return tree

    def json_schema(self) -> dict[str, Any]:
        """Returns the JSON schema with which editors complete and check the YAML."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **self.model.model_json_schema()}

    def _parse_yaml(self, text: str, source: str) -> dict[str, Any]:
        try:
            tree = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            message = f"bad YAML, {where}{error.problem}"
        except yaml.YAMLError as error:
            message = f"bad YAML: {error}"
        else:
            if isinstance(tree, dict):
                return tree
            message = f"holds a {type(tree).__name__}, allowed: sections of `key: value`"
            if tree is None:
                message = f"the file is empty; start from a copy of {self.example}"
        raise ConfigError(source, [Problem("", message)], self.kind)

    def _problem(self, error: Any) -> Problem:
        path = ".".join(str(part) for part in error["loc"])
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
    return yaml.safe_dump(json.loads(tree.model_dump_json()), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> Problem | None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return Problem(override, "is not an override, allowed: dotted.key=value, for example train.max_iters=100")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key)
        if not isinstance(node, (dict, list)):
            return Problem(dotted, f"{'.'.join(keys[: depth + 1])} is not a section that can be overridden")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        return Problem(dotted, f"the value {value!r} is not valid YAML")
    if isinstance(node, list):
        if not keys[-1].isdigit() or int(keys[-1]) >= len(node):
            return Problem(dotted, f"has {len(node)} entries, allowed: an index from 0 to {len(node) - 1}")
        node[int(keys[-1])] = parsed
    else:
        node[keys[-1]] = parsed
    return None


def _child(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return node[int(key)] if key.isdigit() and int(key) < len(node) else None
    if node.get(key) is None:
        node[key] = {}
    return node[key]
