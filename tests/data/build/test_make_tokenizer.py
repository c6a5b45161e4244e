"""A dataset keeps the tokenizer that it was begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.data.build import make_tokenizer, tasks
from pipeline.data.build.build import prepare
from pipeline.data.layout import TOKENIZER
from pipeline.errors import DataError
from tests.data.every_kind import config_of_every_kind, paths_of_every_kind
from tests.data.helpers import config, documents, one_source, write


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    made = config_of_every_kind(tmp_path, "out")
    prepare(made, slice_spec=(1, 2))
    file = tmp_path / "out" / TOKENIZER
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(made)


def test_another_tokenizer_file_is_refused(tmp_path: Path) -> None:
    prepare(config_of_every_kind(tmp_path, "bpe"))
    file = tmp_path / TOKENIZER
    shutil.copy(tmp_path / "bpe" / TOKENIZER, file)
    entry = paths_of_every_kind(tmp_path / "in")
    made = config(tmp_path / "out", entry, tokenizer={"kind": "file", "path": str(file)}, slice_size_mb=0.003)
    prepare(made, slice_spec=(1, 2))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=f"^{file}: .*{tmp_path / 'out'}"):
        prepare(made)
    file.unlink()
    with pytest.raises(DataError, match=f"tokenizer.path: {file}"):
        prepare(made)


def test_sampling_measures_each_text_once_however_many_tasks_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(documents(80)):
        write(tmp_path / "in" / f"{number:02d}.txt", text.encode())
    made = config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], tokenizer={"kind": "bpe"})
    made = made.model_copy(update={"data": made.data.model_copy(update={"slice_size_mb": 1e-5})})
    measured = []
    monkeypatch.setattr(make_tokenizer, "len", lambda value: measured.append(value) or len(value), raising=False)
    assert make_tokenizer._sample(made, tasks.make_plan(made))
    assert len(measured) < 20 * 80


def test_a_bpe_that_cannot_reach_its_size_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"ab ab ab ab")
    said: list[str] = []
    made = config(tmp_path / "out", [one_source(path)], tokenizer={"kind": "bpe"})
    prepare(made, progress=lambda now: said.append(now.message or ""))
    wanted = made.model.vocab_size
    tokens = len(json.loads((tmp_path / "out" / TOKENIZER).read_text())["model"]["vocab"]) + 1
    assert any(str(tokens) in words and str(wanted) in words for words in said) and tokens < wanted
