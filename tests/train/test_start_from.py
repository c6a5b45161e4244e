"""A run starts from open weights: with their loss, a record of where they come from, and back out bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest
from pipeline.commands.export import export_run
from pipeline.config.init_section import InitConfig
from pipeline.config.load import dump_config, load_config
from pipeline.config.model_section import ModelConfig
from pipeline.config.sections import Config
from pipeline.data.build.display import prepare_here
from pipeline.data.dataset import open_dataset
from pipeline.data.order.validation import validation_windows
from pipeline.errors import UsageError
from pipeline.huggingface.model_folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import open_run, run_for
from tests import processes
from tests.experiment import validations
from tests.huggingface.folders import SHAPES, described, saved_by_transformers, written
from tests.huggingface.test_bad_folders import BAD_FOLDERS, not_a_number
from tests.huggingface.test_open_weights import MODEL as BIASED
from tests.test_bad_input import experiment
from tests.train.engine.reference import train_plainly

MODEL = BIASED.model_copy(update={"vocab_size": 260, "context_length": 16, "tie_embeddings": True})
UNTIED = MODEL.model_copy(update={"tie_embeddings": False})
# The learning rate of the first step is zero: its weights are those that were read.
ONE_STEP = {
    "train.max_iters": 1, "train.val_interval": 1, "train.num_val_batches": 2, "train.log_interval": 1,
    "model.vocab_size": 260,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Prepared data that all runs of this file share."""

    config: Config

    @property
    def tokenizer(self) -> Path:
        return Path(self.config.data.path) / TOKENIZER

    def starting_from(self, folder: Path, model: ModelConfig, runs: Path, **train: Any) -> Config:
        """The experiment with this model and these weights."""
        init = InitConfig(**{"from": f"hf:{folder}"})
        changed = self.config.train.model_copy(update=train)
        return self.config.model_copy(
            update={"model": model, "init": init, "runs_dir": str(runs), "train": changed},
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    config = load_config(experiment(tmp_path_factory.mktemp("data"), **ONE_STEP))
    prepare_here(config, None)
    return Data(config)


@pytest.fixture
def folder(data: Data, tmp_path: Path) -> Path:
    """The folder of a tied model with shared keys and biases."""
    written(tmp_path / "model", MODEL)
    shutil.copy(data.tokenizer, tmp_path / "model" / TOKENIZER)
    return tmp_path / "model"


def loss_of(logits: Callable[[torch.Tensor], torch.Tensor], config: Config) -> float:
    """The mean loss on the windows of the run's validations."""
    (windows,) = validation_windows(open_dataset(config.data.path, "validation"), config.model.context_length)
    x, y = windows.batch(0, min(windows.count, config.train.num_val_batches * config.train.batch_size))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(logits(x).flatten(0, 1), y.flatten()))


def first_validation(config: Config) -> float:
    return validations(run_for(config).path)[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [*zip(SHAPES, (0, 1, 2, 3, 1, 2), strict=True), ("SmolLM2", 3)])
def test_the_first_loss_is_that_of_transformers_and_the_export_what_was_read(
    data: Data, tmp_path: Path, name: str, stage: int
) -> None:
    theirs = saved_by_transformers(tmp_path / "model", name, data.tokenizer, max_shard_size="100KB")
    config = data.starting_from(tmp_path / "model", described(tmp_path / "model"), tmp_path, zero_stage=stage)
    loop.train(config)
    assert first_validation(config) == pytest.approx(loss_of(lambda x: theirs(x).logits, config), abs=1e-5)

    exported = export_run(run_for(config), "hf")
    before = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    after = load_file(exported / WEIGHTS)
    assert before.keys() == after.keys()
    for key, file in before.items():
        assert torch.equal(load_file(tmp_path / "model" / file)[key], after[key]), key
    again = described(exported)
    left_out = {"num_kv_heads": again.kv_heads, "head_dim": again.head_size}
    assert again.model_dump() == {**config.model.model_dump(), **left_out}
    assert left_out == {"num_kv_heads": config.model.kv_heads, "head_dim": config.model.head_size}
    kind = "Llama" if name == "Mistral" else SHAPES[name][0]  # without its window it is one
    assert json.loads((exported / CONFIG).read_text())["architectures"] == [f"{kind}ForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_opens_the_export_under_its_own_class_with_the_same_logits(
    data: Data, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = saved_by_transformers(tmp_path / "model", name, data.tokenizer)
    config = data.starting_from(tmp_path / "model", described(tmp_path / "model"), tmp_path)
    loop.train(config)
    monkeypatch.setattr("pipeline.commands.export.SHARD_BYTES", 100_000)
    exported = export_run(run_for(config), "hf")
    assert export_run(run_for(config), "hf") == exported, "an export in several files replaces one"
    assert (exported / INDEX).exists()
    ids = torch.randint(0, 260, (2, 40))
    opened, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, theirs(ids).logits)


