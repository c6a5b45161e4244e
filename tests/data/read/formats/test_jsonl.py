"""JSON lines of every shape give their text field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.build.build import prepare
from tests.data.helpers import FORMAT_TEXTS, built_texts, config, jsonl, one_source, split_texts, write


def test_another_field_and_unusual_lines_of_json(tmp_path: Path) -> None:
    lines = [
        '{"body": "one", "text": 3}',
        "",
        ' {"body" : "t\\u0077o \\ud83d\\ude42"}\r',
        '{"text": null, "body": "three", "deep": {"body": [1, {"body": "not me"}]}}',
        '{"body": "first", "body": "last wins"}',
        '{"id": ' + "1" * 5000 + ', "body": "more digits than Python converts"}',
    ]
    path = write(tmp_path / "all.jsonl", "\n".join(lines).encode())
    expected = ["one", "two 🙂", "three", "last wins", "more digits than Python converts"]
    assert built_texts(tmp_path, path, field="body") == expected


def test_lines_that_end_as_on_windows_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.read.formats.jsonl.JsonLines._parse_line", None)
    path = write(tmp_path / "all.jsonl", jsonl(FORMAT_TEXTS).replace(b"\n", b"\r\n"))
    assert built_texts(tmp_path, path) == FORMAT_TEXTS


def test_whether_a_line_is_too_long_depends_only_on_its_text(tmp_path: Path) -> None:
    # Each line is longer than a document may be; some lines cross the end of a block.
    lines = [json.dumps({"text": f"{i}" * 700_000, "more": "m" * 700_000}) for i in range(8)]
    lines[5] = json.dumps({"text": "5" * 1_000_001})
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    for slice_size_mb in (64.0, 0.3):
        out = tmp_path / f"out{slice_size_mb}"
        made = config(
            out,
            [one_source(path)],
            on_bad="skip",
            max_bad_fraction=0.9,
            max_document_mb=1.0,
            slice_size_mb=slice_size_mb,
        )
        assert prepare(made).bad == {"document too long": 1}
        assert [text[0] for text in split_texts(out)] == list("0123467")
