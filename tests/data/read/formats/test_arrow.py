"""Arrow files are read as `datasets.save_to_disk` writes them, in bounded memory, and damage is named."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.data_sections import SourceConfig
from pipeline.data.build.build import prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.chunks import ChunkBuilder
from pipeline.data.read.formats.arrow import Arrow
from pipeline.data.read.sources import find_files
from pipeline.data.read.task import Part, TaskFile
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, FORMAT_TEXTS, built_texts, config, one_source, split_texts, write_arrow


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("slice_size_mb", [0.002, 64])
def test_streams_and_files_give_their_texts_in_order(kind: str, slice_size_mb: float, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "data-00000-of-00001.arrow", FORMAT_TEXTS, kind)
    assert built_texts(tmp_path, path, slice_size_mb=slice_size_mb) == FORMAT_TEXTS
    assert (len(DatasetManifest.load(tmp_path / "out").shards) > 5) == (slice_size_mb < 1)


def test_an_archive_of_one_is_read(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS)
    packed = tmp_path / "a.arrow.zst"
    packed.write_bytes(COMPRESS["zst"](path.read_bytes()))
    assert built_texts(tmp_path, packed) == FORMAT_TEXTS


def test_nulls_and_bad_utf8_are_single_records(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", ["first", None, "XXXX", "last"])
    path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xff\xfe\xff\xfe"))
    prepare(config(tmp_path / "out", [one_source(path)], on_bad="skip", max_bad_fraction=0.9))
    assert split_texts(tmp_path / "out") == ["first", "last"]
    assert DatasetManifest.load(tmp_path / "out").bad == {"invalid UTF-8": 1, "missing field": 1}
    with pytest.raises(DataError, match=r"a\.arrow, row 1 .*null"):
        prepare(config(tmp_path / "other", [one_source(path)]))


def test_compressed_columns_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS, compression="zstd")
    with pytest.raises(DataError, match=r"a\.arrow.*compressed"):
        prepare(config(tmp_path / "out", [one_source(path)]))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_file_that_ends_early_keeps_its_whole_batches(kind: str, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.arrow, row \d+0 .*end of the file"):
        prepare(config(tmp_path / "out", [one_source(path)]))
    prepare(config(tmp_path / "skip", [one_source(path)], on_bad="skip", max_bad_fraction=0.9, slice_size_mb=0.002))
    kept = split_texts(tmp_path / "skip")
    assert kept == FORMAT_TEXTS[: len(kept)] and 100 < len(kept) < 300
    lost = [r["lost"] for r in _pieces(tmp_path / "skip") if r["lost"]]
    assert len(lost) == 1 and 0 < lost[0] < path.stat().st_size


def test_mutated_files_end_in_documents_or_bad_records(tmp_path: Path) -> None:
    originals = [write_arrow(tmp_path / "a.arrow", FORMAT_TEXTS[:60], kind).read_bytes() for kind in ("stream", "file")]
    source = SourceConfig(name="s", paths=(str(tmp_path / "a.arrow"),), where="id >= 3")
    reader, rng, reasons = Arrow(source), random.Random(0), Counter[str]()
    for _ in range(300):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.choice([1, 2, 4, 16])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        (tmp_path / "a.arrow").write_bytes(content)
        file = find_files(source)[0]
        builder = ChunkBuilder(BadRecordPolicy("skip"), 1 << 20)
        list(reader.read(TaskFile(file, 0, Part("rows"), True, None), builder))
        chunk = builder.take()
        assert chunk.records >= len(chunk.documents) + chunk.dropped
        reasons.update(chunk.bad)
    assert reasons["unreadable Arrow"] > 100


def _pieces(folder: Path) -> list[dict[str, int]]:
    records = [json.loads(file.read_text()) for file in sorted((folder / "slices").glob("*/slice.json"))]
    return [piece for record in records for piece in record["pieces"]]
