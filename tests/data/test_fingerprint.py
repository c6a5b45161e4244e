"""A finished dataset serves any config that describes its documents and tokens, wherever its text is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import DataError
from tests.data.helpers import config, documents, jsonl, write

SOURCES = [
    {"name": "a", "paths": ["a.jsonl"], "split": "train"},
    {"name": "b", "paths": ["b.jsonl"]},
]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", jsonl(documents(30, seed=1)))
    write(tmp_path / "b.jsonl", jsonl(documents(60, seed=2)))
    result = config(tmp_path / "out", SOURCES, validation_fraction=0.3)
    prepare(result)
    return result


def _with(source: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**entry, **changes} if number == source else entry for number, entry in enumerate(SOURCES)]


def _check(made: Config, sources: Any = SOURCES, tokenizer: Any = None, **data: Any) -> None:
    path = Path(made.data.path)
    wanted = config(path, sources, tokenizer=tokenizer, **{"validation_fraction": 0.3, **data})
    refuse_other_settings(path, DatasetManifest.load(path).settings, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_fraction": 0.01}, "validation_fraction: 0.3 .*0.01"),
        ({"max_document_mb": 1.0}, "max_document_mb: 32.0 .*1.0"),
        ({"sources": _with(0, field="other")}, "sources.a.field: 'text' .*'other'"),
        ({"sources": _with(0, where="id < 9")}, r"sources.a.where: None .*'id < 9\.0'"),
        ({"sources": _with(1, split="train")}, "sources.b.split: 'auto' .*'train'"),
        ({"sources": _with(1, separator="|")}, "sources.b.separator: None .*'\\|'"),
        ({"sources": SOURCES[:1]}, "sources.b: was there"),
        ({"sources": [*SOURCES, {"name": "c", "paths": ["c.txt"]}]}, "sources.c: is new"),
        ({"tokenizer": {"kind": "bytes", "special_tokens": ["<|x|>"]}}, r"tokenizer\.special_tokens: \[\]"),
    ],
)
def test_settings_that_change_documents_or_tokens_are_refused(change: dict[str, Any], words: str, made: Config) -> None:
    with pytest.raises(DataError, match=words) as caught:
        _check(made, **change)
    assert str(caught.value).startswith(f"{made.data.path}: ")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sources": [{**entry, "paths": ["/nowhere/*.jsonl"]} for entry in SOURCES]},
        {"sources": _with(1, weight=3.0), "mixing": "weighted", "order": "random"},
        {"sources": SOURCES[::-1]},
        {"slice_size_mb": 1.0, "dtype": "uint16", "on_bad": "skip", "verify": True},
    ],
)
def test_settings_that_change_no_document_are_accepted_without_the_text(change: dict[str, Any], made: Config) -> None:
    Path("a.jsonl").unlink()
    _check(made, **change)
