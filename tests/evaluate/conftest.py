"""A run that was never trained, with checkpoints of drawn weights, and tasks made from local data."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import KEYS
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.saver import Saved
from pipeline.config.load import load_config
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import Run, create_run
from tests.checkpoint.support import saver
from tests.data.helpers import command
from tests.test_bad_input import experiment

Save = Callable[[int], None]

CONTEXT = 64
MODEL = {
    "model.context_length": CONTEXT, "model.d_model": 32, "model.num_layers": 2, "model.num_heads": 4,
    "model.num_kv_heads": 2,
}  # fmt: skip
WORDS = ["the", "union", "of", "states", "war", "peace", "law", "and", "people", "congress"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
metadata: {{version: 1.0}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds config.yaml, text/ and tokens/."""
    folder = tmp_path_factory.mktemp("evaluate")
    assert command("prepare", experiment(folder, **MODEL)) == 0
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run without checkpoints; the harness's libraries keep their data in `tmp_path`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    made = create_run(load_config(experiment(tmp_path, **MODEL)))
    shutil.copy(template / "tokens" / "tokenizer.json", made.tokenizer_file)
    take_over(made.checkpoints, "a1")
    return made


@pytest.fixture
def save(run: Run) -> Save:
    """Writes the checkpoint of one step, of weights that are large enough for decided answers."""

    def write(step: int) -> None:
        torch.manual_seed(step)
        fragments = [
            OwnedFragment(name, tuple(weight.shape), 0, dict.fromkeys(KEYS, 2 * weight.detach().flatten()))
            for name, weight in TransformerLM(**run.config().model.model_dump()).named_parameters()
        ]
        reports: list[Saved] = []
        one = saver(run.checkpoints, reports)
        one.save(step, fragments, {})
        one.wait()
        assert reports[-1].error is None

    return write


def write_task(folder: Path, name: str, rest: str, rows: list[dict]) -> None:
    """Writes a task of the harness, and its data beside it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one task of each kind: `choice`, `rolling` and `generation`."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    choices = [
        {
            "question": words(rng.randint(1, 16)),
            "choices": [words(rng.randint(1, 3)) for _ in range(4)],
            "answer": n % 4,
        }
        for n in range(24)
    ]
    write_task(folder, "choice", CHOICE, choices)
    write_task(folder, "rolling", ROLLING, [{"text": words(rng.randint(1, 60))} for _ in range(12)])
    prompts = [{"question": words(rng.randint(1, 16)), "target": words(1)} for _ in range(12)]
    write_task(folder, "generation", GENERATION, prompts)
    return folder
