"""Sampling from a checkpoint: deterministic, with the prompt, and recorded in the run folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.commands.sample import sample_run
from pipeline.errors import CheckpointError, UsageError
from pipeline.run.folder import Run


def test_the_same_seed_gives_the_same_texts_from_the_newest_checkpoint(run: Run, save: Callable[..., None]) -> None:
    save(1)
    older = sample_run(run, "We", count=2, seed=3)
    save(2)
    texts = sample_run(run, "We", count=2, seed=3)
    assert texts != older and texts[0] != texts[1]
    assert all(text.startswith("We") and len(text) > 2 for text in texts)
    assert sample_run(run, "We", count=2, seed=3) == texts
    assert sample_run(run, "We", count=2, seed=4) != texts
    assert (run.samples / "step_00000002.txt").read_text() != ""


def test_the_texts_are_written_to_the_run_folder_and_begin_with_the_configs_prompt(
    run: Run, save: Callable[..., None]
) -> None:
    save(1)
    (text,) = sample_run(run)
    assert text.startswith(run.config().sample.prompt)
    assert (run.samples / "step_00000001.txt").read_bytes().decode() == text + "\n"


def test_an_empty_prompt_and_a_run_without_checkpoints_are_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="prompt"):
        sample_run(run, "")
    with pytest.raises(CheckpointError):
        sample_run(run, "We")
