"""Documents in one buffer behave as the byte strings they were made of."""

from __future__ import annotations

import pyarrow
import pytest
import xxhash

from pipeline.data.read.documents import Documents

TEXTS = [b"one", b"", b" \t\n\r\x0b\x0c", b"  two", "drei – 三".encode()]


def _part() -> Documents:
    whole = Documents.of([b"before", *TEXTS])
    return Documents(whole.data, whole.offsets[1:])


def test_parts_of_a_buffer_join_to_their_texts() -> None:
    assert list(Documents.joined([_part(), Documents.of([b"x"]), _part()])) == [*TEXTS, b"x", *TEXTS]
    assert list(Documents.joined([])) == list(Documents.of([])) == []
    assert _part().text_bytes == sum(map(len, TEXTS)) and _part().lengths.tolist() == [len(t) for t in TEXTS]


def test_blank_documents_are_those_of_ascii_white_space() -> None:
    documents = Documents.of([*TEXTS, "\u00a0".encode()])
    assert documents.blank().tolist() == [False, True, True, False, False, False]
    assert list(documents.without(documents.blank())) == [b"one", *TEXTS[3:], "\u00a0".encode()]


def test_invalid_utf8_anywhere_is_noticed_and_characters_may_not_span_documents() -> None:
    assert _part().is_utf8()
    assert not Documents.of([b"ok", b"n\xff"]).is_utf8()
    assert not Documents.of(["é".encode()[:1], "é".encode()[1:]]).is_utf8()


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()])
def test_arrow_columns_and_slices_of_them_give_their_values(kind: pyarrow.DataType) -> None:
    column = pyarrow.array(TEXTS[1:] if "binary" in str(kind) else [t.decode() for t in TEXTS[1:]], kind)
    assert list(Documents.from_arrow(column)) == TEXTS[1:]
    assert list(Documents.from_arrow(column.slice(1, 2))) == TEXTS[2:4]
    assert list(Documents.from_arrow(column.slice(4))) == []


def test_a_hash_fraction_is_the_first_53_bits_of_xxh3() -> None:
    texts = [b"", b"text", b"text", b"another" * 100]
    fractions = Documents.of([b"before", *texts]).hash_fractions()[1:]
    # The hash of no bytes is in XXH3's specification: other versions of the package must give the same datasets.
    assert fractions[0] == (0x2D06800538D394C2 >> 11) / 2**53
    assert fractions.tolist() == [(xxhash.xxh3_64_intdigest(text) >> 11) / 2**53 for text in texts]
    assert not len(Documents.of([]).hash_fractions())
