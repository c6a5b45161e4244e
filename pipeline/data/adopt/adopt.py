"""Makes a dataset of token files that others made: finds, divides and scans them, and publishes the manifest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.adopt.find import NEED_DTYPE, SourceFiles
from pipeline.data.adopt.pieces import Piece, divide
from pipeline.data.adopt.scan import Scanned, scan
from pipeline.data.adopt.token_file import TokenFile
from pipeline.data.content import is_file_name
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest, Shard
from pipeline.data.manifest import divide as divide_shards
from pipeline.data.order.run_order import unmeasurable
from pipeline.data.read.sources import refuse_undecodable_name
from pipeline.data.tokenize.token_widths import token_widths
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, PipelineError
from pipeline.files import sha256_file, size_of_regular, staged_dir, write_bytes

_INDICES = "indices"
_OTHER_VALIDATION = "name other files with --validation, or set another --validation-fraction"

OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total."""


@dataclass(frozen=True)
class _Part:
    """A piece with what it belongs to, and what was found in it."""

    source: str
    split: str
    piece: Piece
    found: Scanned


def adopt(
    sources: Mapping[str, SourceFiles],
    format_name: str,
    tokenizer: Tokenizer,
    output: Path,
    validation_fraction: float,
    progress: OnBytes,
) -> DatasetManifest:
    """Writes a dataset whose tokens are where they were, and returns its manifest.

    Args:
        sources: The files of each source by its name.
        format_name: What the files are, for the record.
        tokenizer: The one that made the tokens.
        output: The dataset folder, which is published at once when everything is checked.
        validation_fraction: The share of the tokens of a source, its last documents, that is for validation where no
            files are.
        progress: Called from several threads.

    Raises:
        DataError: A file is damaged, or is not what the format, the dtype and the tokenizer say.
    """
    files = [file for found in sources.values() for file in (*found.train, *found.validation)]
    dtype = _common_dtype(files)
    _refuse_type_without_end(files, format_name, tokenizer)
    base = Path(os.path.commonpath([file.path.parent for file in files]))
    _refuse_unusable_names(files, base)
    with staged_dir(output) as folder:
        write_bytes(folder / TOKENIZER, tokenizer.content)
        (folder / _INDICES).mkdir()
        pieces: list[tuple[str, str, Piece]] = []
        for name, found in sources.items():
            pieces += _pieces_of(name, found, validation_fraction, tokenizer, folder / _INDICES, len(pieces))
        parts = _scan_all(pieces, tokenizer, progress)
        if validation_fraction:
            _refuse_source_without_validation(sources, parts, validation_fraction)
        shards = [_shard(part, base, folder) for part in parts]
        _refuse_unmeasurable_validation(shards, output)
        exact = token_widths(tokenizer)[1]
        manifest = DatasetManifest(
            dtype=dtype,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            encoder=f"unknown, adopted from {format_name}",
            splits=divide_shards(shards),
            sources=tuple(
                _source_entry(name, [part for part in parts if part.source == name], base, exact) for name in sources
            ),
            settings={
                "sources": [{"name": name} for name in sources],
                "adopted": {"format": format_name, "folder": str(base)},
            },
        )
        manifest.save(folder)
        _check_readable(folder, output)
    return manifest


def _common_dtype(files: Sequence[TokenFile]) -> str:
    """Returns the unsigned type of all files: once no id is negative, both types have the same bytes."""
    first = files[0]
    for file in files:
        if file.dtype.itemsize != first.dtype.itemsize:
            raise DataError(
                f"{file.name}: holds {file.dtype.name}, and {first.name} holds {first.dtype.name}; "
                "a dataset has one type: adopt them into two datasets"
            )
    return f"uint{8 * first.dtype.itemsize}"


def _refuse_unusable_names(files: Sequence[TokenFile], base: Path) -> None:
    """Refuses names that the manifest cannot hold, before every token is read in vain."""
    for file in files:
        refuse_undecodable_name(file.name)
        if file.index is not None:
            refuse_undecodable_name(os.path.relpath(file.index, base))
        name = str(file.path.relative_to(base))
        if not is_file_name(name):
            raise DataError(
                f"{file.name}: a dataset cannot hold the name {name!r}: below {base} it may have 1,000 characters, no "
                "control character among them, and no part that begins with a dot; rename it"
            )


def _refuse_type_without_end(files: Sequence[TokenFile], format_name: str, tokenizer: Tokenizer) -> None:
    """Refuses a file that only its end-of-text tokens would divide, and whose type cannot hold one."""
    file = next((f for f in files if f.ends is None and tokenizer.end_of_text_id > np.iinfo(f.dtype).max), None)
    if file is not None:
        given = "--dtype, --tokenizer" if format_name in NEED_DTYPE else "--tokenizer"
        raise DataError(
            f"{file.name}: {file.dtype.name} cannot hold the end-of-text token, which has the id "
            f"{tokenizer.end_of_text_id:,} and ends each document; give the {given} or --end-of-text of these files"
        )


