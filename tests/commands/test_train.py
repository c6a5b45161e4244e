"""What a person sees of `pipeline train`, from its first to its last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run.folder import Run
from tests.data.helpers import command

STEPS = ("train.max_iters=2", "train.val_interval=2", "train.num_val_batches=1", "tracking.uri=none")


def test_the_end_says_what_came_out_and_what_to_do_next(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, wider = f"name={tmp_path.name}", "model.vocab_size=260"
    assert command("train", str(tmp_path / "config.yaml"), name, wider, *STEPS) == 0
    said = capsys.readouterr().err
    assert "model.vocab_size is 3 more than the tokenizer's" in " ".join(said.split())
    *_, end = said.partition("finished: step 2, ")
    assert "validation loss" in end
    made = run.path.with_name(tmp_path.name)
    for subcommand in ("sample", "report"):
        assert f"pipeline {subcommand} {made}" in end
