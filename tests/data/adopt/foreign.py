"""Token files as other programs write them."""

from __future__ import annotations

import csv
import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.tokenize import tokenizer_json
from tests.data.helpers import documents, write

END = 256
TEXTS = documents(300, seed=3)
DOCUMENTS = [[*text.encode(), END] for text in TEXTS]

_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def tokens_of(folder: Path) -> Path:
    """A tokenizer.json with one token per byte, and the end-of-text token 256."""
    return write(folder / "tokenizer.json", tokenizer_json.compose_bytes(["<|endoftext|>"]).encode())


def flat(found: Sequence[Sequence[int]]) -> list[int]:
    """All tokens one after the other."""
    return [token for document in found for token in document]


def write_raw(path: Path, found: Sequence[Sequence[int]] = DOCUMENTS, dtype: str = "uint16") -> Path:
    """As nanoGPT does: nothing but tokens."""
    return write(path, np.array(flat(found)).astype(f"<{np.dtype(dtype).str[1:]}").tobytes())


def write_megatron(
    path: Path, found: Sequence[Sequence[int]] = DOCUMENTS, dtype: str = "int32", sequences: int = 1
) -> Path:
    """As the builder of megatron-core 0.16.1 does; the bytes are compared with its own in a test."""
    item = np.dtype(dtype).itemsize
    lengths = [len(part) for document in found for part in np.array_split(np.arange(len(document)), sequences)]
    pointers = [0, *(np.cumsum(lengths) * item).tolist()][:-1]
    bounds = list(range(0, len(lengths) + 1, sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _CODES[dtype], len(lengths), len(bounds))
    tables = [(lengths, "<i4"), (pointers, "<i8"), (bounds, "<i8")]
    write(path.with_suffix(".idx"), header + b"".join(np.array(table, form).tobytes() for table, form in tables))
    return write(path.with_suffix(".bin"), np.array(flat(found)).astype(dtype).tobytes())


def write_olmo(path: Path, found: Sequence[Sequence[int]] = DOCUMENTS, dtype: str = "uint16") -> Path:
    """As `dolma tokens` does: raw tokens called `.npy`, and the documents in a compressed table."""
    place = 0
    with gzip.open(path.with_suffix(".csv.gz"), "wt", newline="") as out:
        for number, document in enumerate(found):
            csv.writer(out).writerow([place, place + len(document), f'an "id",\n{number}', "file.json.gz", number])
            place += len(document)
    return write_raw(path, found, dtype)
