"""What the manifest of a dataset and the record of a slice must hold before any of it is used, whoever made them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, Strict, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.config.messages.values import first_problem

_MOST_TOKENS = 1 << 53
# The largest vocabularies have a million tokens; a page about a dataset counts every one.
_MOST_IDS = 1 << 24

_Int = Annotated[int, Strict(), Field(ge=0, le=_MOST_TOKENS)]
_Count = Annotated[_Int, Field(ge=1)]
_Text = Annotated[str, Strict(), StringConstraints(max_length=10_000)]
_Sha256 = Annotated[str, Strict(), StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Strict(), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
# Below the folder: no part is `..`, and none is hidden. Token files that others made have other names than ours.
_File = Annotated[
    str,
    Strict(),
    StringConstraints(
        pattern=r"^[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*(/[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*)*$", max_length=1000
    ),
]


class _Shard(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    file: _File
    index: _File
    source: _Name
    split: Literal["train", "validation"]
    tokens: _Count
    documents: _Count
    text_bytes: _Int
    longest: _Int
    largest_id: Annotated[int, Strict(), Field(ge=0, lt=1 << 32)]
    sha256: _Sha256
    index_sha256: _Sha256
    offset: NotRequired[_Int]


class _Source(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: _Name
    empty: _Int
    dropped: NotRequired[_Int]
    bad: dict[_Text, _Int]


class _SourceSettings(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: _Name


class _Adopted(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    format: _Name
    folder: _Text


class _Settings(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    sources: list[_SourceSettings]
    adopted: NotRequired[_Adopted]


class _Manifest(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    format_version: _Int
    dtype: Literal["uint8", "uint16", "uint32", "uint64"]
    tokenizer_digest: _Sha256
    vocab_size: Annotated[_Count, Field(le=_MOST_IDS)]
    end_of_text_id: Annotated[_Int, Field(lt=_MOST_IDS)]
    encoder: _Text
    totals: dict[str, dict[str, _Int]]
    settings: _Settings
    sources: list[_Source]
    shards: list[_Shard]


class _Piece(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    file: _Int
    start: _Int
    stop: _Int
    last: Annotated[bool, Strict()]
    sha256: _Sha256
    lost: NotRequired[_Int]


class _Slice(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    slice: _Text
    source: _Name
    build: _Text
    last: Annotated[bool, Strict()]
    records: _Int
    empty: _Int
    dropped: NotRequired[_Int]
    bad: dict[_Text, _Int]
    cross_checked: _Int
    pieces: list[_Piece]
    shards: list[_Shard]


_MANIFEST = TypeAdapter(_Manifest)
_SLICE = TypeAdapter(_Slice)
_FILE_NAME = TypeAdapter(_File)


def is_file_name(name: str) -> bool:
    """Returns whether a shard may have this name, relative to its folder."""
    return _problem(_FILE_NAME, name) is None


def problem(tree: Any) -> str | None:
    """Returns what is wrong with the content of a manifest, without its digest; None if nothing."""
    found = _problem(_MANIFEST, tree)
    if found is None and sum(shard["tokens"] for shard in tree["shards"]) > _MOST_TOKENS:
        return "shards: more tokens in total than any disk holds"
    return found


def slice_problem(tree: Any) -> str | None:
    """Returns what is wrong with the record of a slice; None if nothing."""
    return _problem(_SLICE, tree)


def _problem(adapter: TypeAdapter[Any], tree: Any) -> str | None:
    try:
        adapter.validate_python(tree)
    except ValidationError as error:
        return first_problem(error)
    return None