@pytest.mark.slow
def test_two_ranks_start_from_their_parts_of_the_weights(data: Data, folder: Path, tmp_path: Path) -> None:
    losses = []
    for world, stage in ((1, 0), (2, 3), (2, 1)):
        runs = tmp_path / f"{world}_{stage}"
        config = data.starting_from(folder, MODEL, runs, zero_stage=stage, micro_batch_size=2)
        file = tmp_path / "config.yaml"
        file.write_text(dump_config(config))
        processes.run(["train", str(file)], world, tmp_path / "log")
        losses.append(first_validation(config))
        found = load_file(export_run(run_for(config), "hf") / WEIGHTS)
        assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(folder / WEIGHTS).items())
    assert losses[1:] == [pytest.approx(losses[0], abs=1e-5)] * 2


@pytest.mark.slow
def test_a_bad_value_ends_all_ranks_with_one_message(data: Data, folder: Path, tmp_path: Path) -> None:
    not_a_number(folder)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(data.starting_from(folder, MODEL, tmp_path / "runs", micro_batch_size=2)))
    with pytest.raises(AssertionError, match=r"mlp\.up_proj"):
        processes.run(["train", str(file)], 2, tmp_path / "log")
    assert not (tmp_path / "runs").exists()


def test_the_first_loss_is_that_of_the_weights_and_bfloat16_goes_out_bit_for_bit(data: Data, tmp_path: Path) -> None:
    model = written(tmp_path / "model", MODEL, files=2, dtype=torch.bfloat16)
    shutil.copy(data.tokenizer, tmp_path / "model" / TOKENIZER)
    config = data.starting_from(tmp_path / "model", MODEL, tmp_path)
    loop.train(config)
    assert first_validation(config) == pytest.approx(loss_of(model, config), abs=1e-6)
    found = load_file(export_run(run_for(config), "hf", dtype="bfloat16") / WEIGHTS)
    before = {n: t for file in (tmp_path / "model").glob("*.safetensors") for n, t in load_file(file).items()}
    assert before.keys() == found.keys()
    assert all(torch.equal(before[name], found[name]) for name in before)


def test_the_digest_is_recorded_and_a_resumed_run_needs_the_folder_no_more(
    data: Data, folder: Path, tmp_path: Path
) -> None:
    config = data.starting_from(folder, MODEL, tmp_path / "runs")
    loop.train(config)
    run = run_for(config)
    record = run.provenance()[0]["init"]
    assert record["from"] == f"hf:{folder}" and len(record["digest"]) == 64
    assert Manifest.load(run.checkpoints / "step_00000001").state["init"] == record
    assert open_run(run.path).config() == config
    shutil.rmtree(folder)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_iters": 2})})
    assert loop.train(longer).step == 2
    assert Manifest.load(run.checkpoints / "step_00000002").state["init"] == record
    with pytest.raises(UsageError, match="init"):
        loop.train(config.model_copy(update={"init": InitConfig()}))


def test_a_run_without_a_checkpoint_starts_from_the_same_content_or_not_at_all(
    data: Data, folder: Path, tmp_path: Path
) -> None:
    config = data.starting_from(folder, MODEL, tmp_path / "runs")
    loop.train(config)
    shutil.rmtree(run_for(config).checkpoints)
    written(folder, MODEL, dtype=torch.bfloat16)
    shutil.copy(data.tokenizer, folder / TOKENIZER)
    with pytest.raises(UsageError, match="digest"):
        loop.train(config)


def test_training_continues_from_the_weights_at_every_step(data: Data, folder: Path, tmp_path: Path) -> None:
    """The third step is that of plain PyTorch from the same weights."""
    config = data.starting_from(folder, MODEL, tmp_path, max_iters=3, val_interval=3)
    loop.train(config)
    file = tmp_path / "plain.yaml"
    file.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    model = TransformerLM(**MODEL.model_dump())
    model.load_state_dict(written(tmp_path / "same", MODEL).state_dict())
    plain = train_plainly(file, range(3), model)
    curve = [
        line["train/loss"] for line in map(json.loads, run_for(config).metrics_file.open()) if "train/loss" in line
    ]
    assert curve == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("spoil", BAD_FOLDERS)
def test_a_bad_folder_ends_the_start_with_status_2_before_anything_is_written(
    data: Data, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    written(folder, UNTIED)
    shutil.copy(data.tokenizer, folder / TOKENIZER)
    words = spoil(folder)
    with pytest.raises(UsageError, match=f"(?s){words}") as refused:
        loop.train(data.starting_from(folder, UNTIED, tmp_path / "runs"))
    assert refused.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_data_of_another_tokenizer_is_refused(data: Data, folder: Path, tmp_path: Path) -> None:
    (folder / TOKENIZER).write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer: \{kind: file") as refused:
        loop.train(data.starting_from(folder, MODEL, tmp_path / "runs"))
    assert refused.value.exit_code == 2
    assert not (tmp_path / "runs").exists()
