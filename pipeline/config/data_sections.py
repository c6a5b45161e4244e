"""The sections of a config that describe text, token shards and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section_base import ANY_TEXT, Fraction, Name, Positive, Section, rule, wrong_value
from pipeline.errors import Problem
from pipeline.text_format import byte_characters


class SourceConfig(Section):
    """One named set of text files."""

    name: Name
    """Name of the source in manifests and mixing weights."""
    paths: tuple[str, ...] = Field(min_length=1)
    """File names or globs, relative to the working folder; matches are sorted."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    """Format of the files; `auto` goes by the name: `.txt`, `.jsonl`, `.parquet`, or these with `.gz`, `.zst` ..."""
    separator: Annotated[str | None, ANY_TEXT] = Field(default=None, min_length=1)
    """Splits a text file into documents; without it, one file is one document."""
    field: Annotated[str, ANY_TEXT] = "text"
    """JSON field or Parquet column that holds the text."""
    split: Literal["auto", "train", "validation"] = "auto"
    """Split that the documents go to; `auto` decides by a hash of each document."""
    weight: Positive = 1.0
    """Share of this source in training batches, relative to the other weights; with `data.mixing: weighted`."""


class DataConfig(Section):
    """Text, token shards and the order in which training reads them."""

    path: str = "data/tokens"
    """Folder of the token shards and their manifest; written by `pipeline prepare`."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the text comes from."""
    validation_fraction: Fraction = 0.01
    """Fraction of the documents of `split: auto` sources that goes to validation, chosen by hash."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of a stored token; `auto` uses uint16 if the vocabulary fits."""
    on_bad: Literal["error", "skip"] = "error"
    """What an unreadable record does: `error` stops the build, `skip` leaves it out and counts it."""
    max_bad_fraction: Fraction = 0.01
    """With `on_bad: skip`, the fraction of bad records above which the build stops after all."""
    max_document_mb: Positive = 32.0
    """Longest document in megabytes; a longer one is a bad record. This bounds the memory of a build."""
    slice_size_mb: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 64.0
    """Size of the input that is read, encoded and published as one unit, in megabytes."""
    order: Literal["shuffle", "random"] = "shuffle"
    """`shuffle` draws without replacement, epoch by epoch; `random` draws windows at any offset, with replacement."""
    mixing: Literal["proportional", "weighted"] = "proportional"
    """`proportional` mixes sources by their number of tokens, `weighted` by their `weight`."""
    verify: bool = False
    """Check the SHA-256 of every shard at start-up, not only its size."""

    @rule
    def _names_differ(self) -> Iterator[Problem]:
        if len({source.name for source in self.sources}) < len(self.sources):
            yield Problem("sources", "two sources have the same name")

    @rule
    def _some_text_is_trained_on(self) -> Iterator[Problem]:
        if all(source.split == "validation" for source in self.sources):
            yield Problem("sources", "every source has split: validation, which leaves nothing to train on")


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["bpe", "file", "bytes"] = "bpe"
    """`bpe` trains a BPE on the sources, `file` uses an existing tokenizer.json, `bytes` has one token per byte."""
    path: str | None = None
    """The tokenizer.json to use, with `kind: file`."""
    split_pattern: Literal["gpt2", "gpt4"] = "gpt2"
    """Pre-tokenization pattern of a trained BPE."""
    end_of_text: Annotated[str, ANY_TEXT] = Field(default="<|endoftext|>", min_length=1)
    """The special token that ends every document."""
    special_tokens: Annotated[tuple[str, ...], ANY_TEXT] = ()
    """Further special tokens, reserved in the vocabulary; not with `kind: file`, whose tokenizer.json has its own."""
    train_sample_mb: Positive = 256.0
    """Maximum size of the text that a BPE is trained on, in megabytes."""

    @rule
    def _path_goes_with_kind_file(self) -> Iterator[Problem]:
        if self.kind == "file" and self.path is None:
            yield Problem("path", "is missing; kind: file needs the tokenizer.json to use")
        if self.kind != "file" and self.path is not None:
            yield wrong_value("path", self.path, "only with kind: file")

    @rule
    def _special_tokens_differ(self) -> Iterator[Problem]:
        if len({*self.special_tokens, self.end_of_text}) <= len(self.special_tokens):
            yield Problem("special_tokens", "names a token twice (end_of_text is one already)")

    @rule
    def _a_file_brings_its_own_special_tokens(self) -> Iterator[Problem]:
        if self.kind == "file" and self.special_tokens:
            yield Problem("special_tokens", "given with kind: file, allowed: none; the tokenizer.json has its own")

    @rule
    def _special_tokens_are_no_ordinary_text(self) -> Iterator[Problem]:
        ordinary = [token for token in (self.end_of_text, *self.special_tokens) if token in byte_characters()]
        if self.kind != "file" and ordinary:
            yield Problem(
                "end_of_text",
                f"{', '.join(map(repr, ordinary))}: given a character that the vocabulary holds as ordinary text, "
                "allowed for end_of_text and special_tokens: a word, for example <|endoftext|>",
            )
