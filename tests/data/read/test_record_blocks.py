"""A stream is divided into blocks of whole records, wherever the reads and the wanted cuts are."""

from __future__ import annotations

import io
import itertools
from unittest.mock import patch

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data.read import record_blocks as module
from pipeline.data.read.decompress import DamagedArchiveError, Stream
from pipeline.data.read.record_blocks import Block, Cut, Damage, can_overlap, first_record, record_blocks

SEPARATORS = [b"|", b"ab", b"||", b"aba", b"a||b"]
contents = st.lists(st.sampled_from([b"a", b"b", b"|", b"ab", b"||", b"xyz"]), max_size=60).map(b"".join)


def _records(content: bytes, separator: bytes) -> list[bytes]:
    *whole, rest = content.split(separator)
    return [*(record + separator for record in whole), *([rest] if rest else [])]


@example(b"a|||x", b"||", 2, 1, None)
@given(contents, st.sampled_from(SEPARATORS), st.integers(1, 7), st.integers(1, 7), st.none() | st.integers(1, 20))
def test_blocks_cover_the_stream_and_divide_no_record(
    content: bytes, separator: bytes, block_bytes: int, past_the_end: int, step: int | None
) -> None:
    source = io.BytesIO(content)
    with patch.multiple(module, BLOCK_BYTES=block_bytes, _PAST_THE_END=past_the_end):
        items = list(record_blocks(Stream(source), separator, 0, 10_000, step))
    ends, offset = {0}, 0
    for record in _records(content, separator):
        offset += len(record)
        ends.add(offset)
    offset, cuts = 0, []
    for item in items:
        if isinstance(item, Block):
            assert item.offset == offset and item.content
            offset += len(item.content)
            assert content[item.offset : offset] == item.content
        else:
            assert isinstance(item, Cut) and item.offset == offset
            cuts.append(offset)
        assert offset in ends
    assert offset == len(content)
    if step is None:
        assert cuts == []
    else:
        # The first end of a record at or after each multiple, once; nothing is cut off behind the last record.
        wanted = {min((e for e in ends if e >= m), default=None) for m in range(step, len(content) + 1, step)}
        assert set(cuts) | {len(content), None} == wanted | {len(content), None}
        assert len(cuts) == len(set(cuts))


@example([9, 1, 3, 9], 4, 1, None, 0)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 7),
    st.integers(1, 7),
    st.none() | st.integers(1, 40),
    st.integers(0, 19),
)
def test_which_records_are_too_long_does_not_depend_on_where_reading_began(
    lengths: list[int], block_bytes: int, past_the_end: int, step: int | None, first: int
) -> None:
    content = b"".join(b"x" * (n - 1) + b"|" for n in lengths)
    starts = [0, *itertools.accumulate(lengths)]
    begin = starts[first % len(lengths)]
    source = io.BytesIO(content)
    source.seek(begin)
    with patch.multiple(module, BLOCK_BYTES=block_bytes, _PAST_THE_END=past_the_end):
        items = list(record_blocks(Stream(source), b"|", begin, 9, step))
    kept = [len(r) for i in items if isinstance(i, Block) and not i.too_long for r in _records(i.content, b"|")]
    too_long = [i.offset for i in items if isinstance(i, Block) and i.too_long == "begins"]
    assert kept == [n for n, start in zip(lengths, starts, strict=False) if start >= begin and n <= 9]
    assert too_long == [start for n, start in zip(lengths, starts, strict=False) if start >= begin and n > 9]
    cuts = [i.offset for i in items if isinstance(i, Cut)]
    if step is not None:
        wanted = {min(s for s in starts if s >= m) for m in range((begin // step + 1) * step, len(content) + 1, step)}
        assert set(cuts) | {len(content)} == wanted | {len(content)}


@given(contents, st.sampled_from([s for s in SEPARATORS if not can_overlap(s)]), st.integers(0, 60), st.integers(1, 7))
def test_the_first_record_of_a_range_begins_at_or_after_its_start(
    content: bytes, separator: bytes, start: int, past_the_end: int
) -> None:
    begins = [0, *itertools.accumulate(len(r) for r in _records(content, separator) if r.endswith(separator))]
    with patch.multiple(module, _PAST_THE_END=past_the_end):
        found = first_record(Stream(io.BytesIO(content)), separator, start)
    assert found == min((b for b in begins if b >= start), default=None)


class _DamagedStream(Stream):
    """Ends with damage instead of the end of the file."""

    def read(self, size: int) -> bytes:
        if content := super().read(size):
            return content
        raise DamagedArchiveError("damaged here", lost=7)


@given(contents, st.sampled_from(SEPARATORS), st.integers(1, 7), st.integers(1, 30), st.none() | st.integers(1, 20))
def test_damage_is_reported_where_the_content_ends(
    content: bytes, separator: bytes, block_bytes: int, longest: int, step: int | None
) -> None:
    with patch.multiple(module, BLOCK_BYTES=block_bytes, _PAST_THE_END=1):
        *_, last = record_blocks(_DamagedStream(io.BytesIO(content)), separator, 0, longest, step)
    assert last == Damage(len(content), "damaged here", 7)
