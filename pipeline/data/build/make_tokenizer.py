"""The tokenizer of a dataset: trained on a sample of the text, taken from a file, or bytes; and the type of its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.sections import Config
from pipeline.data.build.tasks import Plan
from pipeline.data.manifest import TOKENIZER
from pipeline.data.read.chunks import Chunk
from pipeline.data.read.task_reader import read_task
from pipeline.data.tokenize import tokenizer_json
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.train import train_bpe
from pipeline.errors import DataError
from pipeline.files import sha256_bytes, write_bytes

# In no UTF-8 text, so that no document can pretend to be two.
SEPARATOR = b"\xff"


def open_tokenizer(config: Config, plan: Plan, folder: Path) -> Tokenizer:
    """The tokenizer of the dataset in `folder`; made there if there is none yet.

    Raises:
        DataError: It cannot be made, is not the one the dataset was begun with, or is larger than the model's.
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


def dtype_of_ids(config: Config, tokenizer: Tokenizer) -> np.dtype[Any]:
    """The type of the ids in the shards.

    Raises:
        DataError: `data.dtype` is too narrow for this tokenizer.
    """
    fits = tokenizer.vocab_size <= 1 << 16
    if config.data.dtype == "uint16" and not fits:
        raise DataError(
            f"data.dtype: uint16 holds 65536 ids, the tokenizer has {tokenizer.vocab_size}; use uint32 or auto"
        )
    wide = config.data.dtype == "uint32" or not fits
    return np.dtype("<u4" if wide else "<u2")


def _recorded(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: the tokenizer cannot be read ({error.strerror})") from error


def _record(file: Path, config: Config, plan: Plan) -> bytes:
    """Not read back: another process that begins the folder anew may take the file away, to make the same again."""
    content = _make_tokenizer(config, plan)
    write_bytes(file, content)
    return content


def _make_tokenizer(config: Config, plan: Plan) -> bytes:
    """The content of tokenizer.json."""
    wanted = config.tokenizer
    if wanted.kind == "file":
        assert wanted.path is not None
        try:
            return Path(wanted.path).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer.path: {wanted.path}: cannot be read ({error.strerror})") from error
    special = (wanted.end_of_text, *wanted.special_tokens)
    if wanted.kind == "bytes":
        return tokenizer_json.compose_bytes(special).encode()
    sample = _sample(config, plan)
    if not sample:
        raise DataError("data.sources: hold no text to train a tokenizer on; look at `paths` and `separator`")
    return train_bpe(sample, SEPARATOR, config.model.vocab_size, special, wanted.split_pattern).encode()


def _sample(config: Config, plan: Plan) -> bytes:
    """Training documents from the beginning of every task, the same number of bytes of each."""
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
