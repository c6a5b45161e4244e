"""Generated files follow the sections they are generated from."""

from __future__ import annotations

import json

import pytest

from pipeline.cli.reference import REFERENCE_FILE, SCHEMA_FILE, generated
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import known_fields
from tests.cli.test_main import ROOT


@pytest.mark.parametrize("file", generated(), ids=str)
def test_schemas_and_reference_pages_are_current(file):
    assert (ROOT / file).read_text() == generated()[file], f"{file}: run `make schema`"


def test_every_key_has_a_description_in_the_schema_and_on_the_page():
    page = generated()[REFERENCE_FILE]
    for path, _ in known_fields(Config):
        assert f"`{path.rpartition('.')[2]}`" in page or f"## `{path}" in page, path
    definitions = json.loads(generated()[SCHEMA_FILE])["$defs"]
    for section in definitions.values():
        assert section["description"]
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name


@pytest.mark.parametrize(
    "row",
    [
        "| `max_iters` | integer | required | (>= 1) ",
        "| `weight` | number | `1.0` | (> 0) ",
        "| `validation_fraction` | number | `0.01` | (>= 0, < 1) ",
        "| `betas` | list of number (2) | `[0.9, 0.95]` | ",
        "| `paths` | list of text | required | ",
        "| `zero_stage` | `0` or `1` or `2` or `3` | `0` | ",
        "| `image` | text | `null` | ",
        "| `deepspeed` | mapping | `{}` | ",
        "## `data.sources[]`",
    ],
)
def test_a_row_shows_type_default_and_limits(row):
    assert f"\n{row}" in generated()[REFERENCE_FILE]
