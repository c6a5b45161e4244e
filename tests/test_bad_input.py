"""Each kind of bad input gives one clear message and the documented exit status, and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.cli.main import main
from tests.cli.test_main import pipeline

TEXT = "We hold these truths to be self-evident, that all men are created equal. " * 60


def experiment(folder: Path, **changes: object) -> str:
    """Writes a tiny experiment into `folder`, with values changed by dotted key, and returns the config's path."""
    (folder / "text").mkdir(exist_ok=True)
    for name in ("train", "validation"):
        (folder / "text" / f"{name}.txt").write_text(TEXT)
    tree: dict = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {
            "path": str(folder / "tokens"),
            "sources": [
                {"name": name, "paths": [str(folder / "text" / f"{name}.txt")], "split": name}
                for name in ("train", "validation")
            ],
        },
        "tokenizer": {"kind": "bytes"},
        "model": {
            "vocab_size": 257, "context_length": 16, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32,
        },
        "optimizer": {
            "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_iters": 2, "cosine_cycle_iters": 6,
        },
        "train": {"batch_size": 4, "micro_batch_size": 4, "max_iters": 6, "device": "cpu"},
        "tracking": {"uri": "none"},
    }  # fmt: skip
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Runs a command in this process, to save the import of torch; returns its exit status and stderr."""
    monkeypatch.setattr("sys.argv", ["pipeline", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


def visible(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


BAD_CONFIGS = {
    "unknown key": ({"train.max_itres": 3}, "did you mean `max_iters`"),
    "wrong type": ({"train.max_iters": "soon"}, 'given "soon"'),
    "vocabulary too large for the dtype": ({"model.vocab_size": 70_000, "data.dtype": "uint16"}, "uint32 or auto"),
    "heads that do not divide the width": ({"model.num_heads": 3}, "multiple of num_heads"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("command", ["prepare", "train", "run"])
def test_a_bad_config_starts_nothing(case, command, tmp_path, monkeypatch, capsys):
    changes, words = BAD_CONFIGS[case]
    config = experiment(tmp_path, **changes)
    before = visible(tmp_path)
    status, err = run_here(monkeypatch, capsys, command, config)
    assert status == 2
    assert words in err and err.count("error:") == 1
    assert visible(tmp_path) == before


def test_bad_yaml_names_its_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("name: tiny\ntrain: {batch_size: 4\n")
    status, err = run_here(monkeypatch, capsys, "run", str(path))
    assert status == 2
    assert f"{path}: " in err and "YAML, line" in err


@pytest.mark.parametrize(
    ("content", "words"), [(None, "train.txt"), ("", "train.txt")], ids=["missing file", "empty file"]
)
def test_a_missing_or_empty_source_is_named(content, words, tmp_path, monkeypatch, capsys):
    config = experiment(tmp_path)
    source = tmp_path / "text" / "train.txt"
    source.unlink() if content is None else source.write_text(content)
    status, err = run_here(monkeypatch, capsys, "prepare", config)
    assert status == 1
    assert words in err or "train" in err
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_training_without_data_says_what_to_run(tmp_path, monkeypatch, capsys):
    status, err = run_here(monkeypatch, capsys, "train", experiment(tmp_path))
    assert status == 1
    assert "pipeline prepare" in err


def test_data_of_another_tokenizer_are_refused(tmp_path, monkeypatch, capsys):
    other = {"tokenizer.special_tokens": ["<|a|>"], "model.vocab_size": 258}
    assert run_here(monkeypatch, capsys, "prepare", experiment(tmp_path, **other))[0] == 0
    status, err = run_here(monkeypatch, capsys, "train", experiment(tmp_path))
    assert status == 1
    assert str(tmp_path / "tokens") in err and "special_tokens" in err and "<|a|>" in err


def test_a_token_id_beyond_the_vocabulary_is_refused_with_its_shard(tmp_path, monkeypatch, capsys):
    """As with a tokenizer from elsewhere that has more tokens than the model has embeddings."""
    assert run_here(monkeypatch, capsys, "prepare", experiment(tmp_path))[0] == 0
    taken = {"tokenizer": {"kind": "file", "path": str(tmp_path / "tokens" / "tokenizer.json")}}
    larger = taken | {"data.path": str(tmp_path / "others")}
    assert run_here(monkeypatch, capsys, "prepare", experiment(tmp_path, **larger))[0] == 0
    status, err = run_here(monkeypatch, capsys, "train", experiment(tmp_path, **larger, **{"model.vocab_size": 200}))
    assert status == 1
    assert "train.bin: " in err and "256" in err and "model.vocab_size is 200" in err
    assert not (tmp_path / "runs").exists()


def test_a_context_longer_than_the_data_is_refused(tmp_path, monkeypatch, capsys):
    config = experiment(tmp_path, **{"model.context_length": 100_000})
    assert run_here(monkeypatch, capsys, "prepare", config)[0] == 0
    status, err = run_here(monkeypatch, capsys, "train", config)
    assert status == 1
    assert "context_length" in err and "too few" in err


@pytest.mark.parametrize("key", ["runs_dir", "data.path"])
def test_a_folder_that_cannot_be_written_is_named(key, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    config = experiment(tmp_path, **{key: str(tmp_path / "file" / "below")})
    if key == "runs_dir":
        assert run_here(monkeypatch, capsys, "prepare", config)[0] == 0
    before = visible(tmp_path)
    status, err = run_here(monkeypatch, capsys, "train" if key == "runs_dir" else "prepare", config)
    assert status == 1
    assert str(tmp_path / "file" / "below") in err
    assert visible(tmp_path) == before


def test_no_traceback_reaches_a_user_in_a_real_process(tmp_path):
    done = pipeline("train", experiment(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "pipeline: error:" in done.stderr
