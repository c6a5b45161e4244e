"""JSON lines of every shape give their text field."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build.build import prepare
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.chunks import ChunkBuilder
from pipeline.data.read.formats.jsonl import JsonLines
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


NUMBERS = [
    "0",
    "-0",
    "1.5",
    "1e400",
    "9" * 400,
    "01",
    ".5",
    "NaN",
    "Infinity",
    "Inf",
    "-Inf",
    "-NaN",
    "+Inf",
    "nan",
    "1_0",
]
STRINGS = ['"a"', '""', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\x"', '"é"', '"\t"', '"b', "'a'", '"en"']
DEEP = ["[" * 1500 + "]" * 1500, '{"a":' * 1500 + "1" + "}" * 1500]
OTHERS = ["true", "null", "None", "[1,]", "[Inf]", '{"a": -NaN}', *DEEP]


def _line(rng: random.Random) -> bytes:
    """A line that may be JSON, or nearly; seldom one without a text."""
    values = {
        "text": rng.choice(STRINGS[:3] * 5 + STRINGS + NUMBERS),
        "lang": rng.choice(['"en"', '"de"', "null", *STRINGS]),
        "score": rng.choice(NUMBERS),
        "other": rng.choice(NUMBERS + OTHERS + STRINGS),
    }
    fields = [f'"{name}": {values[name]}' for name in rng.sample(list(values), rng.randint(2, 4))]
    return (
        rng.choice(["", "", "", " "]) + "{" + ", ".join(fields) + rng.choice(["}", "}", "}", "}\r", "} ", "}}"])
    ).encode()


def _fate(source: SourceConfig, block: bytes) -> tuple[list[bytes], Counter[str]]:
    """The texts of a block, and its records that gave none, by reason."""
    builder = ChunkBuilder(BadRecordPolicy("skip"), 1 << 20)
    JsonLines(source)._add(block, builder, lambda _: lambda: "")
    chunk = builder.take()
    counts = {"records": chunk.records, "empty": chunk.empty, "dropped": chunk.dropped}
    return list(chunk.documents), Counter(counts) + chunk.bad


@pytest.mark.parametrize("where", [None, "lang == 'en'", "not (score >= 0.65)", "lang != 'de' and score < 2"])
def test_the_fate_of_a_line_does_not_depend_on_the_others_of_its_block(where: str | None) -> None:
    """Arrow parses the lines of an ordinary block at once, and Python those of any other one by one."""
    rng, seen = random.Random(0), Counter[str]()
    source = SourceConfig(name="s", paths=("a.jsonl",), where=where)
    for _ in range(300):
        lines = [_line(rng) for _ in range(rng.randint(1, 4))]
        alone = [_fate(source, line) for line in lines]
        texts = [text for found, _ in alone for text in found]
        counts: Counter[str] = sum((counted for _, counted in alone), Counter())
        for separator in (b"\n", b"\n\n", b"\n{}\n"):
            joined = _fate(source, separator.join(lines))
            more = _fate(source, b"{}")[1] if separator.strip() else Counter()
            assert joined == (texts, counts + Counter({name: n * (len(lines) - 1) for name, n in more.items()})), lines
        seen += counts
    assert seen["invalid JSON"] > 100 and seen["records"] > seen["invalid JSON"] + 100


@pytest.mark.parametrize("other", [b"Inf", b"-NaN", *(value.encode() for value in DEEP)])
@pytest.mark.parametrize("beside", [b'{"text": "b"}', b"", b" ", b"{}"])
def test_what_one_parser_takes_in_other_fields_is_taken_beside_any_line(other: bytes, beside: bytes) -> None:
    source = SourceConfig(name="s", paths=("a.jsonl",))
    for end in (b"", b"\n" + beside):
        texts, _ = _fate(source, b'{"text": "a", "other": ' + other + b"}" + end)
        assert texts[0] == b"a"
    assert _fate(source, b'{"text": "a", "other": Inf, }\n{}')[1]["invalid JSON"] == 1
