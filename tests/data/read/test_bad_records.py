"""Each kind of bad record has its message, stops the build or is counted, and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import dump_config
from pipeline.data.build.build import prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.bad_records import BadRecordPolicy, check_lost_fraction
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from tests.data.helpers import (
    command,
    config,
    documents,
    jsonl,
    one_source,
    split_texts,
    tree_digest,
    write,
)

GOOD = ["first good", "second good"]


def _lines(bad: bytes) -> bytes:
    good = jsonl(GOOD).split(b"\n")
    return good[0] + b"\n" + bad + b"\n" + good[1] + b"\n"


# Name of the file, its content, further settings of the source, words of the message, reason, good documents.
CASES: dict[str, tuple[str, bytes, dict[str, Any], list[str], str, list[str]]] = {
    "invalid UTF-8 in a text file": (
        "a.txt",
        b"line one\nline \xff two",
        {},
        ["line 2, byte 14", "invalid UTF-8 (invalid start byte)"],
        "invalid UTF-8",
        [],
    ),
    "invalid UTF-8 between separators": (
        "a.txt",
        b"one|t\xc3(o|three",
        {"separator": "|"},
        ["line 1, byte 5", "invalid UTF-8"],
        "invalid UTF-8",
        ["one", "three"],
    ),
    "invalid UTF-8 in a line": (
        "a.jsonl",
        _lines(b'{"text": "\xe9"}'),
        {},
        ["line 2, byte 42", "invalid UTF-8"],
        "invalid UTF-8",
        GOOD,
    ),
    "half a surrogate pair": (
        "a.jsonl",
        _lines(b'{"text": "\\ud800"}'),
        {},
        ["line 2", "surrogate"],
        "invalid UTF-8",
        GOOD,
    ),
    "invalid JSON": (
        "a.jsonl",
        _lines(b'{"text": "a" "b"}'),
        {},
        ["line 2, byte 45", "invalid JSON (Expecting ',' delimiter)"],
        "invalid JSON",
        GOOD,
    ),
    "two records in one line": (
        "a.jsonl",
        _lines(b'{"text": "a"} {"text": "b"}'),
        {},
        ["line 2", "Extra data"],
        "invalid JSON",
        GOOD,
    ),
    "a record over two lines": (
        "a.jsonl",
        _lines(b'{"text":\n"a"}'),
        {},
        ["line 2", "invalid JSON"],
        "invalid JSON",
        GOOD,
    ),
    "two records in one line, and a blank one": (
        "a.jsonl",
        _lines(b'{"text": "a"} {"text": "b"}\n'),
        {},
        ["line 2", "Extra data"],
        "invalid JSON",
        GOOD,
    ),
    "two records in one line, and one over two": (
        "a.jsonl",
        _lines(b'{"text":\n"a"}\n{"text": "a"} {"text": "b"}'),
        {},
        ["line 2", "invalid JSON"],
        "invalid JSON",
        GOOD,
    ),
    "a number as long as no number": (
        "a.jsonl",
        _lines(b'{"text": ' + b"1" * 5000 + b"}"),
        {},
        ["line 2", "field is no string"],
        "field is no string",
        GOOD,
    ),
    "missing field": (
        "a.jsonl",
        _lines(b'{"txt": "a", "id": 3}'),
        {},
        ["line 2, byte 32", "missing field", "'txt', 'id'", "`field`"],
        "missing field",
        GOOD,
    ),
    "no object": ("a.jsonl", _lines(b'["text"]'), {}, ["line 2", "JSON object"], "missing field", GOOD),
    "field is no string": (
        "a.jsonl",
        _lines(b'{"text": 17}'),
        {},
        ["line 2", "field is no string", "'text' is 17"],
        "field is no string",
        GOOD,
    ),
    "field is null": ("a.jsonl", _lines(b'{"text": null}'), {}, ["line 2", "is null"], "field is no string", GOOD),
    "document too long": (
        "a.jsonl",
        _lines(b'{"text": "' + b"x" * 2_000_000 + b'"}'),
        {},
        ["line 2", "document too long", "max_document_mb"],
        "document too long",
        GOOD,
    ),
    "one text file too long": (
        "a.txt",
        b"x " * 1_000_000,
        {},
        ["document too long", "`separator`"],
        "document too long",
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_stops_at_the_record_and_names_it(case: str, tmp_path: Path) -> None:
    name, content, source, words, _, _ = CASES[case]
    path = write(tmp_path / "in" / name, content)
    with pytest.raises(DataError) as caught:
        prepare(config(tmp_path / "out", [one_source(path, **source)], max_document_mb=1.0))
    for word in [str(path), *words, "on_bad=skip"]:
        assert word in str(caught.value)
    assert not any(p.suffix == ".bin" or p.name == "manifest.json" for p in (tmp_path / "out").rglob("*"))
    assert not any(p.name.endswith(".tmp") for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match="not finished"):
        DatasetManifest.load(tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_skip_counts_by_reason_and_keeps_the_rest(case: str, tmp_path: Path) -> None:
    name, content, source, _, reason, good = CASES[case]
    path = write(tmp_path / "in" / name, content)
    other = write(tmp_path / "in" / "other.jsonl", jsonl(["other"]))
    entries = [one_source(path, **source), {**one_source(other), "name": "other"}]
    manifest = prepare(config(tmp_path / "out", entries, max_document_mb=1.0, on_bad="skip", max_bad_fraction=0.9))
    assert set(manifest.bad) == {reason}
    assert split_texts(tmp_path / "out") == [*good, "other"]
    assert manifest.sources[0]["records"] == sum(manifest.bad.values()) + len(good)


@pytest.mark.parametrize("case", CASES)
def test_the_command_prints_one_message_and_exits_with_1(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, source, words, _, _ = CASES[case]
    path = write(tmp_path / "in" / name, content)
    made = config(tmp_path / "out", [one_source(path, **source)], max_document_mb=1.0)
    file = write(tmp_path / "c.yaml", dump_config(made).encode())
    monkeypatch.chdir(tmp_path)
    assert command("prepare", str(file)) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"pipeline: error: {path}, ") and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words)
    assert printed.out == ""
    # No reader takes what is there now for a dataset.
    for reader in ("inspect", "verify"):
        assert command(reader, str(tmp_path / "out")) == 1
        assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "status", "words"),
    [
        ("data.on_bad=ignore", 2, ["data.on_bad", "error or skip"]),
        ("data.max_bad_fraction=1.5", 2, ["data.max_bad_fraction"]),
        ("data.slice_size_mb=0", 2, ["data.slice_size_mb"]),
        ("data.sources.0.paths=[nothing/*.txt]", 1, ["'nothing/*.txt'", "matches no file"]),
        ("tokenizer.path=nothing.json", 2, ["tokenizer.path"]),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    setting: str,
    status: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = config(tmp_path / "out", [one_source(write(tmp_path / "a.txt", b"text"))])
    file = write(tmp_path / "c.yaml", dump_config(made).encode())
    monkeypatch.chdir(tmp_path)
    assert command("prepare", str(file), setting) == status
    err = capsys.readouterr().err
    assert err.startswith("pipeline: error: ") and "Traceback" not in err
    assert all(word in err for word in words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_too_many_skipped_records_stop_the_build(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(documents(80)) + b"{}\n" * 20)
    with pytest.raises(DataError, match=r"20 of 100 .*20 x missing field.*20\.00%.*10\.00%"):
        prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.1))
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Finished slices are kept: with another limit nothing is built again.
    before = tree_digest(tmp_path / "out")
    assert prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.3)).bad == {
        "missing field": 20
    }
    assert before.items() <= tree_digest(tmp_path / "out").items()


def test_the_bad_fraction_is_that_of_all_records_wherever_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" * 200 + jsonl(["word " * 40] * 30_000))
    made = config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.01)
    assert prepare(made).bad == {"missing field": 200}


def test_a_dataset_with_skipped_records_is_refused_under_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(documents(80)) + b"{}\n")
    prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.3))
    with pytest.raises(DataError, match=r"data\.on_bad=skip"):
        prepare(config(tmp_path / "out", [one_source(path)]))


def test_nothing_that_could_not_be_read_is_no_reason(tmp_path: Path) -> None:
    for policy in ("error", "skip"):
        found = BadRecordPolicy(policy)
        found.report("unreadable Arrow", "a.arrow", lambda: "row 0", records=0)
        assert not found.take()
    # Datasets of older versions may say that of an empty file.
    made = config(tmp_path / "out", [one_source(write(tmp_path / "a.jsonl", jsonl(GOOD)))])
    prepare(made)
    (file,) = (tmp_path / "out" / "slices").glob("*/slice.json")
    write_json(file, {**read_json(file), "bad": {"unreadable Parquet": 0}})
    prepare(made)


def test_lost_input_is_measured_in_bytes_and_the_message_names_the_limit() -> None:
    check_lost_fraction(10, 1000, 0.01)
    check_lost_fraction(0, 0, 0.0)
    with pytest.raises(DataError, match=r"11 of 1000 bytes.* 1\.10% .*data\.max_bad_fraction = 1\.00%"):
        check_lost_fraction(11, 1000, 0.01)
