"""What was changed since a build began is noticed and refused, not mixed in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import build
from pipeline.data.build import prepare
from pipeline.errors import DataError
from tests.data.every_kind import TEXTS, config_of_every_kind, paths_of_every_kind
from tests.data.helpers import COMPRESS, config, dataset_digest, jsonl, write, write_parquet


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_fraction": 0.2}, "validation_fraction: 0.1 then, 0.2 now"),
        ({"slice_size_mb": 1.0}, "slice_size_mb: 0.003 then, 1.0 now"),
        ({"dtype": "uint32"}, "dtype: 'auto' then, 'uint32' now"),
        ({"max_document_mb": 64.0}, "max_document_mb: 32.0 then, 64.0 now"),
    ],
)
def test_a_changed_setting_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "out"), slice_spec=(1, 2))
    with pytest.raises(DataError, match=words):
        prepare(config_of_every_kind(tmp_path, "out", **change))


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    smaller = made.model_copy(update={"model": made.model.model_copy(update={"vocab_size": 280})})
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 300 then, 280 now"):
        prepare(smaller)
    file = tmp_path / "out" / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(made)


def test_another_tokenizer_file_is_refused(tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "bpe"))
    file = tmp_path / "tokenizer.json"
    shutil.copy(tmp_path / "bpe" / "tokenizer.json", file)
    entry = paths_of_every_kind(tmp_path / "in")
    made = config(tmp_path / "out", entry, tokenizer={"kind": "file", "path": str(file)}, slice_size_mb=0.003)
    prepare(made, slice_spec=(1, 2))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"is not the tokenizer that .* was begun with"):
        prepare(made)


@pytest.mark.parametrize("name", ["whole/07.txt", "lines.jsonl", "packed.jsonl.gz", "rows.parquet"])
def test_a_changed_source_is_refused_and_a_touched_one_is_not(name: str, tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made)
    (tmp_path / "out" / "manifest.json").unlink()
    before = dataset_digest(tmp_path / "out")
    file = tmp_path / "in" / name
    content = file.read_bytes()
    file.write_bytes(content)
    prepare(made)
    assert before.items() <= dataset_digest(tmp_path / "out").items()
    if name.endswith(".gz"):
        texts = ["X" + t[1:] for t in TEXTS[150:230] * 4]
        changed = COMPRESS["gz"](jsonl(texts))
        changed = changed[: len(content)].ljust(len(content), b"\0")
    elif name.endswith(".parquet"):
        write_parquet(file, [t.replace("state", "State") for t in TEXTS[230:]])
        changed = file.read_bytes()
    else:
        changed = content.replace(b"in", b"on")
    assert changed != content
    file.write_bytes(changed)
    with pytest.raises(DataError, match=f"{Path(name).name}: (was changed after|had {len(content)} bytes then)"):
        prepare(made)


def test_files_that_come_or_go_are_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    new = write(tmp_path / "in" / "whole" / "99.txt", b"new")
    with pytest.raises(DataError, match=r"99\.txt: is new"):
        prepare(made)
    new.unlink()
    (tmp_path / "in" / "whole" / "00.txt").unlink()
    with pytest.raises(DataError, match=r"00\.txt: was there then, is not now"):
        prepare(made)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config_of_every_kind(tmp_path, "out")
    monkeypatch.setattr(build, "stamp_of", lambda _: (0, 0, 0))
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare(made)
