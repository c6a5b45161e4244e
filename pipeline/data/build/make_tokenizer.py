"""Makes the tokenizer of a dataset: trained on a sample of the text, copied from a file, or bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.sections import Config
from pipeline.data.build.tasks import Plan
from pipeline.data.layout import TOKENIZER
from pipeline.data.read.chunks import Chunk
from pipeline.data.read.task_reader import read_task
from pipeline.data.tokenize import tokenizer_json
from pipeline.data.tokenize.limits import LARGEST
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.train import train_bpe
from pipeline.errors import DataError
from pipeline.files import naming, read_bounded, sha256_bytes, write_bytes

# Never occurs in UTF-8, so that no document can be mistaken for two.
SEPARATOR = b"\xff"


def open_tokenizer(config: Config, plan: Plan, folder: Path) -> Tokenizer:
    """Returns the tokenizer of the dataset in `folder`, after making it there if it is missing.

    Raises:
        DataError: It cannot be made, is not the one that the dataset was begun with, or exceeds the model's vocabulary.
    """
    file = folder / TOKENIZER
    tokenizer = Tokenizer(_recorded(file) or _record(file, config, plan), str(file), config.tokenizer.end_of_text)
    if config.tokenizer.kind == "file" and sha256_bytes(_make_tokenizer(config, plan)) != tokenizer.digest:
        raise DataError(
            f"{config.tokenizer.path}: is not the tokenizer that {folder} was begun with; "
            "choose another data.path, or remove the folder to start over"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{file}: has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"set it to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def too_small(config: Config, tokenizer: Tokenizer) -> str | None:
    """Returns what to say about a trained BPE with fewer tokens than the model has embeddings; None if it has all."""
    given, wanted = tokenizer.vocab_size, config.model.vocab_size
    if config.tokenizer.kind != "bpe" or given >= wanted:
        return None
    return (
        f"the BPE has {given:,} tokens and not model.vocab_size = {wanted:,}: the sample has no more pairs to merge; "
        f"the other {wanted - given:,} embeddings stay unused; raise tokenizer.train_sample_mb, give more text, or "
        f"set model.vocab_size to {given}"
    )


def dtype_of_ids(config: Config, tokenizer: Tokenizer) -> np.dtype[Any]:
    """Returns the type of the ids in the shards.

    Raises:
        DataError: `data.dtype` is too narrow for this tokenizer.
    """
    fits = tokenizer.vocab_size <= 1 << 16
    if config.data.dtype == "uint16" and not fits:
        raise DataError(
            f"data.dtype: uint16 holds 65,536 ids, the tokenizer has {tokenizer.vocab_size:,}; use uint32 or auto"
        )
    wide = config.data.dtype == "uint32" or not fits
    return np.dtype("<u4" if wide else "<u2")


def _recorded(file: Path) -> bytes | None:
    with naming(file, "the tokenizer cannot be read", error=DataError):
        try:
            return read_bounded(file, most=LARGEST)
        except FileNotFoundError:
            return None


def _record(file: Path, config: Config, plan: Plan) -> bytes:
    """Makes the tokenizer; does not read it back, since a process that starts the folder over may remove the file."""
    content = _make_tokenizer(config, plan)
    write_bytes(file, content)
    return content


def _make_tokenizer(config: Config, plan: Plan) -> bytes:
    """Returns the content of tokenizer.json."""
    wanted = config.tokenizer
    if wanted.kind == "file":
        assert wanted.path is not None
        with naming(f"tokenizer.path: {wanted.path}", "cannot be read", error=DataError):
            return read_bounded(wanted.path, most=LARGEST)
    special = (wanted.end_of_text, *wanted.special_tokens)
    if wanted.kind == "bytes":
        return tokenizer_json.compose_bytes(special).encode()
    sample = _sample(config, plan)
    if not sample:
        raise DataError("data.sources: hold no text to train a tokenizer on; correct `paths` or `separator`")
    return train_bpe(sample, SEPARATOR, config.model.vocab_size, special, wanted.split_pattern).encode()


def _sample(config: Config, plan: Plan) -> bytes:
    """Returns training documents from the beginning of every task, the same number of bytes of each."""
    fraction = config.data.validation_fraction
    tasks = [t for t in plan.tasks if config.data.sources[t.source].split != "validation"]
    allowed = config.tokenizer.train_sample_mb * 1e6
    chosen: list[bytes] = []
    taken = 0
    for number, task in enumerate(tasks):
        source = config.data.sources[task.source]
        budget = allowed * (number + 1) / len(tasks) - taken
        for event in read_task(task, source, plan.files[task.source], config.data):
            if not isinstance(event, Chunk) or not len(event.documents):
                continue
            documents = event.documents
            if source.split == "auto":
                documents = documents.without(documents.hash_fractions() < fraction)
            text = SEPARATOR.join(documents)
            chosen.append(text[: max(0, int(budget))].decode(errors="ignore").encode() if len(text) > budget else text)
            taken += len(chosen[-1])
            budget -= len(text)
            if budget <= 0:
                break
    return SEPARATOR.join(chosen)
