"""The last, cheap step of a build: assembles the manifest from the records of all slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.data_sections import DataConfig, SourceConfig
from pipeline.data.build.slice_store import Record
from pipeline.data.build.tasks import Plan
from pipeline.data.manifest import DatasetManifest, Shard, divide
from pipeline.data.read.bad_records import check_bad_fraction, check_lost_fraction
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import FileSpan
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
    lost = sum(span.lost for record in records for span in record["pieces"])
    check_lost_fraction(lost, sum(file.size for files in plan.files for file in files), data.max_bad_fraction)
    _refuse_source_without_records(records, data)
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
            _source_entry(source, files, [r for r in records if r["source"] == source.name])
            for source, files in zip(data.sources, plan.files, strict=True)
        ),
        settings=plan.settings,
    )


def _refuse_source_without_records(records: Sequence[Record], data: DataConfig) -> None:
    """Refuses a condition that is true of no record: its fields probably have other names."""
    for source in data.sources:
        own = [record for record in records if record["source"] == source.name]
        dropped = sum(record.get("dropped", 0) for record in own)
        if dropped and dropped == sum(record["records"] for record in own):
            raise DataError(
                f"{data.path}: `where` of source {source.name} is true of none of its {dropped:,} records; "
                f"correct it (a missing field is never equal or unequal to anything): {source.where}"
            )


def _source_entry(source: SourceConfig, files: Sequence[SourceFile], records: Sequence[Record]) -> dict[str, Any]:
    return {
        "name": source.name,
        "records": sum(r["records"] for r in records),
        "empty": sum(r["empty"] for r in records),
        **({"dropped": sum(r["dropped"] for r in records)} if source.where is not None else {}),
        "bad": dict(sorted(sum((Counter(r["bad"]) for r in records), Counter()).items())),
        "cross_checked": sum(r["cross_checked"] for r in records),
        "files": _file_entries(files, records),
    }


def _file_entries(files: Sequence[SourceFile], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns path, size and digest of each file; the bounds and digest of each part where several tasks read it."""
    spans: list[FileSpan | list[FileSpan] | None] = [None] * len(files)
    for span in (span for record in records for span in record["pieces"]):
        found = spans[span.file]
        if found is None:
            spans[span.file] = span
        elif isinstance(found, list):
            found.append(span)
        else:
            spans[span.file] = [found, span]
    return [_file_entry(file, found) for file, found in zip(files, spans, strict=True)]


def _file_entry(file: SourceFile, found: FileSpan | list[FileSpan] | None) -> dict[str, Any]:
    assert found is not None
    if isinstance(found, FileSpan):
        return {"path": file.path, "size": file.size, "sha256": found.sha256}
    parts = [[span.start, span.stop, span.sha256] for span in found]
    return {"path": file.path, "size": file.size, "sha256_of_parts": parts}
