"""Chunks hold the documents that can be used; blank and bad ones are counted."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.data.build.build import prepare
from tests.data.helpers import built_texts, config, jsonl, split_texts, write


def test_blank_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", jsonl(["a", "", " \n\t", "b"]))
    assert built_texts(tmp_path, path) == ["a", "b"]
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"][0]
    assert (source["records"], source["empty"]) == (4, 2)


def test_an_empty_text_file_is_an_empty_document_and_an_empty_jsonl_file_has_none(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.txt"):
        write(tmp_path / name, b"text" if name == "c.txt" else b"")
    made = config(
        tmp_path / "out",
        [{"name": "s", "paths": [str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl")], "split": "train"}],
    )
    source = prepare(made).sources[0]
    assert (source["records"], source["empty"], source["bad"]) == (2, 1, {})
    assert split_texts(tmp_path / "out") == ["text"]
