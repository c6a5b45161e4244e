"""A value that is refused is answered with what to write; the words of pydantic never reach a user."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.config.load import parse_config
from pipeline.config.messages.values import WORDS, first_problem, refused
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import known_fields
from pipeline.errors import ConfigError
from pipeline.launch.site import Site, parse_site
from tests.config.support import DEMO, ROOT, problems, tree

WRONG = [
    None, True, 3, 3.5, -1, 0, 2**70, 1e308, float("inf"), float("nan"), "text", "", "a b!", "x" * 300, "12", [],
    [1, 2, 3], ["a"], [None], {}, {"a": 1}, [{}], {"a b": 1}, {"a": None}, [[1]], {"from_step": 0},
]  # fmt: skip
# What pydantic would say, in any of its messages for these types.
PYDANTIC = re.compile(
    r"Input should|valid (string|integer|number|boolean|array|list|tuple|dictionary|object|dict)|after validation|"
    r"not permitted|should match|match pattern|Field required|[Uu]nable to parse|characters?, not|"
    r"instance of|greater than or equal"
)
SITE = ROOT / "slurm" / "sites" / "gpu.yaml"


def mutants(model: type[BaseModel], given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the tree with each field in turn replaced by each wrong value."""
    for path, _ in known_fields(model):  # type: ignore[arg-type]
        *sections, key = path.split(".")
        for value in WRONG:
            changed = copy.deepcopy(given)
            node: Any = changed
            for section in sections:
                node.setdefault(section, [{}] if section in ("sources", "phases") else {})
                node = node[section][0] if isinstance(node[section], list) else node[section]
            node[key] = value
            yield changed


@pytest.mark.parametrize(("model", "file"), [(Config, DEMO), (Site, SITE)], ids=["config", "site"])
def test_every_wrong_value_of_every_field_is_answered_in_our_words(model, file):
    reached = set()
    for changed in mutants(model, yaml.safe_load(file.read_text())):
        try:
            model.model_validate_json(json.dumps(changed), strict=True)
        except ValidationError as error:
            for wrong in refused(error.errors()):
                reached.add(wrong.kind)
                assert wrong.allowed and not PYDANTIC.search(wrong.allowed), wrong
                assert not {"str", "bool", "[key]"} & set(map(str, wrong.place)), wrong
    assert len(reached) > 12 and reached <= set(WORDS), reached - set(WORDS)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("data.sources.0.paths", "a/*.txt", 'given "a/*.txt", allowed: a list, for example ["a/*.txt"]'),
        ("train.max_iters", "100", 'given "100", allowed: a whole number without quotes'),
        ("optimizer.learning_rate", "3e-4", 'given "3e-4", allowed: a number without quotes'),
        ("tokenizer.end_of_text", 0, "given 0, allowed: text in quotes"),
        ("train.seed", None, "has no value, allowed: a whole number"),
        ("train.compile", "yes please", 'given "yes please", allowed: true or false'),
        ("optimizer.betas", [0.9, 0.95, 0.99], "given [0.9, 0.95, 0.99], allowed: at most 2 entries"),
        ("checkpoint.timeout_min", 1e9, "given 1000000000.0, allowed: 1,000,000 or less"),
        ("guard", 3, "given 3, allowed: lines of `key: value`, indented below it"),
    ],
)
def test_the_answer_says_what_to_write(path, value, said):
    text = yaml.safe_dump(tree(**{path: "PLACE"})).replace("PLACE", json.dumps(value))
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert [str(problem) for problem in caught.value.problems] == [f"{path}: {said}"]


def test_a_missing_key_is_described():
    said = problems(**{"train.batch_size": None})["train.batch_size"]
    assert said == "is missing and has no default: Sequences in the global batch, over all ranks and micro-batches"


def test_a_value_of_several_types_is_refused_once():
    text = SITE.read_text().replace("extra_sbatch: {}", "extra_sbatch: {licenses: 3}")
    with pytest.raises(ConfigError) as caught:
        parse_site(text)
    (problem,) = caught.value.problems
    assert str(problem) == "extra_sbatch.licenses: given 3, allowed: text in quotes or true or false"


def test_a_damaged_file_of_a_program_is_described_by_its_first_problem():
    adapter = TypeAdapter(dict[str, int])
    for content, said in (({"a": "x"}, "a should be a whole number"), (3, "the whole should be lines of `key: value`")):
        with pytest.raises(ValidationError) as caught:
            adapter.validate_python(content)
        assert first_problem(caught.value).startswith(said)
