"""What a dataset folder says about itself: shards, counts, digests, sources."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import DataError, PipelineError
from pipeline.files import read_json, sha256_bytes, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of tokens that np.memmap opens, and the index of its documents beside it.

    Attributes:
        file: Name of the raw little-endian tokens, relative to the dataset folder.
        index: Name of the uint64 token offsets of the documents, `documents + 1` of them.
        source: Name of the source all its documents are from.
        split: `train` or `validation`.
        tokens: Tokens, end-of-text tokens included.
        documents: Documents.
        text_bytes: UTF-8 bytes of the documents.
        longest: Tokens of the longest document, its end-of-text token included.
        largest_id: Largest token id.
        sha256: Digest of the tokens.
        index_sha256: Digest of the index.
    """

    file: str
    index: str
    source: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    longest: int
    largest_id: int
    sha256: str
    index_sha256: str

    def sizes(self, dtype: np.dtype[Any]) -> dict[str, int]:
        """The bytes that its two files have, by name."""
        return {self.file: self.tokens * dtype.itemsize, self.index: (self.documents + 1) * 8}


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Tokens, end-of-text tokens included."""
        return sum(s.tokens for s in self.shards)

    @property
    def documents(self) -> int:
        """Documents."""
        return sum(s.documents for s in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text, for bits per byte."""
        return sum(s.text_bytes for s in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((s.longest for s in self.shards), default=0)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        dtype: `uint16` or `uint32`.
        tokenizer_digest: SHA-256 of tokenizer.json.
        vocab_size: One more than the largest id the tokenizer has.
        end_of_text_id: The token after each document.
        encoder: What encoded the text.
        splits: `train` and `validation`.
        sources: For each source its files with sizes and digests, and what was counted in it.
        settings: The settings that decide the bytes of the dataset.
        digest: SHA-256 of everything above.
    """

    dtype: str
    tokenizer_digest: str
    vocab_size: int
    end_of_text_id: int
    encoder: str
    splits: dict[str, Split]
    sources: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self._content()))

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return sum(s.tokens for s in self.splits.values())

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(s.documents for s in self.splits.values())

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of both splits."""
        return sum(s.bytes for s in self.splits.values())

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of both splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    @property
    def bad(self) -> dict[str, int]:
        """Records that could not be read and were skipped, by reason."""
        total: dict[str, int] = {}
        for source in self.sources:
            for reason, count in source["bad"].items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))

    @property
    def empty(self) -> int:
        """Empty documents, which are skipped."""
        return sum(source["empty"] for source in self.sources)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the shards, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads and checks a manifest.

        Args:
            path: The dataset folder, or the manifest in it.

        Raises:
            DataError: There is none, it was changed after it was written, or it has another format.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / MANIFEST
        if not file.exists():
            unfinished = (file.parent / "plan.json").exists()
            state = "the dataset is not finished" if unfinished else "there is no dataset here"
            raise DataError(f"{file.parent}: {state} (no {MANIFEST}); run `pipeline prepare CONFIG`")
        tree = read_json(file)
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{file}: format_version is {version}, this program reads {FORMAT_VERSION}; prepare the dataset again"
            )
        digest = tree.pop("digest", "")
        if _digest(tree) != digest:
            raise DataError(f"{file}: was changed after it was written (its digest does not match); prepare it again")
        splits: dict[str, Split] = {
            name: Split(name, tuple(Shard(**shard) for shard in tree["shards"] if shard["split"] == name))
            for name in SPLITS
        }
        return cls(
            **{k: v for k, v in tree.items() if k not in ("format_version", "shards", "totals", "sources")},
            sources=tuple(tree["sources"]),
            splits=splits,
            digest=digest,
        )

    def save(self, folder: Path) -> None:
        """Publishes the manifest, which makes the dataset a finished one; one that is there already is left alone."""
        content = {**self._content(), "digest": self.digest}
        with contextlib.suppress(PipelineError):
            if read_json(folder / MANIFEST) == content:
                return
        write_json(folder / MANIFEST, content)

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "tokenizer_digest": self.tokenizer_digest,
            "vocab_size": self.vocab_size,
            "end_of_text_id": self.end_of_text_id,
            "encoder": self.encoder,
            "totals": {
                name: {"tokens": s.tokens, "documents": s.documents, "text_bytes": s.bytes}
                for name, s in self.splits.items()
            },
            "settings": self.settings,
            "sources": list(self.sources),
            "shards": [asdict(shard) for shard in self.shards],
        }


def check_sizes(folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
    """Compares the sizes of shards and their indices with the manifest.

    Raises:
        DataError: A file is missing, or has another size; the message names it.
    """
    for shard in shards:
        for name, expected in shard.sizes(dtype).items():
            _check_size(folder / name, expected)


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: the shard cannot be read ({error.strerror}); prepare the dataset again") from error
    if size != expected:
        raise DataError(
            f"{file}: has {size} bytes, the manifest says {expected}; the shard is damaged: "
            "remove the dataset and prepare it again"
        )


def _digest(content: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())
