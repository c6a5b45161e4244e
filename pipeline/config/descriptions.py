"""What each key means: the text below its field, for the schemas, the reference pages and the messages.

It is read from the source when it is wanted. Pydantic can read it while it makes a class (`use_attribute_docstrings`),
which took two fifths of the time that importing the sections takes every command.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from pipeline.config.section_base import Section, section_of


def descriptions(section: type[Section]) -> dict[str, str]:
    """Returns the description of each field that has one; none where the program has no source with it."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            texts.update(_texts_below_fields(base))
    given = {name: info.description for name, info in section.model_fields.items()}
    return {name: text for name in given if (text := given[name] or texts.get(name))}


def schema_with_descriptions(model: type[Section]) -> dict[str, Any]:
    """Returns the JSON schema of a section and of all that are inside it, with a description of each field."""
    schema = model.model_json_schema()
    for section in {model, *_inner_sections(model)}:
        properties = (schema if section is model else schema["$defs"][section.__name__])["properties"]
        for name, text in descriptions(section).items():
            properties[name] = dict(sorted({**properties[name], "description": text}.items()))
    return schema


def _texts_below_fields(section: type[Section]) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(section)
    except OSError:
        return
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in itertools.pairwise(definition.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        match below:
            case ast.Expr(ast.Constant(str(text))):
                yield field.target.id, inspect.cleandoc(text)


def _inner_sections(model: type[Section]) -> Iterator[type[Section]]:
    for info in model.model_fields.values():
        inner = section_of(info)
        if inner is not None:
            yield inner
            yield from _inner_sections(inner)
