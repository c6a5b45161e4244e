"""YAML + dotted overrides -> a validated tree of sections, or everything that is wrong with it.

Knows no vocabulary: `config_load.py` and `launch/site_load.py` say which sections a file holds.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError, Problem, UsageError

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2 floats (`1e-3` is a number) and without duplicate keys."""

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


# PyYAML follows YAML 1.1, where 1e-3 is a string: a learning rate would fail for want of a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Vocabulary(Generic[S]):
    """What a kind of file may hold.

    Attributes:
        model: Its outermost section.
        kind: What messages call its content.
        example: A file to start from.
    """

    model: type[S]
    kind: str
    example: str

    def read(self, path: str | Path) -> str:
        """The text of a file.

        Raises:
            UsageError: It cannot be read.
        """
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: the {self.kind} file cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: the {self.kind} file is not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error

    def parse(self, text: str, overrides: Sequence[str], source: str) -> tuple[S | None, list[Problem]]:
        """The tree and what is wrong with single fields.

        A tree is returned too where the flawed fields can be stood in for, so that cross-field problems
        of the other fields are not hidden behind a typing mistake.

        Raises:
            ConfigError: The text is no YAML mapping.
        """
        tree = self._parse_yaml(text, source)
        problems = [p for p in (_apply_override(tree, o) for o in overrides) if p is not None]
        try:
            return self._strict(tree), problems
        except ValidationError as error:
            errors = error.errors()
        problems += [self._problem(e) for e in errors]
        for e in sorted(errors, key=lambda e: len(e["loc"]), reverse=True):
            self._replace_by_placeholder(tree, e["loc"])
        try:
            return self._strict(tree), problems
        except ValidationError:
            return None, problems

    def refusal(self, source: str, problems: list[Problem]) -> ConfigError:
        """The error that reports all of these."""
        return ConfigError(source, problems, self.kind)

    def json_schema(self) -> dict[str, Any]:
        """The JSON schema by which editors complete and check the YAML."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **self.model.model_json_schema()}

    def _parse_yaml(self, text: str, source: str) -> dict[str, Any]:
        try:
            tree = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise self.refusal(source, [Problem("", f"bad YAML, {where}{error.problem}")]) from error
        except yaml.YAMLError as error:
            raise self.refusal(source, [Problem("", f"bad YAML: {error}")]) from error
        if tree is None:
            raise self.refusal(source, [Problem("", f"the file is empty; start from a copy of {self.example}")])
        if not isinstance(tree, dict):
            given = type(tree).__name__
            raise self.refusal(source, [Problem("", f"holds a {given}, allowed: sections of `key: value`")])
        return tree

    def _strict(self, tree: dict[str, Any]) -> S:
        # Strict JSON mode: "3", 3.0 and true are no integers, while lists still become tuples.
        return self.model.model_validate_json(json.dumps(tree, default=str), strict=True)

    def _replace_by_placeholder(self, tree: Any, loc: tuple[int | str, ...]) -> None:
        """Takes a flawed value out; a required one is replaced, so that the rest can still be checked."""
        for key in loc[:-1]:
            try:
                tree = tree[key]
            except (KeyError, IndexError, TypeError):
                return
        if not isinstance(tree, dict):
            return
        tree.pop(loc[-1], None)
        section, field = (str(loc[-2]) if len(loc) > 1 else ""), str(loc[-1])
        info = self._model_of(section).model_fields.get(field)
        if info is not None and info.is_required():
            tree[field] = "placeholder" if info.annotation is str else 1

    def _model_of(self, section: str) -> type[BaseModel]:
        fields = self.model.model_fields
        annotation = fields[section].annotation if section in fields else None
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else self.model

    def _problem(self, error: Any) -> Problem:
        path = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return Problem(path, self._unknown_key_message(path))
        if error["type"] == "missing":
            return Problem(path, "is missing and has no default")
        allowed = re.sub(r"^(Input|Value|String|Tuple|Dictionary) should (be |have )?", "", error["msg"])
        return Problem(path, f"given {shown(error['input'])}, allowed: {allowed}")

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


def known_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of every section and field, without list indices."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_paths(part, f"{prefix}{name}.")


def dump(tree: BaseModel) -> str:
    """The tree as YAML that reads back equal."""
    return yaml.safe_dump(json.loads(tree.model_dump_json()), sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """One YAML value, as overrides have it.

    Raises:
        yaml.YAMLError: It is none.
    """
    return yaml.load(text, Loader=_Loader)


def shown(value: Any) -> str:
    """A given value in a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _apply_override(tree: dict[str, Any], override: str) -> Problem | None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return Problem(override, "is not an override, allowed: dotted.key=value, `train.max_iters=100` say")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key)
        if not isinstance(node, (dict, list)):
            return Problem(dotted, f"{'.'.join(keys[: depth + 1])} is not a section that can be overridden")
    try:
        parsed = parse_value(value)
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
