"""A run that an earlier version created opens with the keys it does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.errors import UsageError
from pipeline.run.folder import create_run
from tests.experiment import write_experiment

ADDED = ("num_kv_heads", "head_dim", "tie_embeddings", "qkv_bias", "qk_norm", "norm_eps", "rope_scaling")


def test_a_run_without_the_keys_of_later_versions_opens_and_another_value_of_theirs_is_refused(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, tmp_path / "runs", "old")
    run = create_run(load_config(file))
    tree = yaml.safe_load(run.config_file.read_text())
    for key in ADDED:
        del tree["model"][key]
    tree.pop("init", None)
    run.config_file.write_text(yaml.safe_dump(tree))
    assert create_run(load_config(file)).config() == load_config(file)
    with pytest.raises(UsageError, match="num_kv_heads"):
        create_run(load_config(file, ["model.num_kv_heads=1"]))
