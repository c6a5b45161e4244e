"""Verifying reads every byte of a dataset and names every file that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.sections import Config
from pipeline.data.dataset import open_dataset, open_splits
from pipeline.data.layout import MANIFEST, PLAN, TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError
from tests.data.helpers import a_shard, command


def test_verify_and_data_verify_name_changed_bytes_of_the_right_size(copy: Path) -> None:
    shard = a_shard(copy)
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    index = shard.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[::-1])
    open_dataset(copy, "train")  # the size is right
    for check in (lambda: verify_dataset(copy), lambda: open_splits(copy, verify=True)):
        with pytest.raises(DataError, match=rf"^{copy}: 2 of \d+ files") as caught:
            check()
        assert str(shard) in str(caught.value) and str(index) in str(caught.value)


def test_a_changed_tokenizer_and_a_missing_shard_are_named_together(copy: Path) -> None:
    tokenizer, shard = copy / TOKENIZER, a_shard(copy)
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    shard.unlink()
    with pytest.raises(DataError, match=rf"^{copy}: 2 of \d+ files") as caught:
        verify_dataset(copy)
    assert f"{tokenizer}: sha256 is" in str(caught.value) and f"{shard}: cannot be read" in str(caught.value)


def test_verify_reads_everything_and_reports_progress(made: Config) -> None:
    seen: list[tuple[int, int]] = []
    done = verify_dataset(made.data.path, lambda *progress: seen.append(progress))
    manifest = DatasetManifest.load(made.data.path)
    assert done.files == 2 * len(manifest.shards) + 1 == len(seen)
    assert seen[-1] == (done.bytes, done.bytes) and done.digest == manifest.digest


def test_the_verify_command_prints_what_it_compared(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command("prepare", str(files[0]))
    assert command("verify", str(files[1])) == 0
    assert "all 3 files" in capsys.readouterr().out
    (shard,) = files[1].rglob("train.bin")
    shard.write_bytes(shard.read_bytes()[::-1])
    assert command("verify", str(files[1])) == 1
    assert str(shard) in capsys.readouterr().err
    assert command("verify", str(files[0].parent)) == 2


def test_the_verify_command_recognises_a_dataset_by_its_manifest(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command("prepare", str(files[0]))
    (files[1] / PLAN).unlink()
    assert command("verify", str(files[1])) == 0
    assert "all 3 files" in capsys.readouterr().out
    (files[1] / MANIFEST).write_text("{}")
    assert command("verify", str(files[1])) == 1
