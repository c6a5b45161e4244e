"""An export gives other programs the run's weights, logits and tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.layout import published
from pipeline.checkpoint.weights import load_weights
from pipeline.commands.export import export_run
from pipeline.commands.verify import verify_path
from pipeline.config.load import load_config
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import Run, open_run
from tests import processes

TEXT = "We hold these truths to be self-evident, that all men are created equal; 1776 was a year. " * 80


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps with a trained BPE tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    splits = ("train", "validation")
    for split in splits:
        (folder / f"{split}.txt").write_text(TEXT)
    sources = [{"name": s, "paths": [str(folder / f"{s}.txt")], "split": s} for s in splits]
    tree = {
        "name": "small",
        "runs_dir": str(folder / "runs"),
        "data": {"path": str(folder / "tokens"), "sources": sources},
        "model": {"vocab_size": 300, "context_length": 32, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64},
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_iters": 1, "cosine_cycle_iters": 6},
        "train": {
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_iters": 6,
            "checkpoint_interval": 3,
            "device": "cpu",
        },
        "tracking": {"uri": "none"},
    }
    config = folder / "small.yaml"
    config.write_text(json.dumps(tree))
    # In separate processes, so that no process group and no DeepSpeed setting reaches other tests.
    for command in ("prepare", "train"):
        processes.run([command, str(config)], 1, folder / f"{command}.log")
    assert load_config(config).name == "small"
    return open_run(folder / "runs" / "small")


def our_logits(run: Run, ids: torch.Tensor) -> torch.Tensor:
    model = TransformerLM(**run.config().model.model_dump())
    model.load_state_dict(load_weights(published(run.checkpoints)[0]))
    with torch.no_grad():
        return model.eval()(ids)


@pytest.mark.slow
def test_hugging_face_opens_the_export_and_gives_the_same_logits_and_tokens(trained: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export_run(trained, "hf")
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model.eval()(ids).logits
    torch.testing.assert_close(theirs, our_logits(trained, ids), rtol=0, atol=1e-4)

    own = Tokenizer.load(trained.tokenizer_file)
    theirs_tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "these truths , of 1776 ; are self-evident"
    assert theirs_tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    assert theirs_tokenizer.decode(own.encode(text)) == text
    assert theirs_tokenizer.eos_token_id == own.end_of_text_id == model.config.eos_token_id


def test_a_single_file_holds_the_weights_under_our_names(trained: Run) -> None:
    path = export_run(trained, "safetensors", step=3)
    expected = load_weights(trained.checkpoints / "step_00000003")
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_single_file_makes_its_folder_and_a_second_export_replaces_only_the_file(
    trained: Run, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    assert export_run(trained, "safetensors", step=3, output=path) == path
    (path.parent / "notes.txt").write_text("text")
    export_run(trained, "safetensors", step=6, output=path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["notes.txt", "weights.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "6"


def test_a_second_export_replaces_the_first_and_nothing_else(trained: Run) -> None:
    first = export_run(trained, "hf")
    assert export_run(trained, "hf") == first
    assert sorted(p.name for p in first.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not list(first.parent.glob(".*"))
    with safe_open(first / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "6"}


def a_text(folder: Path) -> None:
    (folder / "thesis.txt").write_text("text")


def a_text_and_a_config(folder: Path) -> None:
    a_text(folder)
    (folder / "config.json").write_text("{}")


def an_export_of_another_program(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def our_export_and_a_text(folder: Path) -> None:
    an_export_of_another_program(folder)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt", "step": "6"})
    a_text(folder)


@pytest.mark.parametrize("filled", [a_text, a_text_and_a_config, an_export_of_another_program, our_export_and_a_text])
def test_a_folder_that_holds_anything_but_an_export_is_rejected_and_left_unchanged(
    trained: Run, tmp_path: Path, filled: Callable[[Path], None]
) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    filled(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=rf"{folder}: .*--output") as rejected:
        export_run(trained, "hf", output=folder)
    assert ("thesis.txt" in before) == ("thesis.txt" in str(rejected.value))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_replaced_and_a_file_is_rejected(trained: Run, tmp_path: Path) -> None:
    file, empty = tmp_path / "thesis.txt", tmp_path / "empty"
    file.write_text("text")
    empty.mkdir()
    with pytest.raises(UsageError, match=rf"{file}: .*--output"):
        export_run(trained, "hf", output=file)
    assert file.read_text() == "text"
    assert export_run(trained, "hf", output=empty) == empty and (empty / "config.json").exists()


def test_an_unknown_step_or_format_is_rejected_with_the_valid_choices(trained: Run) -> None:
    with pytest.raises(UsageError, match="there are: 3, 6"):
        export_run(trained, "hf", step=5)
    with pytest.raises(UsageError, match="hf and safetensors"):
        export_run(trained, "gguf")
    with pytest.raises(UsageError, match="float32 and bfloat16"):
        export_run(trained, "hf", dtype="float16")


def test_exporting_imports_neither_transformers_nor_deepspeed(trained: Run, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.run.folder import open_run\n"
        "from pipeline.commands.export import export_run\n"
        f"export_run(open_run({str(trained.path)!r}), 'hf', output=Path({str(tmp_path / 'out')!r}))\n"
        "assert not {'transformers', 'deepspeed'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_verify_of_a_run_checks_every_checkpoint_and_the_dataset_and_names_what_is_damaged(
    trained: Run, tmp_path: Path
) -> None:
    assert len(verify_path(str(trained.path)).splitlines()) == 3  # steps 3 and 6, the dataset
    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    torn = copy / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    command = [sys.executable, "-m", "pipeline", "verify", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{torn}: is torn" in done.stderr and "step_00000006: all files" in done.stderr


def test_only_a_hugging_face_folder_can_be_registered(trained: Run) -> None:
    command = [sys.executable, "-m", "pipeline", "export", str(trained.path), "--register", "m"]
    done = subprocess.run([*command, "--format", "safetensors"], capture_output=True, text=True)
    assert done.returncode == 2 and "--format hf" in done.stderr


def test_a_tokenizer_that_adds_a_beginning_encodes_as_training_did_and_that_is_said(
    run: Run, save: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    save(1)
    export_run(run, "hf", output=run.path / "plain")
    assert (run.path / "plain" / "tokenizer.json").read_bytes() == run.tokenizer_file.read_bytes()
    assert capsys.readouterr().err == ""

    tree = json.loads(run.tokenizer_file.read_text())
    (end,) = tree["added_tokens"]
    begins = {"SpecialToken": {"id": end["content"], "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begins, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begins, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }
    moves_offsets = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tree["post_processor"] = {"type": "Sequence", "processors": [moves_offsets, template]}
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    run.tokenizer_file.write_text(json.dumps(tree))
    text = "a document of some length"
    assert tokenizers.Tokenizer.from_file(str(run.tokenizer_file)).encode(text).ids[0] == end["id"]

    folder = export_run(run, "hf")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert theirs == Tokenizer.load(run.tokenizer_file).encode(text)
    said = capsys.readouterr().err
    assert "post_processor" in said and "truncation" in said and "padding" not in said
