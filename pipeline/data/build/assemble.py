"""The last, cheap step of a build: assembles the manifest from the records of all slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.data_sections import DataConfig
from pipeline.data.build.slice_store import Record
from pipeline.data.build.tasks import Plan
from pipeline.data.manifest import DatasetManifest, Shard, divide
from pipeline.data.read.bad_records import check_bad_fraction, check_lost_fraction
from pipeline.data.read.sources import SourceFile
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError


def make_manifest(
    records: Sequence[Record], plan: Plan, data: DataConfig, tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> DatasetManifest:
    """Returns the manifest of a dataset from the record of each slice, in the order of the tasks.

    Raises:
        DataError: Too much of the input was bad, or there is nothing to train on.
    """
    bad: Counter[str] = sum((Counter(r["bad"]) for r in records), Counter())
    check_bad_fraction(bad, sum(r["records"] for r in records), data.max_bad_fraction)
    # Slices of older versions do not have this count.
    lost = sum(piece.get("lost", 0) for record in records for piece in record["pieces"])
    check_lost_fraction(lost, sum(file.size for files in plan.files for file in files), data.max_bad_fraction)
    shards = [Shard(**shard) for record in records for shard in record["shards"]]
    if not any(s.split == "train" for s in shards):
        raise DataError(
            f"{data.path}: the sources hold no document to train on; "
            "correct `paths`, `separator` or `split` of data.sources"
        )
    return DatasetManifest(
        dtype=dtype.name,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        encoder=tokenizer.encoder,
        splits=divide(shards),
        sources=tuple(
            _source_entry(source.name, files, [r for r in records if r["source"] == source.name])
            for source, files in zip(data.sources, plan.files, strict=True)
        ),
        settings=plan.settings,
    )


def _source_entry(name: str, files: Sequence[SourceFile], records: Sequence[Record]) -> dict[str, Any]:
    pieces: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        for piece in record["pieces"]:
            pieces.setdefault(piece["file"], []).append(piece)
    return {
        "name": name,
        "records": sum(r["records"] for r in records),
        "empty": sum(r["empty"] for r in records),
        "bad": dict(sorted(sum((Counter(r["bad"]) for r in records), Counter()).items())),
        "cross_checked": sum(r["cross_checked"] for r in records),
        "files": [
            {"path": file.path, "size": file.size, **_content_digest(pieces[number])}
            for number, file in enumerate(files)
        ],
    }


def _content_digest(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the digest of a file that one task read; else the bounds and digest of each of its parts."""
    if len(pieces) == 1:
        return {"sha256": pieces[0]["sha256"]}
    return {"sha256_of_parts": [[p["start"], p["stop"], p["sha256"]] for p in pieces]}
