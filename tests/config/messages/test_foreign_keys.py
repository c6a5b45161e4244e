"""Keys of other programs are answered by name with ours."""

from __future__ import annotations

import re

import pytest

from pipeline.config.load import parse_config
from pipeline.config.messages.foreign_keys import CONFIG_KEYS, SITE_KEYS
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import known_fields
from pipeline.errors import ConfigError
from pipeline.launch.site import Site, parse_site
from tests.config.support import DEMO, ROOT, problems

OURS = {path for path, _ in known_fields(Config)}
OF_A_SITE = {path for path, _ in known_fields(Site)}


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("train.epochs", "train.max_iters"),
        ("train.gradient_accumulation_steps", "train.micro_batch_size"),
        ("model.n_layers", "model.num_layers"),
        ("model.n_embd", "model.d_model"),
        ("train.fp16", "train.precision"),
        ("model.block_size", "model.context_length"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("max_steps", "train.max_iters"),
        ("train.per_device_train_batch_size", "train.micro_batch_size"),
        ("optimizer.min-lr", "optimizer.min_learning_rate"),
        ("tensor_model_parallel_size", "no tensor"),
        ("wandb_project", "tracking.experiment"),
        ("model.dropout", "no dropout"),
        ("resume_from_checkpoint", "resumes"),
        ("train.num_nodes", "train.nodes"),
    ],
)
def test_a_key_of_another_program_is_answered_with_ours(key, ours):
    said = problems(**{key: 3})[key]
    assert said.startswith("unknown key; ") and ours in said and "did you mean" not in said


def test_a_section_of_another_program_is_answered_key_by_key():
    found = problems(training={"steps": 10, "seq_len": 2048, "local_batch_size": 8})
    assert found["training"].startswith("unknown section; these are allowed: data, tokenizer, model")
    assert found["training.steps"] == "unknown key; here it is train.max_iters"
    assert found["training.seq_len"] == "unknown key; here it is model.context_length"


def test_a_key_that_is_missing_because_it_has_another_name_is_reported_once():
    found = problems(**{"train.max_iters": None, "train.max_steps": 100})
    assert set(found) == {"train.max_steps"}


def test_a_site_answers_sbatchs_names():
    with pytest.raises(ConfigError) as caught:
        parse_site((ROOT / "slurm/sites/gpu.yaml").read_text() + "time: '1:00:00'\nntasks-per-node: 4\n")
    assert {problem.path: problem.message for problem in caught.value.problems} == {
        "time": "unknown key; here it is train.time_limit_min",
        "ntasks-per-node": "unknown key; here it is train.tasks_per_node",
    }


@pytest.mark.parametrize(("keys", "ours"), [(CONFIG_KEYS, OURS), (SITE_KEYS, OF_A_SITE)], ids=["config", "site"])
def test_every_answer_names_keys_that_exist(keys, ours):
    sections = {path.partition(".")[0] for path in OURS | OF_A_SITE}
    for foreign, words in keys.items():
        for named in re.findall(r"\b([a-z]+\.[a-z_0-9]+)\b", words):
            assert named.partition(".")[0] not in sections or named in OURS | OF_A_SITE, (foreign, named)
        if words.startswith("here it is "):
            assert words.removeprefix("here it is ") in ours


def test_no_key_of_ours_is_called_foreign_where_it_stands():
    assert parse_config(DEMO.read_text())
    for path in OURS:
        words = CONFIG_KEYS.get(path.rpartition(".")[2])
        assert words is None or words != f"here it is {path}"
