"""The manifest of a dataset: its shards, counts, digests and sources."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data import content
from pipeline.data.layout import MANIFEST, PLAN
from pipeline.errors import DataError, PipelineError
from pipeline.files import naming, read_json, size_of_regular, write_json
from pipeline.text_format import located, printable

FORMAT_VERSION = 1
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of raw little-endian tokens and the index of its documents."""

    file: str
    """Name of the tokens, relative to the dataset folder."""
    index: str
    """Name of the documents' token offsets: `documents + 1` of uint64."""
    source: str
    """Name of the source of all its documents."""
    split: str
    """`train` or `validation`."""
    tokens: int
    """Number of tokens, end-of-text tokens included."""
    documents: int
    """Number of documents."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    longest: int
    """Tokens of the longest document, its end-of-text token included."""
    largest_id: int
    """Largest token id."""
    sha256: str
    """Digest of the tokens."""
    index_sha256: str
    """Digest of the index."""
    offset: int = 0
    """Bytes before the first token in its file; an adopted file may hold several shards."""

    def sizes(self, dtype: np.dtype[Any]) -> dict[str, int]:
        """Returns the bytes that both files must have at least, by name; the dataset's own have no more."""
        return {self.file: self.offset + self.tokens * dtype.itemsize, self.index: (self.documents + 1) * 8}


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
class DatasetManifest:
    """The content of a dataset's manifest.json."""

    dtype: str
    """`uint8`, `uint16`, `uint32` or `uint64`."""
    tokenizer_digest: str
    """SHA-256 of tokenizer.json."""
    vocab_size: int
    """One more than the tokenizer's largest id."""
    end_of_text_id: int
    """The token after each document."""
    encoder: str
    """What encoded the text."""
    splits: dict[str, Split]
    """`train` and `validation`."""
    sources: tuple[dict[str, Any], ...]
    """For each source its files with sizes and digests, and the counts of its records."""
    settings: dict[str, Any]
    """The settings that decide the bytes of the dataset."""
    digest: str = field(default="", compare=False)
    """SHA-256 of everything above."""

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
    def shards(self) -> tuple[Shard, ...]:
        """The shards of both splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    @property
    def bad(self) -> dict[str, int]:
        """Records that were skipped because they could not be read, by reason."""
        total: dict[str, int] = {}
        for source in self.sources:
            for reason, count in source["bad"].items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))

    @property
    def empty(self) -> int:
        """Empty documents that were skipped."""
        return sum(source["empty"] for source in self.sources)

    @property
    def dropped(self) -> int:
        """Records of which the condition of their source is not true."""
        return sum(source.get("dropped", 0) for source in self.sources)

    @property
    def adopted(self) -> dict[str, str] | None:
        """The format and the folder of token files that others made; None if the tokens are the dataset's own."""
        return self.settings.get("adopted")

    def tokens_in(self, folder: str | Path, token_folder: str | None) -> Path | None:
        """Returns the folder of adopted token files; None for a dataset with tokens of its own.

        A manifest may have been received, so that what it says of other folders is only shown, never followed.

        Args:
            folder: The dataset folder.
            token_folder: The folder that the user names, `data.token_folder` of a config.

        Raises:
            DataError: The user names none and must, or names one and must not.
        """
        if self.adopted is None:
            if token_folder is not None:
                raise DataError(f"{folder}: has tokens of its own; remove data.token_folder (--token-folder)")
            return None
        if token_folder is None:
            raise DataError(
                f"{folder}: describes token files in another folder, which is not read unless you name it; "
                f"if you trust this dataset, set data.token_folder (--token-folder); it was adopted with "
                f"{printable(self.adopted['folder'])!r}"
            )
        return Path(token_folder)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the shards, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @classmethod
    def load(cls, folder: str | Path) -> DatasetManifest:
        """Reads and checks the manifest of a dataset folder.

        Raises:
            DataError: It is missing, was changed after it was written, or has another format.
        """
        file = Path(folder) / MANIFEST
        if not file.exists():
            state = "the dataset is not finished" if (Path(folder) / PLAN).exists() else "there is no dataset here"
            raise DataError(f"{located(folder)}: {state} (no {MANIFEST}); run `pipeline prepare CONFIG`")
        tree = read_json(file, Path(folder), DataError)
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{file}: format_version is {version}, this program reads {FORMAT_VERSION}; prepare the dataset again"
            )
        digest = tree.pop("digest", "")
        if _digest(tree) != digest:
            raise DataError(f"{file}: was changed after it was written (its digest does not match); prepare it again")
        problem = content.problem(tree)
        if problem is not None:
            raise DataError(f"{file}: is damaged ({problem}); prepare the dataset again")
        shards = [Shard(**shard) for shard in tree["shards"]]
        return cls(
            **{k: v for k, v in tree.items() if k not in ("format_version", "shards", "totals", "sources")},
            sources=tuple(tree["sources"]),
            splits=divide(shards),
            digest=digest,
        )

    def save(self, folder: Path) -> None:
        """Publishes the manifest, which makes the dataset finished; leaves an identical one untouched."""
        tree = {**self._content(), "digest": self.digest}
        with contextlib.suppress(PipelineError):
            if read_json(folder / MANIFEST) == tree:
                return
        write_json(folder / MANIFEST, tree)

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
            "shards": [shard_tree(shard) for shard in self.shards],
        }


def shard_tree(shard: Shard) -> dict[str, Any]:
    """Returns a shard as the manifest holds it; the digests of older datasets know no offset."""
    tree = asdict(shard)
    if not shard.offset:
        del tree["offset"]
    return tree


def divide(shards: Sequence[Shard]) -> dict[str, Split]:
    """Returns both splits with their shards, in the given order."""
    return {name: Split(name, tuple(s for s in shards if s.split == name)) for name in SPLITS}


def check_sizes(
    folder: Path, shards: Iterable[Shard], dtype: np.dtype[Any], cure: str = "", tokens_in: Path | None = None
) -> None:
    """Compares the sizes of shards and their indices with what was recorded.

    Args:
        folder: The dataset folder.
        shards: The shards as recorded.
        dtype: Type of the stored tokens.
        cure: What the user can do; by default prepare the dataset again.
        tokens_in: The folder of adopted token files, in which something may follow a shard; by default the dataset's.

    Raises:
        DataError: A file is missing or has another size; the message names it.
    """
    cure = cure or "remove the dataset and prepare it again"
    for shard in shards:
        for name, expected in shard.sizes(dtype).items():
            adopted = tokens_in is not None and name == shard.file
            place = tokens_in if tokens_in is not None and adopted else folder
            file = place / name
            with naming(file, "the shard cannot be read", cure, DataError):
                size = size_of_regular(file, place)
            if size < expected or (size > expected and not adopted):
                raise DataError(f"{file}: has {size} bytes instead of {expected}; the shard is damaged: {cure}")


def _digest(tree: dict[str, Any]) -> str:
    """Returns the digest of the tree as one line of JSON, which is made piece by piece: it may have a million files."""
    pieces = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":")).iterencode(tree)
    digest = hashlib.sha256()
    while some := "".join(itertools.islice(pieces, 1 << 16)):
        digest.update(some.encode())
    return digest.hexdigest()
