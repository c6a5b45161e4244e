"""The header of a safetensors file that came from elsewhere: bounded, and checked against the file's size."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UsageError
from pipeline.files import naming, open_regular, parse_json

MAX_HEADER = 100_000_000  # bytes; the format's own limit
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    """As the format spells it: F32, F16 or BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, in the file."""
    end: int
    """The byte after the last one."""


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name.

    Raises:
        UsageError: The file is missing, truncated or not what the format allows.
    """
    with naming(path, "cannot be read", error=UsageError), open_regular(path, path.parent) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UsageError(
                f"{path}: is not a safetensors file, or is truncated: a header of {length} bytes in {size}"
            )
        content = file.read(length)
    try:
        header = parse_json(content)
        if not all(isinstance(text, str) for text in (header.pop("__metadata__", None) or {}).values()):
            raise ValueError("__metadata__ holds more than text")
        found = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: the header is damaged ({error}); fetch the file again") from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end or tensor.end - tensor.start != math.prod(tensor.shape) * WIDTHS[tensor.dtype]:
            raise UsageError(f"{path}: the header places {name} where it cannot be; fetch the file again")
        end = tensor.end
    if end != size:
        raise UsageError(f"{path}: is truncated or too long: {size} bytes of {end}; fetch the file again")
    return found


def _stored(path: Path, entry: dict[str, object], data: int) -> Stored:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in WIDTHS:
        raise ValueError(f"dtype {dtype}; allowed are {', '.join(WIDTHS)}")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError("no shape or no offsets")
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError("a shape or an offset is not a whole number")
    return Stored(path, str(dtype), tuple(shape), data + offsets[0], data + offsets[1])
