"""Validation reads the same windows of each source every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from pipeline.data.dataset import open_dataset
from pipeline.data.manifest import DatasetManifest
from pipeline.data.order.validation import validation_windows
from pipeline.errors import DataError
from tests.data.helpers import config, write

CONTEXT = 16


def _tokens(path: str, source: str) -> torch.Tensor:
    manifest = DatasetManifest.load(path)
    shards = [s for s in manifest.splits["validation"].shards if s.source == source]
    read = [np.fromfile(Path(path) / s.file, manifest.numpy_dtype) for s in shards]
    return torch.from_numpy(np.concatenate(read).astype(np.int64))


def test_the_windows_of_a_source_are_fixed_do_not_overlap_and_hold_nothing_else(made: Config) -> None:
    dataset = open_dataset(made.data.path, "validation")
    found = validation_windows(dataset, CONTEXT)
    assert [windows.name for windows in found] == ["a", "b"]
    assert sum(windows.tokens for windows in found) == len(dataset)
    assert sum(windows.bytes for windows in found) == dataset.bytes
    for windows in found:
        tokens = _tokens(made.data.path, windows.name)
        assert windows.tokens == len(tokens) and windows.count == (len(tokens) - 1) // CONTEXT
        x, y = windows.batch(0, windows.count + 5)
        assert torch.equal(x.flatten(), tokens[: windows.count * CONTEXT])
        assert torch.equal(y.flatten(), tokens[1 : windows.count * CONTEXT + 1])
        assert windows.targets(1, 3) == 2 * CONTEXT
        (whole,) = (w for w in validation_windows(dataset, len(tokens) - 1) if w.name == windows.name)
        assert whole.count == 1, "the last window may end with the last token"


def test_a_source_shorter_than_a_window_is_one_window_and_only_its_own_tokens_count(tmp_path: Path) -> None:
    """Validation-only sources beside one that is trained on."""
    sources = [
        {"name": name, "paths": [str(write(tmp_path / f"{name}.txt", text))], "split": split}
        for name, text, split in (("long", b"x" * 99, "train"), ("short", b"abc", "validation"))
    ]
    sources.append({**sources[0], "name": "other", "split": "validation", "paths": [str(tmp_path / "other.txt")]})
    write(tmp_path / "other.txt", b"y" * 30)
    prepare(config(tmp_path / "out", sources))
    short, other = validation_windows(open_dataset(tmp_path / "out", "validation"), 8)
    assert (short.name, short.count, short.targets(0, 1)) == ("short", 1, 3)
    x, y = short.batch(0, 1)
    end = int(_tokens(str(tmp_path / "out"), "short")[-1])
    assert x.tolist() == [[*b"abc", 0, 0, 0, 0, 0]]
    assert y.tolist() == [[*b"bc", end, *[-1] * 5]]
    assert (other.name, other.count) == ("other", 3)


@pytest.mark.parametrize(("changes", "words"), [({"tokens": 1}, "tokens: 1"), ({"text_bytes": 0}, "bytes of text: 0")])
def test_a_source_that_cannot_be_measured_is_named_before_a_run_begins(
    changes: dict[str, int], words: str, made: Config
) -> None:
    """An older version adopted such sources; a tokenizer that drops characters makes them too."""
    dataset = open_dataset(made.data.path, "validation")
    shards = [replace(s, **changes) for s in dataset.stream.shards if s.source == "b"][:1]
    dataset.stream.shards = tuple(s for s in dataset.stream.shards if s.source == "a") + tuple(shards)
    with pytest.raises(DataError, match=rf"{made.data.path}: source b .*{words}.*; give it more text"):
        validation_windows(dataset, CONTEXT)
