"""A new config is an example under another name, is valid as it stands, and replaces nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commands.new import EXAMPLES, recipes
from pipeline.config.load import load_config
from pipeline.image.wheels import PROJECT_PARTS
from pipeline.launch.site import load_site
from tests.cli.test_main import ROOT
from tests.data.helpers import command
from tests.huggingface.folders import described, saved_by_transformers

# What a new file says differently.
OWN = {"name", "data.path", "tracking.experiment"}


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: value for key, inner in tree.items() for path, value in leaves(inner, f"{prefix}.{key}").items()}


def difference(one: Path, other: Path) -> set[str]:
    a, b = (leaves(yaml.safe_load(file.read_text())) for file in (one, other))
    return {path.lstrip(".") for path in a.keys() | b.keys() if a.get(path) != b.get(path)}


@pytest.mark.parametrize("recipe", recipes())
def test_a_new_config_is_the_example_under_another_name(recipe: str, tmp_path: Path):
    file = tmp_path / "first-try.yaml"
    assert command("new", str(file), "--like", recipe) == 0
    example = ROOT / "configs" / f"{recipe}.yaml"
    assert difference(file, example) == OWN
    assert load_config(file).name == "first-try"
    comments = [line.partition("#")[2] for line in example.read_text().splitlines()[3:] if "#" in line]
    assert all(comment in file.read_text() for comment in comments)


def test_the_editor_finds_the_schema_from_any_folder(tmp_path: Path):
    assert command("new", str(tmp_path / "a.yaml"), "--site", str(tmp_path / "s.yaml")) == 0
    for file, key in ((tmp_path / "a.yaml", "optimizer"), (tmp_path / "s.yaml", "partition")):
        schema = Path(file.read_text().splitlines()[0].partition("$schema=")[2])
        assert schema.is_absolute() and key in schema.read_text() and json.loads(schema.read_text())
    assert load_site(tmp_path / "s.yaml").name == "s"
    assert difference(tmp_path / "s.yaml", ROOT / "slurm/sites/gpu.yaml") == {"name"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["new.yaml", "--site", "old.yaml"], "old.yaml"),
        (["old.yaml", "--site", "new.yaml"], "old.yaml"),
        (["link.yaml"], "link.yaml"),
        (["new.yaml", "--like", "1bb"], "did you mean 1b?"),
        (["new.yaml", "--like", "demo", "--from", "hf:x"], "--from"),
        (["new.yaml", "--from", "runs/demo"], "runs/demo"),
        (["new.yaml", "--from", "hf:absent"], "absent"),
        (["new"], "NAME.yaml"),
        (["a b.yaml"], "a b.yaml"),
    ],
)
def test_what_cannot_be_written_leaves_everything_as_it_was(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("mine")
    Path("link.yaml").symlink_to("nowhere.yaml")
    assert command("new", *arguments) == 2
    assert named in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"old.yaml", "link.yaml"}
    assert Path("old.yaml").read_text() == "mine"


@pytest.mark.parametrize("shape", ["SmolLM2", "Llama-3.2", "Qwen2.5", "Qwen3"])
def test_a_config_from_open_weights_describes_them(shape: str, tmp_path: Path):
    folder = tmp_path / "the weights"
    saved_by_transformers(folder, shape)
    tokens = {"added_tokens": [{"id": 7, "content": "<pad>"}, {"id": 2, "content": "</s>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    about = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 7]}
    (folder / "config.json").write_text(json.dumps(about))
    assert command("new", str(tmp_path / "more.yaml"), "--from", f"hf:{folder}") == 0
    config, example = load_config(tmp_path / "more.yaml"), load_config(ROOT / "configs/demo.yaml")
    assert config.model == described(folder)
    assert config.tokenizer.kind == "file" and config.tokenizer.path == str(folder / "tokenizer.json")
    assert config.tokenizer.end_of_text == "</s>"
    assert config.init.folder == folder
    assert 5 * config.optimizer.learning_rate == pytest.approx(example.optimizer.learning_rate)
    changed = {path.split(".")[0] for path in difference(tmp_path / "more.yaml", ROOT / "configs/demo.yaml") - OWN}
    assert changed == {"tokenizer", "model", "init", "optimizer"}


def test_weights_without_an_end_of_text_token_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved_by_transformers(tmp_path / "weights", "SmolLM2")
    assert command("new", str(tmp_path / "more.yaml"), "--from", f"hf:{tmp_path / 'weights'}") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "more.yaml").exists()


def test_the_wheel_holds_the_examples(tmp_path: Path):
    for name in PROJECT_PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    packed = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)
    for folder in ("configs", "sites"):
        files = {f"pipeline/examples/{folder}/{file.name}" for file in (EXAMPLES / folder).iterdir()}
        assert files and files <= packed
