"""Raw files, numpy's and OLMo's are described as they are, and each kind of damage is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.adopt.raw import open_npy, open_olmo, open_raw
from pipeline.errors import DataError
from tests.data.adopt.foreign import DOCUMENTS, flat, write_olmo, write_raw
from tests.data.helpers import write

U2 = np.dtype("<u2")


def test_a_raw_file_is_tokens_from_its_first_byte(tmp_path: Path) -> None:
    found = open_raw(write_raw(tmp_path / "train.bin"), U2)
    assert (found.offset, found.tokens, found.ends) == (0, len(flat(DOCUMENTS)), None)


def test_a_file_of_numpy_begins_behind_its_header(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000, dtype="<i4"))
    found = open_npy(tmp_path / "a.npy")
    assert (found.tokens, found.dtype) == (1000, np.dtype("<i4"))
    assert np.fromfile(found.path, found.dtype, offset=found.offset).tolist() == list(range(1000))


def test_the_table_of_olmo_says_where_documents_end(tmp_path: Path) -> None:
    found = open_olmo(write_olmo(tmp_path / "part-0-00000.npy"), U2)
    assert found.ends is not None
    assert np.concatenate(list(found.ends())).tolist() == np.cumsum([len(d) for d in DOCUMENTS]).tolist()
    (tmp_path / "part-0-00000.csv.gz").unlink()
    assert open_olmo(tmp_path / "part-0-00000.npy", U2).ends is None


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), "<u2"), "one dimension"),
        (np.zeros(3, "<f4"), "<f4"),
        (np.zeros(3, ">u2"), ">u2"),
        (np.array([{}]), r"\|O"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(array: np.ndarray, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"a\.npy: .*{words}"):
        open_npy(tmp_path / "a.npy")


def test_files_of_another_format_say_which_to_give(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, "<u2"))
    with pytest.raises(DataError, match=r"a\.npy: .*npy$"):
        open_raw(tmp_path / "a.npy", U2)
    with pytest.raises(DataError, match=r"b\.npy: .*olmo"):
        open_npy(write_raw(tmp_path / "b.npy"))


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_files_without_whole_tokens_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.bin: "):
        open_raw(write(tmp_path / "a.bin", content), U2)


def test_a_short_file_of_numpy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, "<u2"))
    content = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(DataError, match=r"b\.npy: .*3 tokens.*2"):
        open_npy(write(tmp_path / "b.npy", content[:-2]))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("0,2\n3,4\n", "row 2: .*3 to 4"),
        ("0,2\n2,1\n", "row 2: .*2 to 1"),
        ("0,2\n2,9\n", "row 2: .*2 to 9"),
        ("0,2\n2,3\n", "end at 3"),
        ("0,2\nx,3\n", "row 2"),
        ("0\n", "row 1"),
        ("0," + "9" * 5000 + "\n", "row 1"),
        ("0,2," + "x" * 3_000_000 + "\n", "row 1"),
        ("", "end at 0"),
    ],
)
def test_damaged_tables_are_refused_by_row(table: str, words: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "a.npy", [[1, 2], [3, 4]])
    write(tmp_path / "a.csv.gz", gzip.compress(table.encode()))
    found = open_olmo(tmp_path / "a.npy", U2)
    assert found.ends is not None
    with pytest.raises(DataError, match=rf"a\.csv\.gz.*{words}"):
        list(found.ends())


@pytest.mark.parametrize("cut", [-4, 12])
def test_a_damaged_archive_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_olmo(tmp_path / "a.npy")
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(packed.read_bytes()[:cut])
    found = open_olmo(path, U2)
    assert found.ends is not None
    with pytest.raises(DataError, match=r"a\.csv\.gz, row "):
        list(found.ends())


@pytest.mark.parametrize(
    "header", [b"-" * 9000 + b"1", b"[" * 5000, b"1+" * 4000 + b"1j", b"{'descr': (", b"x" * 20_000, b""]
)
def test_a_header_that_no_parser_takes_is_one_message(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(DataError, match=r"a\.npy: has no header of numpy"):
        open_npy(tmp_path / "a.npy")
