"""Archives that are damaged, padded, of many members or of a rare kind: nothing is invented or lost silently."""

from __future__ import annotations

import itertools
import json
import lzma
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipeline.data.build.build import prepare
from pipeline.data.read.decompress import DamagedArchiveError, open_stream
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, config, dataset_digest, documents, jsonl, one_source, split_texts, write

# Damaged archives have made readers loop for ever.
pytestmark = pytest.mark.timeout(120)

_random = random.Random(5)
# 1.5 MB that hardly compress: several pieces for every decoder and more than one block of bzip2.
TEXTS = [f"{i} {_random.randbytes(200).hex()}" for i in range(3600)]
PACKED = {name: compress(jsonl(TEXTS)) for name, compress in COMPRESS.items()}
# Where a byte is changed, as a fraction of the archive; the last is in a checksum or what replaces it.
PLACES = [0.2, 0.5, 0.83, 1.0]


def _damaged(compression: str, place: float) -> bytes:
    content = bytearray(PACKED[compression])
    # The tail of gzip: four bytes of checksum, four of length.
    content[min(int(place * len(content)), len(content) - 6)] ^= 0x55
    return bytes(content)


def _read(path: Path, compression: str, size: int) -> tuple[bytes, str]:
    """The content before the damage, and what the damage is, which every later call repeats."""
    with open_stream(path, compression) as stream:
        content = b""
        with pytest.raises(DamagedArchiveError) as first:
            while piece := stream.read(size):
                content += piece
        with pytest.raises(DamagedArchiveError) as second:
            stream.read(size)
    assert second.value is first.value
    return content, str(first.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("compression", COMPRESS)
def test_the_content_before_damage_does_not_depend_on_how_it_is_read(
    compression: str, place: float, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.{compression}", _damaged(compression, place))
    found = [_read(path, compression, size) for size in (1 << 22, 1 << 20, 77_777)]
    assert found[0] == found[1] == found[2]
    content = jsonl(TEXTS)
    # From the changed byte until the error shows, something else can be decoded.
    sure = int(place * len(content)) - (1 << 20)
    assert found[0][0][: max(sure, 0)] == content[: max(sure, 0)]
    assert len(found[0][0]) <= 2 * len(content)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("compression", COMPRESS)
def test_damage_stops_a_build_and_is_named(compression: str, place: float, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.jsonl.{compression}", _damaged(compression, place))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{compression}, line \d+, byte \d+ .*damaged archive"):
        prepare(config(tmp_path / "out", [one_source(path)]))


@pytest.mark.parametrize("compression", COMPRESS)
def test_skipping_damage_gives_the_same_when_resumed_and_counts_all_bytes_that_cannot_be_trusted(
    compression: str, tmp_path: Path
) -> None:
    content = COMPRESS[compression]("|".join(TEXTS).encode())
    damaged = bytearray(content)
    damaged[int(0.83 * len(content))] ^= 0xA5
    path = write(tmp_path / f"a.txt.{compression}", bytes(damaged))
    other = write(tmp_path / "other.txt", "|".join(TEXTS[:1000]).encode())

    def made(name: str) -> Any:
        sources = [one_source(path, separator="|"), {**one_source(other, separator="|"), "name": "other"}]
        return config(tmp_path / name, sources, on_bad="skip", max_bad_fraction=0.9, slice_size_mb=0.1)

    manifest = prepare(made("whole"))
    assert manifest.bad["truncated or damaged archive"] == 1 and sum(manifest.bad.values()) < 20
    slices = sorted((tmp_path / "whole" / "slices").glob("000000-*"))
    assert len(slices) > 3
    pieces = [p for s in slices for p in json.loads((s / "slice.json").read_text())["pieces"]]
    assert [p["lost"] for p in pieces] == [0] * (len(pieces) - 1) + [len(content)]
    for done in (1, len(slices) // 2, len(slices) - 1):
        resumed = tmp_path / f"resumed{done}"
        (resumed / "slices").mkdir(parents=True)
        for file in ("plan.json", "tokenizer.json"):
            shutil.copy(tmp_path / "whole" / file, resumed)
        for folder in slices[:done]:
            shutil.copytree(folder, resumed / "slices" / folder.name)
        prepare(made(resumed.name))
        assert dataset_digest(resumed) == dataset_digest(tmp_path / "whole")


def _documents(tmp_path: Path, name: str, content: bytes, **data: Any) -> tuple[list[str], dict[str, int]]:
    entries = [
        one_source(write(tmp_path / name, content)),
        {**one_source(write(tmp_path / "other.txt", b"other")), "name": "other"},
    ]
    manifest = prepare(config(tmp_path / "out", entries, **data))
    return split_texts(tmp_path / "out")[:-1], dict(manifest.bad)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("damage", ["in the second", "behind the last"])
def test_damage_behind_a_whole_member_leaves_that_member(compression: str, damage: str, tmp_path: Path) -> None:
    first, second = (COMPRESS[compression](jsonl(texts)) for texts in (TEXTS[:50], TEXTS[50:100]))
    if damage == "in the second":
        middle = len(second) // 2
        content, texts = first + second[:middle] + b"damage" + second[middle + 6 :], TEXTS[:50]
    else:
        content, texts = first + second + b"something that is no archive", TEXTS[:100]
    name = f"a.jsonl.{compression}"
    with pytest.raises(DataError, match="damaged archive"):
        _documents(tmp_path / "error", name, content)
    got, bad = _documents(tmp_path / "skip", name, content, on_bad="skip", max_bad_fraction=0.9)
    assert got[: len(texts)] == texts and bad["truncated or damaged archive"] == 1
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "skip" / "out").rglob("000000-*/slice.json"))
    whole = len(first) if damage == "in the second" else len(first + second)
    assert record["pieces"][0]["lost"] == len(content) - whole


@pytest.mark.parametrize("compression", COMPRESS)
def test_zero_bytes_behind_archives_are_padding(compression: str, tmp_path: Path) -> None:
    pack = COMPRESS[compression]
    parts = [pack(jsonl(TEXTS[:20])), bytes(512), pack(jsonl(TEXTS[20:40])), bytes(100_000)]
    assert _documents(tmp_path, f"a.jsonl.{compression}", b"".join(parts)) == (TEXTS[:40], {})


def test_padding_of_xz_comes_in_fours(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 zero bytes .*multiple of 4"):
        _documents(tmp_path, "a.jsonl.xz", lzma.compress(jsonl(TEXTS[:20])) + bytes(3))


@pytest.mark.parametrize("compression", COMPRESS)
def test_very_many_members_and_empty_ones_are_all_read(compression: str, tmp_path: Path) -> None:
    pack = COMPRESS[compression]
    content = b"".join(pack(jsonl([text])) + pack(b"") for text in TEXTS[:300])
    assert _documents(tmp_path, f"a.jsonl.{compression}", content) == (TEXTS[:300], {})


def test_frames_of_a_large_window_and_frames_to_be_skipped_are_read(tmp_path: Path) -> None:
    # `zstd --long=28`, whose windows other readers refuse.
    how = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    long = packer.compress(jsonl(TEXTS[:20])) + packer.flush()
    assert zstandard.get_frame_parameters(long).window_size == 1 << 28
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    content = skippable + long + skippable + COMPRESS["zst"](jsonl(TEXTS[20:30])) + skippable
    assert _documents(tmp_path, "a.jsonl.zst", content) == (TEXTS[:30], {})
    with pytest.raises(DataError, match="the file ends before"):
        _documents(tmp_path / "cut", "a.jsonl.zst", content[:-2])


def test_the_bytes_decoded_at_once_are_bounded_however_well_they_compress(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zst", zstandard.ZstdCompressor(level=19).compress(bytes(1 << 29)))
    assert path.stat().st_size > 3 << 12
    with open_stream(path, "zst") as stream:
        largest = max(len(piece) for piece in itertools.islice(stream._pieces, 100))
    assert largest <= 1 << 27


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
        match=rf"a\.jsonl\.{compression}, line \d+, byte \d+ .*decompressed.*damaged archive",
    ):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()
    other = {**one_source(write(tmp_path / "o.txt", b"o")), "name": "o"}
    kept = config(tmp_path / "kept", [one_source(path), other], on_bad="skip", max_bad_fraction=0.9)
    manifest = prepare(kept)
    assert manifest.bad == {"truncated or damaged archive": 1}
    got = split_texts(tmp_path / "kept")[:-1]
    # All that can be decoded is kept: nothing, of half a file of bzip2 that is one block.
    least = {"end": 3000, "middle": 0 if compression == "bz2" else 1000, "second member": 1500}[cut]
    assert len(got) >= least and got == texts[: len(got)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_an_archive_of_no_bytes_is_damaged_and_can_be_skipped(name: str, tmp_path: Path) -> None:
    entries = [
        one_source(write(tmp_path / name, b"")),
        {**one_source(write(tmp_path / "o.txt", b"other")), "name": "o"},
    ]
    assert sum(prepare(config(tmp_path / "out", entries, on_bad="skip", max_bad_fraction=0.9)).bad.values()) == 1


def test_a_lost_archive_counts_by_its_bytes_and_not_as_one_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bytes .*max_bad_fraction"):
        _documents(tmp_path, "a.jsonl.gz", _damaged("gz", 0.95), on_bad="skip", max_bad_fraction=0.1)
    assert not (tmp_path / "out" / "manifest.json").exists()
