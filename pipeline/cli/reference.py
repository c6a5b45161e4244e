"""Generates the JSON schemas and reference pages of config and site from their own descriptions."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config.load import CONFIG
from pipeline.config.section_base import Section, descriptions, section_of
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import Vocabulary
from pipeline.launch.site import SITE, Site

SCHEMA_FILE = Path("configs/schema.json")
REFERENCE_FILE = Path("docs/config.md")
SITE_SCHEMA_FILE = Path("slurm/sites/schema.json")
SITE_REFERENCE_FILE = Path("docs/sites.md")

_INTRODUCTION = """# The config

- **How do I** change a value without a new file? On the command line: `pipeline run configs/demo.yaml name=short`.
- **How do I** begin a config of my own? `pipeline new my.yaml --like 1b`: every field with a comment.
- **How do I** know what a key means? Its table below; an editor shows the same from `configs/schema.json`.

One experiment is one YAML file. `make schema` generates this page from `pipeline/config/`, together with
`configs/schema.json`, which lets an editor complete and check the YAML (`pipeline schema` prints it).
`pipeline new CONFIG.yaml` writes a commented config from an example (`--like demo`, `135m`, `350m`, `1b` or `8b`), or
one for open weights (`--from hf:FOLDER`); its first line names the schema.

Any value can be overridden on the command line: `pipeline run configs/demo.yaml train.max_iters=100`; an entry of a
list is named by its index: `data.sources.0.weight=2`. Unknown keys, wrong types and values that contradict each other
are all reported in one message, and nothing starts (exit status 2).
"""

_SITE_INTRODUCTION = """# The site file

- **How do I** describe my cluster? `pipeline new my.yaml --site my-site.yaml`, then set partition, account and GPUs.
- **How do I** see what it makes of a job? `pipeline submit my.yaml --site my-site.yaml --dry-run`.
- **How do I** set variables, modules or binds? `environment`, `modules`, `setup` and `container.binds` below.

One cluster is one YAML file: `pipeline submit CONFIG --site SITE`. `make schema` generates this page from
`pipeline/launch/site.py`, together with `slurm/sites/schema.json`, which lets an editor complete and check the YAML
(`pipeline schema site` prints it).
`pipeline new CONFIG.yaml --site SITE.yaml` writes one in which every field has a comment;
[slurm.md](slurm.md) shows how the fields become batch scripts.
"""


def generated() -> dict[Path, str]:
    """Returns the text of every generated file."""
    return {
        SCHEMA_FILE: _schema_text(CONFIG),
        REFERENCE_FILE: _reference_text(_INTRODUCTION, Config),
        SITE_SCHEMA_FILE: _schema_text(SITE),
        SITE_REFERENCE_FILE: _reference_text(_SITE_INTRODUCTION, Site),
    }


def _schema_text(vocabulary: Vocabulary[Any]) -> str:
    return json.dumps(vocabulary.json_schema(), indent=2) + "\n"


def _reference_text(introduction: str, model: type[Section]) -> str:
    return introduction + "".join(_section_text(path, section) for path, section in _sections(model, ""))


def _sections(model: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, model
    for name, info in model.model_fields.items():
        inner = section_of(info)
        if inner is not None:
            item = f"{name}[]" if get_origin(info.annotation) is tuple else name
            yield from _sections(inner, f"{path}.{item}".lstrip("."))


def _section_text(path: str, model: type[Section]) -> str:
    meaning = descriptions(model)
    rows = [
        f"| `{name}` | {_type_text(info.annotation)} | {_default_text(info)} | {_limits(info)}{meaning[name]} |\n"
        for name, info in model.model_fields.items()
        if section_of(info) is None
    ]
    summary = (model.__doc__ or "").strip().splitlines()[0]
    title = f"`{path}`" if path else "Top level"
    return f"\n## {title}\n\n{summary}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{''.join(rows)}"


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = [a for a in get_args(annotation) if a is not Ellipsis]
        return f"list of {_type_text(inner[0])}" + ("" if Ellipsis in get_args(annotation) else f" ({len(inner)})")
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) in (types.UnionType, Union):
        return " or ".join(_type_text(a) for a in get_args(annotation) if a is not type(None))
    if hasattr(annotation, "__metadata__"):
        return _type_text(get_args(annotation)[0])
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}[annotation.__name__]


def _default_text(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"`{json.dumps(value)}`"


def _limits(info: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{signs[a]} {getattr(m, a)}" for m in info.metadata for a in signs if getattr(m, a, None) is not None]
    return f"({', '.join(limits)}) " if limits else ""


if __name__ == "__main__":
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
