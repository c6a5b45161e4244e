"""A start opens its dataset once, however many checks it makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.data import dataset
from pipeline.data.build.build import prepare
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import DataError
from pipeline.run.folder import run_for
from pipeline.train.startup import open_session
from tests import experiment


def test_a_resumed_start_opens_the_dataset_once_and_still_compares_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(experiment.write_experiment(tmp_path, tmp_path / "runs", "once")))
    manifest = prepare(config)
    with open_session(config):
        pass
    looked_at, hashed, loaded = Counter[Path](), [], []
    stat, sha256_file, load = Path.stat, dataset.sha256_file, DatasetManifest.load
    monkeypatch.setattr(Path, "stat", lambda self, **options: (looked_at.update([self]), stat(self, **options))[1])
    monkeypatch.setattr(dataset, "sha256_file", lambda file: (hashed.append(file), sha256_file(file))[1])
    monkeypatch.setattr(DatasetManifest, "load", lambda path: (loaded.append(path), load(path))[1])
    tokenizer = run_for(config).tokenizer_file
    assert tokenizer.exists()
    with open_session(config):
        pass
    folder = Path(config.data.path)
    shards = [folder / name for shard in manifest.shards for name in shard.sizes(manifest.numpy_dtype)]
    assert {file: looked_at[file] for file in shards} == dict.fromkeys(shards, 1)
    assert loaded == [folder] and hashed == [folder / TOKENIZER]

    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(DataError, match=manifest.tokenizer_digest[:12]), open_session(config):
        pass
