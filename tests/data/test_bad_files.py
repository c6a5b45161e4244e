"""Files that are torn, damaged or hold no text where it should be: each is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.build import prepare
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, config, documents, jsonl, one_source, split_texts, write, write_parquet


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("cut", ["end", "middle", "second member"])
def test_a_truncated_archive_is_noticed(compression: str, cut: str, tmp_path: Path) -> None:
    texts = documents(3000, seed=3)
    pack = COMPRESS[compression]
    whole = pack(jsonl(texts))
    content = {
        "end": whole[:-3],
        "middle": whole[: len(whole) // 2],
        "second member": pack(jsonl(texts[:1500])) + pack(jsonl(texts[1500:]))[:40],
    }[cut]
    path = write(tmp_path / "in" / f"a.jsonl.{compression}", content)
    with pytest.raises(
        DataError,
        match=rf"a\.jsonl\.{compression}, line \d+, byte \d+ of the decompressed.*truncated or damaged archive",
    ):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()
    other = {**one_source(write(tmp_path / "o.txt", b"o")), "name": "o"}
    kept = config(tmp_path / "kept", [one_source(path), other], on_bad="skip", max_bad_fraction=0.9)
    manifest = prepare(kept)
    assert manifest.bad == {"truncated or damaged archive": 1}
    got = split_texts(tmp_path / "kept")[:-1]
    assert got == texts[: len(got)]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", documents(200), row_group_size=20)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a\.parquet, the whole file: unreadable Parquet"):
        prepare(config(tmp_path / "out", [one_source(path)]))


@pytest.mark.parametrize(
    ("column", "texts", "words", "reason"),
    [
        ("body", ["a"], ["no column 'text'", "'id', 'body'"], "missing field"),
        ("text", ["a", None, "b"], ["row 1 (from 0)", "'text' is null"], "missing field"),
    ],
)
def test_parquet_rows_without_text_are_named(
    column: str, texts: list[str | None], words: list[str], reason: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts, column=column)
    with pytest.raises(DataError) as caught:
        prepare(config(tmp_path / "out", [one_source(path)]))
    for word in [str(path), reason, *words]:
        assert word in str(caught.value)


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match=r"field is no string.*the column 'id' holds int64"):
        prepare(config(tmp_path / "out", [one_source(path, field="id")]))


def test_invalid_utf8_in_a_binary_parquet_column_names_the_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([b"ok", None, b"n\xfft"], pyarrow.binary())}), path
    )
    made = config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.9)
    assert prepare(made).bad == {"invalid UTF-8": 1, "missing field": 1}
    path.write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"ok", b"n\xfft"], pyarrow.binary())}), path)
    with pytest.raises(DataError, match=r"row 1 \(from 0\), byte 1 of the text: invalid UTF-8"):
        prepare(config(tmp_path / "out2", [one_source(path)]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "matches no file"),
        ("a.txt", b"", "is empty"),
        ("a.bin", b"x", "does not tell what it holds"),
        ("a.txt", b" \n", "hold no document to train on"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: str | None, content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in" / name, content) if name else tmp_path / "nothing" / "*.txt"
    with pytest.raises(DataError, match=words):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    with pytest.raises(DataError, match="in the sources 's' and 't'"):
        prepare(config(tmp_path / "out", [one_source(path), {**one_source(path), "name": "t"}]))