def _pieces_of(
    name: str, found: SourceFiles, fraction: float, tokenizer: Tokenizer, indices: Path, first: int
) -> list[tuple[str, str, Piece]]:
    """Returns the pieces of a source in its order, each with its split."""
    # Without files for validation, the last documents are: from the first one at or behind this token.
    total = sum(file.tokens for file in found.train)
    cut = total if found.validation else total - int(total * fraction)
    pieces: list[tuple[str, str, Piece]] = []
    before = 0
    for file in found.train:
        cuts = [cut - before] if before < cut < before + file.tokens else []
        for piece in divide(file, cuts, tokenizer.end_of_text_id, indices, first + len(pieces)):
            pieces.append((name, "train" if before + piece.start < cut else "validation", piece))
        before += file.tokens
    for file in found.validation:
        more = divide(file, [], tokenizer.end_of_text_id, indices, first + len(pieces))
        pieces += [(name, "validation", piece) for piece in more]
    return pieces


def _refuse_source_without_validation(
    sources: Mapping[str, SourceFiles], parts: Sequence[_Part], fraction: float
) -> None:
    """Refuses a source of which the wanted share is in one document; after the scan, which may know a better reason."""
    for name, found in sources.items():
        long_enough = sum(file.tokens for file in found.train) * fraction >= 1
        if long_enough and not any(part.split == "validation" for part in parts if part.source == name):
            raise DataError(
                f"{found.train[-1].name}: no document of source {name} begins in its last {fraction:.3%}, which is for "
                f"validation; {_OTHER_VALIDATION}"
            )


def _refuse_unmeasurable_validation(shards: Sequence[Shard], output: Path) -> None:
    problem = unmeasurable([shard for shard in shards if shard.split == "validation"])
    if problem is not None:
        raise DataError(f"{output}: {problem}; {_OTHER_VALIDATION}")


def _scan_all(pieces: Sequence[tuple[str, str, Piece]], tokenizer: Tokenizer, progress: OnBytes) -> list[_Part]:
    widths, _ = token_widths(tokenizer)
    total, done, lock, stopped = sum(piece.bytes for _, _, piece in pieces), 0, threading.Lock(), threading.Event()

    def on_read(size: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise PipelineError("another part of the work has failed")
        with lock:
            done += size
            progress(done, total)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="adopt") as pool:
        futures = [pool.submit(scan, piece, tokenizer, widths, on_read) for _, _, piece in pieces]
        try:
            finished = wait(futures, return_when=FIRST_EXCEPTION).done
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
        for future in futures:
            if future in finished:
                future.result()  # the first failure, before those that it caused
        return [_Part(*named, future.result()) for named, future in zip(pieces, futures, strict=True)]


def _shard(part: _Part, base: Path, folder: Path) -> Shard:
    piece, found, item = part.piece, part.found, part.piece.file.dtype.itemsize
    return Shard(
        file=str(piece.file.path.relative_to(base)),
        index=str(piece.index.path.relative_to(folder)),
        source=part.source,
        split=part.split,
        tokens=piece.stop - piece.start,
        documents=piece.index.documents,
        text_bytes=found.text_bytes,
        longest=piece.index.longest,
        largest_id=found.largest_id,
        sha256=found.sha256,
        index_sha256=found.index_sha256,
        offset=piece.file.offset + piece.start * item,
    )


def _source_entry(name: str, parts: Sequence[_Part], base: Path, exact: bool) -> dict[str, Any]:
    """Returns what the manifest says of a source.

    Raises:
        DataError: Some documents end with the end-of-text token and others do not.
    """
    documents = sum(part.piece.index.documents for part in parts)
    ended = sum(part.found.ended for part in parts)
    indexed = parts[0].piece.file.ends is not None
    if indexed and 0 < ended < documents:
        part = next(part for part in parts if part.found.ended < part.piece.index.documents)
        raise DataError(
            f"{part.piece.file.name}: {documents - ended:,} of the {documents:,} documents of source {name} do not end "
            "with the end-of-text token, and the others do; the index, or --end-of-text, is not that of these files"
        )
    files: dict[Path, list[_Part]] = {}
    for part in parts:
        files.setdefault(part.piece.file.path, []).append(part)
    return {
        "name": name,
        "records": documents,
        "empty": sum(part.piece.index.empty for part in parts),
        "bad": {},
        "cross_checked": 0,
        "ended_documents": ended,
        "inner_ends": sum(part.found.inner_ends for part in parts),
        "text_bytes": "exact" if exact else "estimated from the spelling of the tokens",
        "files": [entry for path, found in files.items() for entry in _file_entries(path, found, base)],
    }


def _file_entries(path: Path, parts: Sequence[_Part], base: Path) -> list[dict[str, Any]]:
    name = str(path.relative_to(base))
    digests = [[part.piece.start, part.piece.stop, part.found.sha256] for part in parts]
    entries: list[dict[str, Any]] = [{"path": name, "size": size_of_regular(path), "sha256_of_parts": digests}]
    index = parts[0].piece.file.index
    if index is not None:
        digest = sha256_file(index)
        entries.append({"path": os.path.relpath(index, base), "size": size_of_regular(index), "sha256": digest})
    return entries


def _check_readable(folder: Path, output: Path) -> None:
    """Refuses to publish what no command would open, for example a manifest of too many files."""
    try:
        DatasetManifest.load(folder)
    except DataError as error:
        raise DataError(f"{str(error).replace(str(folder), str(output))}; adopt fewer files at once") from error
