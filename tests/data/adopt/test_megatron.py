"""Megatron-LM's datasets are read as its own builder writes them, and each kind of damage is named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.adopt.megatron import open_megatron, write_index
from pipeline.errors import DataError
from tests.data.adopt.foreign import write_megatron

DOCUMENTS = [[1, 2, 3, 7], [4, 7], [5, 6, 5, 6, 5, 7]]
# The .idx files that IndexedDatasetBuilder of megatron-core 0.16.1 wrote for these documents: one sequence per document
# in uint16, two in int32.
BUILT = {
    ("uint16", 1): "4d4d4944494458000001000000000000000803000000000000000400000000000000"
    "040000000200000006000000"
    "000000000000000008000000000000000c00000000000000"
    "0000000000000000010000000000000002000000000000000300000000000000",
    ("int32", 2): "4d4d4944494458000001000000000000000406000000000000000400000000000000"
    "020000000200000001000000010000000300000003000000"
    "000000000000000008000000000000001000000000000000140000000000000018000000000000002400000000000000"
    "0000000000000000020000000000000004000000000000000600000000000000",
}


def _ends(path: Path) -> list[int]:
    found = open_megatron(path)
    assert found.ends is not None
    return np.concatenate(list(found.ends())).tolist()


@pytest.mark.parametrize(("dtype", "sequences"), BUILT)
def test_what_its_builder_writes_is_read(dtype: str, sequences: int, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, dtype, sequences)
    assert path.with_suffix(".idx").read_bytes().hex() == BUILT[dtype, sequences]
    found = open_megatron(path)
    assert (found.dtype, found.offset, found.tokens) == (np.dtype(dtype), 0, 12)
    assert _ends(path) == [4, 6, 12]


def test_what_is_exported_is_what_its_builder_writes(tmp_path: Path) -> None:
    write_index(tmp_path / "a.idx", np.dtype("<u2"), np.array([0, 4, 6, 12], np.uint64), 0)
    assert (tmp_path / "a.idx").read_bytes().hex() == BUILT["uint16", 1]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_type_of_integers_is_read(dtype: str, tmp_path: Path) -> None:
    assert _ends(write_megatron(tmp_path / "a.bin", DOCUMENTS, dtype)) == [4, 6, 12]


def _patch(form: str, place: int, value: int) -> dict[int, bytes]:
    return {place: struct.pack(form, value)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: b"X"}, r"a\.idx: .*MMIDIDX"),
        (_patch("<Q", 9, 2), r"a\.idx: .*version 2"),
        (_patch("<B", 17, 99), r"a\.idx: .*code 99"),
        (_patch("<B", 17, 7), r"a\.bin: holds <f4"),
        (_patch("<B", 17, 4), r"a\.(bin|idx): "),
        (_patch("<Q", 18, 4), r"a\.idx: has .*4 sequences"),
        (_patch("<Q", 18, 1 << 60), r"a\.idx: has "),
        (_patch("<Q", 26, 0), r"a\.idx: has .*0 bounds"),
        (_patch("<i", 34, -4), r"a\.idx: the sequences from 0 "),
        (_patch("<q", 34 + 12 + 8, 6), r"a\.idx: the sequences from 0 "),
        (_patch("<q", 34 + 36 + 8, 3), r"a\.idx: .*out of order"),
        (_patch("<q", 34 + 36 + 24, 4), r"a\.idx: .*out of order"),
        (_patch("<q", 34 + 36 + 24, 2), r"a\.idx: its documents end at sequence 2 of 3"),
    ],
)
def test_damaged_indices_are_refused_by_name(changes: dict[int, bytes], words: str, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, "uint16")
    content = bytearray(path.with_suffix(".idx").read_bytes())
    for place, patch in changes.items():
        content[place : place + len(patch)] = patch
    path.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=words):
        _ends(path)


@pytest.mark.parametrize(("suffix", "size", "words"), [(".idx", 20, "no index"), (".idx", 70, "has 70 bytes")])
def test_short_indices_are_refused(suffix: str, size: int, words: str, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, "uint16").with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=words):
        _ends(path.with_suffix(".bin"))


@pytest.mark.parametrize("size", [0, 22, 23, 26])
def test_a_file_of_another_size_than_its_index_says_is_refused(size: int, tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, "uint16")
    path.write_bytes((path.read_bytes() + b"\0\0")[:size])
    with pytest.raises(DataError, match=r"a\.(bin|idx): "):
        _ends(path)
