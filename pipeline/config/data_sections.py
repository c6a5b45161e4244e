"""The sections of a config that describe text, token shards and the tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section_base import (
    ANY_TEXT,
    Fraction,
    Name,
    NonNegativeInt,
    Positive,
    Section,
    cut,
    rule,
    wrong_value,
)  # fmt: skip
from pipeline.config.where import parse_where
from pipeline.errors import Problem
from pipeline.text_format import byte_characters


class SourceConfig(Section):
    """One named set of text files."""

    name: Name
    """Name of the source in manifests and mixing weights."""
    paths: tuple[str, ...] = Field(min_length=1)
    """File names or globs, relative to the working folder; matches are sorted."""
    format: Literal["auto", "txt", "jsonl", "parquet", "arrow"] = "auto"
    """Format of the files; `auto` goes by the name: `.txt`, `.jsonl`, `.json`, `.parquet`, `.arrow`, then `.gz` ..."""
    separator: Annotated[str | None, ANY_TEXT] = Field(default=None, min_length=1)
    """Splits a text file into documents; without it, one file is one document."""
    field: Annotated[str, ANY_TEXT] = "text"
    """JSON field or column that holds the text; a dot leads into a field: `content.text`."""
    where: Annotated[str | None, ANY_TEXT] = None
    """Keeps the records of which this is true: `language == 'en' and meta.score >= 0.65`; also `or`, `not`, `in`."""
    split: Literal["auto", "train", "validation"] = "auto"
    """Split that the documents go to; `auto` decides by a hash of each document."""
    weight: Positive = 1.0
    """Share of this source in training batches, relative to the other weights; with `data.mixing: weighted`."""

    @rule
    def _where_can_be_read(self) -> Iterator[Problem]:
        try:
            if self.where is not None:
                parse_where(self.where)
        except ValueError as error:
            yield Problem("where", f"given {cut(self.where or '')!r}: {error}")


class PhaseConfig(Section):
    """The mixture of sources from one step on, until the next phase."""

    from_step: NonNegativeInt
    """First step of the phase, counted in global batches."""
    weights: dict[Name, Positive] = Field(min_length=1)
    """Share of each source by its name, relative to the other weights; a source that is not named is absent."""


class DataConfig(Section):
    """Text, token shards and the order in which training reads them."""

    path: str = "data/tokens"
    """Folder of the token shards and their manifest; written by `pipeline prepare`."""
    token_folder: str | None = None
    """Folder of the token files that `pipeline adopt` left in place; nothing in it is read unless it is named here."""
    sources: tuple[SourceConfig, ...] = ()
    """Where the text comes from; not needed with `token_folder`."""
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
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill the windows of training: `concat` cuts one long sequence of them; `best_fit` packs whole
    documents into each window and pads the rest, which no loss counts."""
    phases: tuple[PhaseConfig, ...] = ()
    """Weights of the sources that change during the run, in place of `mixing`. The first begins at step 0; those ahead
    of a run's present step may change when it resumes."""
    verify: bool = False
    """Check the SHA-256 of every shard at start-up, not only its size."""

    def schedule(self) -> tuple[PhaseConfig, ...]:
        """Returns the phases in force, of which there is one with `mixing: weighted`; none with `proportional`."""
        if self.phases or self.mixing == "proportional":
            return self.phases
        weights = {source.name: source.weight for source in self.sources if source.split != "validation"}
        return (PhaseConfig(from_step=0, weights=weights),)

    @rule
    def _names_differ(self) -> Iterator[Problem]:
        if len({source.name for source in self.sources}) < len(self.sources):
            yield Problem("sources", "two sources have the same name")

    @rule
    def _text_or_tokens_are_named(self) -> Iterator[Problem]:
        if not self.sources and self.token_folder is None:
            yield Problem("sources", "is missing; name the text, or with token_folder the tokens of an adopted dataset")

    @rule
    def _some_text_is_trained_on(self) -> Iterator[Problem]:
        if self.sources and all(source.split == "validation" for source in self.sources):
            yield Problem("sources", "every source has split: validation, which leaves nothing to train on")

    @rule
    def _weights_are_named(self) -> Iterator[Problem]:
        if self.mixing == "weighted" and not self.phases and not self.sources and self.token_folder is not None:
            phases = "data.phases: [{from_step: 0, weights: {NAME: 1.0}}]"
            yield wrong_value(
                "mixing",
                self.mixing,
                f"proportional; without data.sources, which hold each `weight`, give it in {phases}",
            )

    @rule
    def _packed_windows_are_shuffled(self) -> Iterator[Problem]:
        if self.packing == "best_fit" and self.order == "random":
            yield wrong_value("order", self.order, "shuffle, with packing: best_fit; random takes windows at any token")

    @rule
    def _phases_follow_each_other_from_step_0(self) -> Iterator[Problem]:
        if self.phases and self.phases[0].from_step != 0:
            yield wrong_value("phases.0.from_step", self.phases[0].from_step, "0: the first phase begins the run")
        for index, (before, after) in enumerate(itertools.pairwise(self.phases), start=1):
            if after.from_step <= before.from_step:
                least = f"more than {before.from_step}, where the phase before it begins"
                yield wrong_value(f"phases.{index}.from_step", after.from_step, least)

    @rule
    def _phases_name_sources_of_the_training_split(self) -> Iterator[Problem]:
        known = [source.name for source in self.sources if source.split != "validation"]
        if not self.sources:
            return  # those of an adopted dataset stand in its manifest
        for index, phase in enumerate(self.phases):
            for name in phase.weights:
                if name not in known:
                    yield Problem(
                        f"phases.{index}.weights.{name}", f"is no source to train on; these are: {', '.join(known)}"
                    )


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
